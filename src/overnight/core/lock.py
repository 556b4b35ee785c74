"""One process at a time in a folder."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from pathlib import Path
from typing import IO

from overnight.errors import InputError

LOCK = ".lock"


def hold(folder: Path) -> IO[str]:
    """Lock `folder` for as long as the returned file is open; `InputError` names the process that has it.

    The lock is the kernel's (flock), and so it ends with the process that holds it, however that ends: what the file
    says of a dead process is overwritten.
    """
    file = (folder / LOCK).open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = _holder(file.read())
        file.close()
        raise InputError(f"{folder} is in use by {holder}; wait for it, stop it, or take another --name") from None
    file.truncate(0)
    json.dump({"pid": os.getpid(), "host": socket.gethostname()}, file)
    file.flush()
    return file


def _holder(said: str) -> str:
    try:
        holder = json.loads(said)
        return f"process {holder['pid']} on {holder['host']}"
    except (ValueError, KeyError, TypeError):  # caught between its lock and its words
        return "another process"
