"""SHA256SUMS: the checksum of every file of a folder, written with it, and read wherever the folder is used."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from overnight.core.files import atomic_write, forget_cached, remove, sha256, sync, within
from overnight.errors import DamagedData

SUMS = "SHA256SUMS"


def write_sums(folder: Path) -> None:
    """Write the checksum of every other file of a folder into its SHA256SUMS."""
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    lines = [f"{sha256(path)}  {name}\n" for name, path in sorted(paths.items()) if name != SUMS]
    atomic_write(folder / SUMS, "".join(lines))


def put_in_place(aside: Path, final: Path) -> None:
    """Checksum and sync what is in `aside`, then give it its `final` name; an older folder of that name is replaced."""
    write_sums(aside)
    for path in aside.iterdir():
        sync(path)
        forget_cached(path)
    sync(aside)
    discard(final)
    aside.rename(final)
    sync(final.parent)


def discard(path: Path) -> None:
    """Delete a whole folder, never leaving half of one under its name; of a link to another place, the link."""
    aside = path.with_name(f".{path.name}.discarded")
    remove(aside)
    if path.is_symlink() or path.exists():
        remove(path.rename(aside))


def damage(folder: Path, required: Collection[str] = ()) -> str | None:
    """What is wrong with a folder, or None: every file is there and has the checksum it was written with.

    `required` are names that its SHA256SUMS must list. Raises OSError where the disk does not tell: only bytes that
    differ, and files that are not there, are damage.
    """
    name = SUMS
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
        sums = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
        if missing := set(required) - sums.keys():
            return f"{SUMS} does not list {', '.join(sorted(missing))}"
        for name, digest in sums.items():
            if sha256(within(folder / SUMS, name)) != digest:
                return f"{name} differs from its checksum"
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        return f"{name}: {error.strerror}"
    except ValueError as error:
        return f"{name}: {error}"
    except DamagedData as error:  # a name that leaves the folder
        return str(error)
    return None
