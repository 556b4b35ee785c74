"""The files of a source, wherever they lie: found, fetched to the byte, and hashed before anything is decoded.

Local files are read where they are. What lies behind a URL (http, https, hf, and whatever else fsspec has a file
system for) is fetched in blocks, so that an interrupted transfer continues at the byte that it had reached.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import time
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import fsspec
import fsspec.asyn
from fsspec.core import url_to_fs
from huggingface_hub.errors import OfflineModeIsEnabled

from overnight.core import files
from overnight.errors import DamagedData, InputError, Unreachable, listed
from overnight.prepare.docstrings import embedded_documents, embedded_version
from overnight.prepare.documents import FORMATS, format_of
from overnight.recipe.schema import EMBEDDED_BYTES, Data

if TYPE_CHECKING:
    from fsspec.implementations.http import HTTPFileSystem  # whose packages only a URL needs

EMBEDDED = "embedded.jsonl"
SHA256SUMS = "SHA256SUMS"
MOST_NAMED = 8
PARTIAL_CONTENT = 206
BLOCK = 32 * 2**20
"""Bytes of one request; what is lost at most when a transfer breaks."""
PAUSES = (1, 2, 4, 8, 16, 32)
"""Seconds before each further try of a request that failed; progress starts them anew."""
REFUSED_STATUS = {400, 401, 403, 404, 405, 410, 451}
"""HTTP answers that another try does not change."""

T = TypeVar("T")


class SourceFile(NamedTuple):
    """One input file: path or URL, size, what changes when its content does, and its SHA-256 where one is published."""

    name: str
    size: int
    version: str
    sha256: str | None = None

    @property
    def form(self) -> str:
        """Its format and packing: .txt, .jsonl.gz, .parquet."""
        return format_of(self.name) or ""

    @property
    def remote(self) -> bool:
        """Whether it has to be fetched."""
        return "://" in self.name

    @property
    def key(self) -> str:
        """A short name for this very content, for what is kept about it."""
        return hashlib.sha256(json.dumps([self.name, self.size, self.version]).encode()).hexdigest()[:16]


def find(data: Data, commit: str | None, report: Callable[[str], None] = lambda line: None) -> list[SourceFile]:
    """The files of the source, sorted by name; those of a Hub dataset at `commit`. `report` hears what is left out.

    Raises InputError naming the recipe key for what cannot be found or read, and Unreachable for a network that fails.
    """
    if data.source == "embedded":
        return [SourceFile(EMBEDDED, EMBEDDED_BYTES, embedded_version())]
    if data.source == "adopted":
        raise InputError("`data.source` is adopted, token files without a text: `--adopt DIR` takes them from there")
    if data.path is None:
        raise InputError(f"`data.path` is empty, but data.source is {data.source}: name a path, a URL or a dataset")
    named = [data.path] if isinstance(data.path, str) else data.path
    if data.source == "datasets":
        named = [_hub_url(data, commit)]
    found = {file.name: file for place in named for file in (_remote if "://" in place else _local)(place, report)}
    return [found[name] for name in sorted(found)]


def pinned_commit(data: Data) -> str | None:
    """The commit that a Hub dataset's revision means now; None for other sources."""
    if data.source != "datasets":
        return None
    from huggingface_hub import HfApi

    name = data.path
    if not isinstance(name, str) or name.count("/") != 1:
        raise InputError(f"`data.path` is {listed(name)}; the name of one dataset, owner/name, would work")
    place = f"{name} at {data.revision or 'its main branch'}"
    return with_retries(lambda: HfApi().dataset_info(name, revision=data.revision), place).sha


def _hub_url(data: Data, commit: str | None) -> str:
    return f"hf://datasets/{data.path}@{commit}/{data.files or '**'}"


