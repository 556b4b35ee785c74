"""Files that are whole or not there: checksums, bytes that are on the disk before their name is, and full disks."""

from __future__ import annotations

import codecs
import errno
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from overnight.errors import InputError

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
PIECE = 4 * 2**20  # bytes read at once
SUM_LINE = re.compile(
    r"\\?(?P<sum>[0-9a-fA-F]{64}) [ *](?P<name>.+)"
    r"|SHA(?:2-)?256 ?\((?P<tagged>.+)\) ?= ?(?P<tagged_sum>[0-9a-fA-F]{64})"
)


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex. Long pieces: between two of them a thread gives way to the others."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()


def read_sums(path: Path) -> dict[str, str]:
    """The SHA-256 of each name in a SHA256SUMS, whether sha256sum wrote it as text, binary or with `--tag`.

    Raises InputError for a line that is none of these, or a name with two sums: what is published could not be checked.
    """
    if not path.is_file():
        return {}
    found: dict[str, str] = {}
    lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape").splitlines()
    for number, line in enumerate(lines, start=1):
        match = SUM_LINE.fullmatch(line.strip())
        if line.strip() and not line.startswith("#") and match is None:
            raise InputError(f"{path}, line {number}: no SHA-256 and name; `sha256sum FILE > {path.name}` writes one")
        if match:
            name = os.path.normpath(match["name"] or match["tagged"])
            if line.startswith("\\"):  # sha256sum's sign for a name in which it has escaped something
                name = name.replace("\\n", "\n").replace("\\\\", "\\")
            sha256 = (match["sum"] or match["tagged_sum"]).lower()
            if found.setdefault(name, sha256) != sha256:
                raise InputError(f"{path}, line {number}: {name} has two sums; leave the one that is right")
    return found


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk; some file systems do not do that for folders."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def forget_cached(path: Path) -> None:
    """Drop a synced file from the system's memory, so that whoever reads it next reads what the disk holds."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def atomic_write(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step, so that no reader ever sees half of it."""
    aside = path.with_name(f".{path.name}.partial")
    try:
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def strict_json(value: Any, **how: Any) -> str:
    """JSON that every reader takes: null for a number that is not finite, NumPy's numbers as numbers."""
    return json.dumps(_plain(value), allow_nan=False, **how)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def no_room(error: Exception) -> bool:
    """Whether a full disk, or a file at its largest, is behind an error; Rust's libraries say so in words alone."""
    codes = {getattr(error, "errno", None)} | {int(code) for code in re.findall(r"os error (\d+)", str(error))}
    return bool(NO_ROOM & codes)


@contextmanager
def disk_full_error(folder: Path, key: str) -> Iterator[None]:
    """Turn the error of a full disk into an InputError that names the recipe's key and the folder."""
    try:
        yield
    except OSError as error:
        if not no_room(error):
            raise
        raise InputError(
            f"`{key}`: the disk of {folder} is full ({error.strerror}); earlier work is kept: make room and type the "
            "same command again"
        ) from error
