"""Files that are whole or not there: checksums, bytes that are on the disk before their name is, and full disks."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from overnight.recipe import InputError

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step, so that no reader ever sees half of it."""
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


@contextmanager
def room_in(folder: Path, key: str) -> Iterator[None]:
    """Turn the error of a full disk into an InputError that names the recipe's key and the folder."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise InputError(
            f"`{key}`: the disk of {folder} is full ({error.strerror}); earlier work is kept: make room and type the "
            "same command again"
        ) from error