def _local(place: str, report: Callable[[str], None]) -> Iterator[SourceFile]:
    """What a path means: the file, the text files in the folder, or the files that fit it as a pattern."""
    root = Path(place)
    if root.is_dir():
        names = _only_text(place, [str(path) for path in root.iterdir()], report)
    else:
        names = [str(root)] if root.exists() else [name for name in _matching(root) if not os.path.isdir(name)]
    if not names:
        raise InputError(f"`data.path` is {place}: no file found there; it takes {FORMATS} or a folder")
    sums: dict[Path, dict[str, str]] = {}
    for path in sorted(map(Path, names)):
        _require_format(str(path), place)
        about = path.stat()
        if path.parent not in sums:
            sums[path.parent] = files.read_sums(path.with_name(SHA256SUMS))
        published = sums[path.parent].get(path.name) or sums[path.parent].get(os.path.abspath(path))
        if sums[path.parent] and published is None:
            report(f"{path} has no sum in the {SHA256SUMS} beside it, and is not checked")
        yield SourceFile(str(path), about.st_size, str(about.st_mtime_ns), published)


def _matching(pattern: Path) -> list[str]:
    """The files that fit a pattern; the folders at its beginning that are there are names, whatever stands in them."""
    there = next(folder for folder in pattern.parents if folder.exists())
    return [str(there / name) for name in glob.glob(str(pattern.relative_to(there)), root_dir=there, recursive=True)]


def _only_text(place: str, names: list[str], report: Callable[[str], None]) -> list[str]:
    """Those of a folder's files that can be read; says which and, beside hidden ones, which cannot."""
    text = [name for name in names if format_of(name) and not os.path.isdir(name)]
    hidden = [name for name in names if Path(name).name.startswith(".") or Path(name).name == SHA256SUMS]
    others = set(names) - set(text) - set(hidden)
    if others:
        several = f"{place}/**/*.jsonl" if any(os.path.isdir(name) for name in others) else ""
        report(
            f"{place}: {len(text)} files are read: {_listed(text)}; not read: {_listed(others)}"
            + (f"; a pattern such as `{several}` reads what lies below" if several else "")
        )
    return text


def _listed(names: Collection[str]) -> str:
    shown = [Path(name).name + ("/" if os.path.isdir(name) else "") for name in sorted(names)[:MOST_NAMED]]
    return ", ".join(shown) + (f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else "")


def _remote(pattern: str, report: Callable[[str], None]) -> Iterator[SourceFile]:
    system, root = with_retries(lambda: url_to_fs(pattern), pattern)
    names = [root]
    if glob.has_magic(root) and not pattern.startswith("http") and not with_retries(lambda: system.isfile(root), root):
        names = _only_text(pattern, with_retries(lambda: system.glob(root), pattern), report)
        if not names:
            raise InputError(f"`data.path` or `data.files` is {pattern}: no {FORMATS} file found there")
    for name in names:
        url = system.unstrip_protocol(name)
        _require_format(url, pattern)
        about = with_retries(partial(system.info, name), url)
        if not about.get("size"):
            raise InputError(f"`data.path`: {url} has no size, or its server does not tell it; copy it to a local file")
        sha256 = (about.get("lfs") or {}).get("sha256")
        version = sha256 or about.get("blob_id") or about.get("ETag") or about.get("Last-Modified") or ""
        yield SourceFile(url, about["size"], str(version), sha256)


def _require_format(name: str, place: str) -> None:
    if format_of(name) is None:
        raise InputError(f"`data.path` is {place}: cannot read {name}; files end in {FORMATS}")
    if not name.encode(errors="replace") == os.fsencode(name):
        raise InputError(f"`data.path` is {place}: {name!r} is no name in UTF-8, so no manifest takes it; rename it")


def with_retries(action: Callable[[], T], name: str) -> T:
    """Return `action()`, tried again with growing pauses while the network fails.

    Raises InputError when the answer is a refusal, and Unreachable when it still fails after the last pause.
    """
    for pause in (*PAUSES, None):
        try:
            return action()
        except Exception as error:  # the clients of fsspec's file systems and of the Hub share no base class
            if files.of_this_machine(error):
                raise
            said = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
            if _is_refusal(error):
                raise InputError(
                    f"`data.path`: {name} cannot be had ({said}); check spelling, revision and access"
                ) from error
            if pause is None:
                raise Unreachable(
                    f"`data.path`: {name} cannot be reached ({said}), tried {len(PAUSES) + 1} times; what has been "
                    "fetched and tokenised is kept: the same command continues from there"
                ) from error
            time.sleep(pause)
    raise AssertionError("unreachable: the last pause is None")


