"""One process at a time in a folder."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from filelock import FileLock, Timeout

from overnight.core.files import never_through_a_link, sync
from overnight.errors import InputError

LOCK = ".lock"
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EINVAL}
TAKE_LOCK = "import fcntl, sys; fcntl.flock(open(sys.argv[1], 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"


def hold(folder: Path, otherwise: str) -> FileLock:
    """Lock `folder` for as long as the returned lock is kept and not released.

    `InputError` names the process that has it, and says what to do `otherwise`.
    """
    if (folder / LOCK).is_symlink():  # it would be emptied, and written to
        raise InputError(f"{folder / LOCK} is a link, and a lock never is: remove it, and the same command continues")
    lock = kernel_lock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(f"{folder} is in use by {_holder(folder / LOCK)}; {otherwise}") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        raise InputError(f"{folder}: its file system has no locks ({error.strerror}); name a local disk") from error
    with open(folder / LOCK, "w", encoding="utf-8", opener=never_through_a_link) as file:
        json.dump({"pid": os.getpid(), "host": socket.gethostname()}, file)
    return lock


def holder_of(folder: Path) -> str | None:
    """The process that has the lock of `folder`, in words; None where none has. Nothing is written."""
    try:
        with (folder / LOCK).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _holder(folder / LOCK)
    except FileNotFoundError:
        return None
    return None


def kernel_lock(path: Path) -> FileLock:
    """A lock of the kernel's (flock), which ends with the process that holds it, however that ends.

    Where the file system has no such lock, taking it raises OSError: filelock's other kind outlives a kill.
    """
    return FileLock(path, thread_local=False, fallback_to_soft=False)


def unsafe(folder: Path) -> str | None:
    """What a run must not trust the file system of `folder` with, tried with a file there and a second process."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".overnight-") as file:
        path = Path(file.name)
        try:
            sync(path)
            sync(folder)
            with kernel_lock(path):
                second = subprocess.run([sys.executable, "-c", TAKE_LOCK, path], capture_output=True, check=False)
        except (OSError, NotImplementedError) as error:
            return f"locks and syncing fail there ({error})"
    return None if second.returncode else "two processes get the same lock there"


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']}"
    except (ValueError, KeyError, TypeError):  # caught between its lock and its words, or damaged
        return "another process"
