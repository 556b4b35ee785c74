"""Text sources: the embedded documentation, local files and `datasets` names, read as one ordered stream of documents.

Nothing here executes what it reads: the embedded corpus is parsed with `ast`, never imported.
"""

from __future__ import annotations

import ast
import codecs
import contextlib
import gc
import glob
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import multiprocessing
import os
import platform
import re
import sysconfig
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from overnight.recipe import Data, InputError

READER_VERSION = 1
"""Part of the cache key: raise it whenever the embedded corpus would come out differently."""
TEXT_FILE_DOCUMENT = 4000
"""A .txt file is cut into documents at the first blank line after this many bytes."""
SHORTEST_EMBEDDED = 200
"""Characters below which a piece of documentation is too short to be a document."""
SUFFIXES = (".txt", ".jsonl", ".parquet")
SKIPPED_FOLDERS = {"test", "tests", "testing", "site-packages", "lib2to3", "idlelib", "_vendor"}
DOCSTRING_CALLS = {"add_docstr", "add_newdoc"}
"""How torch and numpy attach documentation to functions that are written in C."""


class Row(NamedTuple):
    """One row of a source: which of its files it stands in, where, and its text (None: not readable as text)."""

    file: int
    place: str
    text: str | None


def normalised(text: str) -> str:
    """Return `text` in Unicode NFC with every run of whitespace made one space: what makes two documents equal."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def text_hash(text: str) -> bytes:
    """Return the first 16 bytes of the SHA-256 of the normalised text, the key of deduplication and of the split."""
    return hashlib.sha256(normalised(text).encode()).digest()[:16]


def is_reserved(digest: bytes, fraction: float) -> bool:
    """Tell whether a document with this `text_hash` never trains, for a reserved share of `fraction` of all hashes."""
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def documents(data: Data) -> Iterator[str]:
    """Yield the readable texts of the source in order; see `rows`."""
    return (row.text for row in rows(data) if row.text is not None)


def rows(data: Data) -> Iterator[Row]:
    """Yield every row of the source, file by file in sorted order.

    Raises InputError naming the recipe key when the source, its files or its text column cannot be found.
    """
    if data.source == "embedded":
        return (Row(0, f"embedded:{number}", text) for number, text in enumerate(embedded_documents()))
    if data.path is None:
        raise InputError(f"`data.path` is empty, but data.source is {data.source}: name a path, a glob or a dataset")
    return _file_rows(data) if data.source == "files" else _dataset_rows(data)


# ---------------------------------------------------------------------------------------------------- local files


def _file_rows(data: Data) -> Iterator[Row]:
    for number, path in enumerate(find_files(str(data.path))):
        if path.suffix == ".txt":
            texts: Iterable[str | None] = _read_txt(path)
        elif path.suffix == ".jsonl":
            texts = _read_jsonl(path, data.text_column)
        else:
            texts = _read_parquet(path, data.text_column)
        for position, text in enumerate(texts):
            yield Row(number, f"{path}:{position}", text)


def find_files(pattern: str) -> list[Path]:
    """Return the text files of a path, a glob or a folder, sorted. Raises InputError naming `data.path`."""
    root = Path(pattern).expanduser()
    if root.is_dir():
        found = sorted(path for path in root.iterdir() if path.suffix in SUFFIXES)
    else:
        found = sorted(Path(name) for name in glob.glob(str(root), recursive=True))
    if not found:
        raise InputError(f"`data.path` is {pattern}: no file found there; it takes {', '.join(SUFFIXES)} or a folder")
    unknown = [str(path) for path in found if path.suffix not in SUFFIXES]
    if unknown:
        raise InputError(f"`data.path` is {pattern}: cannot read {unknown[0]}; files end in {', '.join(SUFFIXES)}")
    return found


def _decoded(raw: bytes) -> str | None:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _read_txt(path: Path) -> Iterator[str | None]:
    with path.open("rb") as file:
        pending = bytearray()
        for line in file:
            pending += line
            if not line.strip() and len(pending) >= TEXT_FILE_DOCUMENT:
                yield _text_document(pending)
                pending = bytearray()
        if pending.strip():
            yield _text_document(pending)


def _text_document(raw: bytearray) -> str | None:
    text = _decoded(bytes(raw).removeprefix(codecs.BOM_UTF8))
    return None if text is None else text.replace("\r\n", "\n").strip("\n")


def _read_jsonl(path: Path, column: str) -> Iterator[str | None]:
    with path.open("rb") as file:
        for number, line in enumerate(file):
            try:
                record: Any = json.loads(line.removeprefix(codecs.BOM_UTF8))
            except ValueError:  # not JSON, or not UTF-8
                record = None
            if number == 0:
                _require_column(column, list(record) if isinstance(record, dict) else [], path)
            text = record.get(column) if isinstance(record, dict) else None
            yield text if isinstance(text, str) else None


def _read_parquet(path: Path, column: str) -> Iterator[str | None]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            _require_column(column, file.schema_arrow.names, path)
            for batch in file.iter_batches(batch_size=1024, columns=[column]):
                # As bytes, so that one row of invalid UTF-8 is one rejected row and not the end of the file.
                for raw in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
                    yield None if raw is None else _decoded(raw)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"`data.path`: {path} cannot be read as parquet ({error}); fetch or write it again") from error


def _require_column(column: str, found: Iterable[str], place: Path | str) -> None:
    names = list(found)
    if column not in names:
        raise InputError(f"`data.text_column` is {column}, but {place} has {', '.join(names) or 'no columns'}")


# ---------------------------------------------------------------------------------------------------- Hub datasets


def _dataset_rows(data: Data) -> Iterator[Row]:
    import datasets

    name = str(data.path)
    try:
        stream = datasets.load_dataset(
            name, data_files=data.files, revision=data.revision, split="train", streaming=True
        )
    except Exception as error:  # the Hub client, its transport and the builders share no base class
        raise InputError(
            f"`data.path` is {name} (data.files {data.files}, data.revision {data.revision}), which `datasets` cannot "
            f"open: {type(error).__name__}: {error}. Check the spelling and the network, or use data.source: files"
        ) from error
    for number in range(stream.num_shards):
        for position, record in enumerate(stream.shard(num_shards=stream.num_shards, index=number)):
            if position == 0:
                _require_column(data.text_column, record, name)
            text = record[data.text_column]
            yield Row(number, f"{name} file {number}:{position}", text if isinstance(text, str) else None)


# ------------------------------------------------------------------------------------------------- embedded corpus


def embedded_documents() -> list[str]:
    """Return the documentation of the standard library, numpy and torch: one document per module, class or topic.

    About 10 MB, deduplicated, in the order of package and path. It is kept in a cache below $XDG_CACHE_HOME; a cache
    that is damaged, or cannot be written, only costs the time to read the sources again.
    """
    roots = _package_roots()
    versions = [platform.python_version()] + [importlib.metadata.version(name) for name in ("numpy", "torch")]
    key = json.dumps([READER_VERSION, versions, [str(root) for root in roots.values()]])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "overnight"
    cache /= f"embedded-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    texts = _load_cache(cache)
    if texts is None:
        texts = _read_packages(roots)
        _save_cache(cache, texts)
    return texts


def _package_roots() -> dict[str, Path]:
    roots = {"": Path(sysconfig.get_path("stdlib"))}
    for name in ("numpy", "torch"):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise InputError(f"`data.source` is embedded, but {name} is not installed: pip install {name}")
        roots[name] = Path(spec.origin).parent
    return roots


def _read_packages(roots: dict[str, Path]) -> list[str]:
    sources = [
        (root, package, path)
        for package, root in roots.items()
        for path in sorted(root.rglob("*.py"))
        if SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts)
    ]
    # Forked: a spawned worker would import the caller's script, and with it torch, before it reads a line. The garbage
    # collector is off in the workers: syntax trees have no cycles, and it would walk all that the caller has loaded.
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=fork, initializer=gc.disable) as pool:
        read = pool.map(_read_module, *zip(*sources, strict=True), chunksize=16)
        unique = {text_hash(text): text for texts in read for text in texts if len(text) >= SHORTEST_EMBEDDED}
    return list(unique.values())


def _read_module(root: Path, package: str, path: Path) -> list[str]:
    try:
        with warnings.catch_warnings():  # invalid escapes in the sources are not our reader's to report
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # templates that are not Python yet
        return []
    parts = [part for part in (package, *path.relative_to(root).with_suffix("").parts) if part not in ("", "__init__")]
    if parts == ["pydoc_data", "topics"]:
        return _strings_of_dict(tree)
    return _described(".".join(parts), tree) + [_attached(call) for call in _docstring_calls(tree)]


def _described(name: str, node: ast.Module | ast.ClassDef) -> list[str]:
    """The document of a module or class and those of the classes in it, docstrings below the names they explain."""
    functions = [child for child in node.body if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)]
    pieces = [(f"{child.name}({_arguments(child)})", ast.get_docstring(child)) for child in functions]
    texts = [f"{title}\n\n{text}" for title, text in [(name, ast.get_docstring(node)), *pieces] if text]
    classes = [child for child in node.body if isinstance(child, ast.ClassDef)]
    return ["\n\n".join(texts)] + [text for child in classes for text in _described(f"{name}.{child.name}", child)]


def _arguments(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return ", ".join(name for name in names if name not in ("self", "cls"))


def _docstring_calls(tree: ast.Module) -> list[ast.Call]:
    calls = [node.value for node in tree.body if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)]
    return [call for call in calls if isinstance(call.func, ast.Name) and call.func.id in DOCSTRING_CALLS]


def _attached(call: ast.Call) -> str:
    text = "\n".join(inspect.cleandoc(text) for argument in call.args[1:] for text in _strings(argument))
    return re.sub(r"^ *\{\w+\}\n", "", text, flags=re.MULTILINE)  # parts that torch fills in from a table


def _strings_of_dict(tree: ast.Module) -> list[str]:
    dicts = [node for node in ast.walk(tree) if isinstance(node, ast.Dict)]
    return [inspect.cleandoc(text) for node in dicts for value in node.values for text in _strings(value)]


def _strings(node: ast.AST) -> list[str]:
    constants = [child for child in ast.walk(node) if isinstance(child, ast.Constant) and isinstance(child.value, str)]
    return [str(child.value) for child in sorted(constants, key=lambda child: (child.lineno, child.col_offset))]


def _load_cache(path: Path) -> list[str] | None:
    try:
        checksum, body = path.read_bytes().split(b"\n", 1)
    except (OSError, ValueError):
        return None
    return json.loads(body) if hashlib.sha256(body).hexdigest().encode() == checksum else None


def _save_cache(path: Path, texts: list[str]) -> None:
    body = json.dumps(texts).encode()
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
        partial.replace(path)
    except OSError:  # a full disk or a read-only home: the next run reads the sources again
        with contextlib.suppress(OSError):
            partial.unlink()