def _is_refusal(error: BaseException) -> bool:
    """Whether another try would be answered in the same way."""
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        return _is_refusal(error.__cause__)  # fsspec says so of every file of a server that it cannot reach
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return status in REFUSED_STATUS
    return isinstance(error, FileNotFoundError | PermissionError | ImportError | ValueError | OfflineModeIsEnabled)


def local_path(file: SourceFile, folder: Path) -> Path:
    """Where a file lies on this machine, or will when it is fetched."""
    return folder / f"{file.key}{file.form}" if file.remote or file.name == EMBEDDED else Path(file.name)


def fetch(file: SourceFile, folder: Path) -> tuple[Path, str]:
    """Return where the whole file lies on this machine, and its SHA-256.

    `folder` keeps what was fetched, and the sums, between two calls. Raises DamagedData when the SHA-256 is not the
    published one, and what `with_retries` raises.
    """
    path = local_path(file, folder)
    known = folder / f"{file.key}.sha256"
    if path.is_file() and known.is_file():
        return path, known.read_text()
    folder.mkdir(parents=True, exist_ok=True)
    if file.name == EMBEDDED:
        files.atomic_write(path, "".join(json.dumps({"text": text}) + "\n" for text in embedded_documents()))
    elif file.remote:
        _fetch_remote(file, path)
    found = files.sha256(path)
    if file.sha256 not in (None, found):
        if file.remote:
            path.unlink()  # so that the next try fetches it anew
        raise DamagedData(f"{file.name}: SHA-256 {file.sha256} expected, {found} found; fetch or write it again")
    files.atomic_write(known, found)
    return path, found


def _fetch_remote(file: SourceFile, path: Path) -> None:
    system, root = url_to_fs(file.name)
    aside = path.with_name(path.name + ".partial")
    in_blocks = file.size <= BLOCK or "http" not in system.protocol or aside.exists()
    if not in_blocks and not with_retries(lambda: _has_ranges(system, root), file.name):
        with_retries(lambda: _whole(system, root, aside, file.size), file.name)
    with aside.open("ab") as out:
        while (have := out.tell()) < file.size:
            end = min(have + BLOCK, file.size)
            out.write(with_retries(partial(_block, system, root, have, end), file.name))
        out.flush()
        os.fsync(out.fileno())
    aside.rename(path)


def _has_ranges(system: HTTPFileSystem, root: str) -> bool:
    """Whether a server answers with a part of a file when it is asked for that."""

    async def ask() -> bool:
        session = await system.set_session()
        async with session.get(system.encode_url(root), headers={"Range": "bytes=0-0"}) as answer:
            answer.raise_for_status()
            return answer.status == PARTIAL_CONTENT

    return fsspec.asyn.sync(system.loop, ask)


def _whole(system: fsspec.AbstractFileSystem, root: str, path: Path, size: int) -> None:
    """Write all of a remote file, from its beginning; raises OSError, which is tried again, when it is not all."""
    coming = path.with_suffix(".whole")
    system.get_file(root, str(coming))
    if (found := coming.stat().st_size) != size:
        raise OSError(f"{size} bytes expected, {found} received")
    coming.rename(path)


def _block(system: fsspec.AbstractFileSystem, root: str, start: int, end: int) -> bytes:
    """Bytes [start, end) of a remote file; raises OSError, which is tried again, when there are more or fewer."""
    block = system.cat_file(root, start=start, end=end)
    if len(block) != end - start:
        raise OSError(f"{end - start} bytes asked for at {start}, {len(block)} received")
    return block


def discard_fetched(file: SourceFile, folder: Path) -> None:
    """Remove what `fetch` keeps of a file that is done with; a local file itself is the user's."""
    for path in (folder / f"{file.key}{file.form}", folder / f"{file.key}.sha256"):
        path.unlink(missing_ok=True)
