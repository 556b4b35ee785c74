"""What a document is: the rows of one text file, and the key by which equal texts are known and sides are chosen."""

from __future__ import annotations

import codecs
import hashlib
import json
import math
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from overnight.errors import DamagedData, InputError

SUFFIXES = (".txt", ".jsonl", ".parquet")
TEXT_FILE_DOCUMENT = 4000
"""A .txt file is cut into documents at the first blank line after this many bytes."""
LONGEST_ROW = 8 * 2**20
"""Bytes of a row above which it is rejected: no page of the web has that many, and memory stays bounded."""
PARQUET_BUFFER = 2**22
SPACE = 32
ASCII_SPACES = bytes(SPACE if chr(code).isspace() and code < 128 else code for code in range(256))
"""For bytes.translate: makes a space of what str.split takes for one."""
NOT_TEXT, TOO_LONG = "no UTF-8 text", f"over {LONGEST_ROW >> 20} MiB"


class SourceRow(NamedTuple):
    """One row of a file: its text or else why it has none, and how much of the file was read with it (0 to 1)."""

    text: str | None
    rejected: str
    share: float


def normalised_text(text: str) -> str:
    """Return `text` in Unicode NFC with every run of whitespace made one space: what makes two documents equal."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def text_hash(text: str) -> bytes:
    """Return the first 16 bytes of the SHA-256 of the normalised text, the key of deduplication and of the split."""
    raw = _normalised_ascii(text) if text.isascii() else normalised_text(text).encode()
    return hashlib.sha256(raw).digest()[:16]


def _normalised_ascii(text: str) -> bytes:
    """`normalised_text` for text in which nothing composes, without cutting it into words."""
    raw = text.encode().translate(ASCII_SPACES)
    if b"  " in raw:
        codes = np.frombuffer(raw, np.uint8)
        kept = codes != SPACE
        kept[1:] |= kept[:-1].copy()  # of a run of spaces the first
        raw = codes[kept].tobytes()
    return raw.strip(b" ")


def first_training_key(fraction: float) -> int:
    """Return the smallest number that the first 8 bytes of a key may have, big-endian, for its document to train.

    All documents below are reserved: a share of `fraction` of all hashes.
    """
    return math.ceil(fraction * 2**64)


def is_reserved(digest: bytes, fraction: float) -> bool:
    """Tell whether a document with this `text_hash` never trains, for a reserved share of `fraction` of all hashes."""
    return int.from_bytes(digest[:8], "big") < first_training_key(fraction)


def rows(path: Path, suffix: str, column: str, name: str) -> Iterator[SourceRow]:
    """Yield every row of the file at `path`, in order; `suffix` is its format and `name` what messages call it.

    Raises InputError naming `data.text_column` when there is no such column, and DamagedData when the file cannot be
    decoded to its end; a single row that is no text is a row like the others.
    """
    read = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}[suffix]
    for raw, share in read(path, column, name):
        if raw is None:
            yield SourceRow(None, NOT_TEXT, share)
        elif len(raw) > LONGEST_ROW:
            yield SourceRow(None, TOO_LONG, share)
        else:
            text = _decoded(raw)
            yield SourceRow(text, "" if text is not None else NOT_TEXT, share)


def _decoded(raw: bytes) -> str | None:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return None


Raw = Iterator[tuple[bytes | None, float]]
"""Rows as they stand in a file, None where there is nothing, each with the share of the file that was read."""


def _lines(path: Path) -> Iterator[tuple[bytes, float]]:
    """The lines of a file with the share read; of a line over LONGEST_ROW only so much that it is seen to be that."""
    size = path.stat().st_size
    with path.open("rb") as file:
        while line := file.readline(LONGEST_ROW + 1):
            rest = line
            while len(rest) > LONGEST_ROW and not rest.endswith(b"\n"):
                rest = file.readline(LONGEST_ROW + 1)
            yield line, file.tell() / size


def _read_txt(path: Path, column: str, name: str) -> Raw:
    pending, share = bytearray(), 0.0
    for line, share in _lines(path):
        pending += line[: LONGEST_ROW + 1]
        if (not line.strip() and len(pending) >= TEXT_FILE_DOCUMENT) or len(pending) > LONGEST_ROW:
            yield _text_document(pending), share
            pending = bytearray()
    if pending.strip():
        yield _text_document(pending), share


def _text_document(raw: bytearray) -> bytes:
    return bytes(raw).removeprefix(codecs.BOM_UTF8).replace(b"\r\n", b"\n").strip(b"\n")


def _read_jsonl(path: Path, column: str, name: str) -> Raw:
    for number, (line, share) in enumerate(_lines(path)):
        if len(line) > LONGEST_ROW:
            yield line, share
            continue
        try:
            record: Any = json.loads(line.removeprefix(codecs.BOM_UTF8))
        except ValueError:  # not JSON, or not UTF-8
            record = None
        if number == 0:
            _require_column(column, list(record) if isinstance(record, dict) else [], name)
        text = record.get(column) if isinstance(record, dict) else None
        # Back to bytes: JSON can spell a lone surrogate, which UTF-8 cannot.
        yield (text.encode("utf-8", "surrogatepass") if isinstance(text, str) else None), share


def _read_parquet(path: Path, column: str, name: str) -> Raw:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(
            path, page_checksum_verification=True, buffer_size=PARQUET_BUFFER, pre_buffer=False
        ) as file:
            _require_column(column, file.schema_arrow.names, name)
            kind, read = file.schema_arrow.field(column).type, 0
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise InputError(f"`data.text_column` is {column}, but {name} has {kind} there; text would work")
            for batch in file.iter_batches(batch_size=256, columns=[column], use_threads=False):
                # As bytes, so that one row of invalid UTF-8 is one rejected row and not the end of the file.
                for raw in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
                    read += 1
                    yield raw, read / file.metadata.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise DamagedData(f"{name} cannot be read as parquet ({error}); fetch or write it again") from error


def _require_column(column: str, found: Iterable[str], name: str) -> None:
    names = list(found)
    if column not in names:
        raise InputError(f"`data.text_column` is {column}, but {name} has {', '.join(names) or 'no columns'}")
