"""Files that are whole or not there: checksums, bytes that are on the disk before their name is, and full disks."""

from __future__ import annotations

import codecs
import errno
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from overnight.errors import DamagedData, InputError, Unreachable

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

    Nothing where there is none. Raises InputError for one without a sum, a line that is none of these, or a name with
    two sums: what is published could not be checked; and OSError where it cannot be read, as a link to nothing.
    """
    if not os.path.lexists(path):
        return {}
    found: dict[str, str] = {}
    text = path.read_bytes().removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape")
    for number, line in enumerate(text.replace("\0", "\n").splitlines(), start=1):
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
    if not found:
        raise InputError(f"{path} holds no sum; write it again, or remove it")
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
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def atomic_write(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content` in one step, so that no reader ever sees half of it; never through a link."""
    aside = path.with_name(f".{path.name}.partial")
    remove(aside)
    try:
        with aside.open("xb") as file:  # a new file or none: what stands there by then is not written through
            file.write(content if isinstance(content, bytes) else content.encode())
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def never_through_a_link(path: str, flags: int) -> int:
    """An `opener` for open(): OSError where `path` is a link."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def write_figure(path: Path, figure: Any, **how: Any) -> None:
    """Write a matplotlib figure in the format of its name, whole or not at all; `InputError` for another format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    try:
        figure.savefig(drawn, format=path.suffix[1:], dpi=150, **how)
    except ValueError as error:
        raise InputError(f"{path} cannot be drawn: {error}; a name that ends in .png would work") from None
    atomic_write(path, drawn.getvalue())


def remove(path: Path) -> None:
    """Delete a file, a folder with all that is in it, or a link, and then nothing behind it; nothing may be there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def entries(folder: Path) -> list[Path]:
    """What lies in a folder, sorted; nothing where there is no such folder. Unlike glob, OSError where it is not read.

    `Unreachable` where the folder is a link to what is not there, such as a disk that is not mounted.
    """
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        refuse_dangling(folder)
        return []


def refuse_dangling(path: Path) -> None:
    """Raise `Unreachable` for a link to what is not there."""
    if path.is_symlink() and not path.exists():
        raise Unreachable(
            f"{path} is a link to {path.readlink()}, which is not there: mount that disk, then type the same command"
        )


def file_name(name: str) -> str:
    """Any name as that of a file: another one for another name, and it leaves no folder."""
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", name).strip("._")[-80:]
    known = re.fullmatch(r"[A-Za-z0-9-]+/[A-Za-z0-9._-]{1,60}", name)  # on the Hub, whose owners have no underscore
    return safe if safe == name or known else f"{safe}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def within(file: Path, name: str) -> Path:
    """The path of a `name` that stands in a `file` beside it; `DamagedData` where it leads out of that folder."""
    if Path(name).is_absolute() or ".." in Path(name).parts or not Path(name).parts:
        raise DamagedData(f"{file} names {name!r}, which leads out of its folder")
    return file.parent / name


def errno_of(error: BaseException) -> int | None:
    """The system's error number behind an error; Rust's libraries say it in words alone. None where there is none."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    said = re.search(r"os error (\d+)", str(error))
    return int(said[1]) if said else None


def strict_json(value: Any, **how: Any) -> str:
    """JSON that every reader takes: null for a number that is not finite, NumPy's numbers as numbers."""
    plain = to_jsonable_python(value, inf_nan_mode="null", fallback=lambda number: number.item())
    return json.dumps(plain, allow_nan=False, **how)


def of_this_machine(error: Exception) -> bool:
    """Whether a file of this machine, and no network, is behind an error: another try would meet the same."""
    known = NO_ROOM | {errno.EMFILE, errno.ENFILE, errno.EROFS}
    return isinstance(error, OSError) and (error.filename is not None or error.errno in known)


def no_room(error: Exception) -> bool:
    """Whether a full disk, or a file at its largest, is behind an error."""
    return errno_of(error) in NO_ROOM


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
