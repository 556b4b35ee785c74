"""What a document is: the rows of one text file, and the key by which equal texts are known and sides are chosen."""

from __future__ import annotations

import codecs
import hashlib
import io
import json
import math
import re
import unicodedata
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from overnight.errors import DamagedData, InputError

TEXT_FILE_DOCUMENT, LONGEST_PIECE = 4000, 100_000
"""A .txt file is cut into documents at the first blank line after so many bytes; where none comes in time, at the end
of a line, and in a line without an end at a space."""
LONGEST_ROW = 8 * 2**20
"""Bytes of a row above which it is rejected: no page of the web has that many, and memory stays bounded."""
PARQUET_BUFFER = 2**22
SPACE = 32
ASCII_SPACES = bytes(SPACE if chr(code).isspace() and code < 128 else code for code in range(256))
"""For bytes.translate: makes a space of what str.split takes for one."""
NOT_UTF8, NOT_JSON, NO_TEXT, TOO_LONG = (
    "no UTF-8 text",
    "no JSON",
    "no text there",
    f"over {LONGEST_ROW >> 20} MiB",
)
EMPTY, DUPLICATE = "empty", "duplicate"
REASONS = (NOT_UTF8, NOT_JSON, NO_TEXT, TOO_LONG, EMPTY, DUPLICATE)
"""Why a row is not used."""
COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
LONG_RUN = 64
"""Combining characters in a row that are put in order before Python normalises them."""


class SourceRow(NamedTuple):
    """One row of a file: its text, why it is not used, how much of the file was read with it (0 to 1), and its key.

    Only a row with a text has a key, and that from `keyed` on.
    """

    text: str
    rejected: str
    share: float
    key: bytes = b""


FORMATS = ".txt, .jsonl (both also .gz, .bz2, .zst), .parquet"


def format_of(name: str) -> str | None:
    """The format of a file or URL that can be read, by the end of its name: `.jsonl`, `.txt.gz`; None for any other."""
    path = name.split("?")[0].split("#")[0] if "://" in name else name
    found = re.search(r"(\.txt|\.jsonl)(\.gz|\.bz2|\.zst)?$|\.parquet$", path, re.IGNORECASE)
    return found[0].lower() if found else None


def normalised_text(text: str) -> str:
    """Return `text` in Unicode NFC with every run of whitespace made one space: what makes two documents equal."""
    if not _marks().isdisjoint(text[::LONG_RUN]):  # it may have a run of them so long
        text = re.sub(f"[{''.join(_marks())}]{{{LONG_RUN},}}", lambda run: _canonical_order(run[0]), text)
    return " ".join(unicodedata.normalize("NFC", text).split())


@lru_cache(maxsize=1)
def _marks() -> frozenset[str]:
    """Combining characters: for many in a row Python's time grows with their square (python/cpython issue 149079)."""
    candidates = map(chr, range(0x300, 0x1F000))  # there is none outside of these
    return frozenset(each for each in candidates if unicodedata.combining(unicodedata.normalize("NFD", each)[0]))


def _canonical_order(marks: str) -> str:
    """Combining characters in the order that each normal form has; what they are normalised to stays the same."""
    apart = "".join(unicodedata.normalize("NFD", mark) for mark in marks)
    return "".join(sorted(apart, key=unicodedata.combining))


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


def rows(path: Path, form: str, column: str, name: str) -> Iterator[SourceRow]:
    """Yield every row of the file at `path`, in order; `form` is its `format_of`, `name` what messages call it.

    Raises InputError naming `data.text_column` when there is no such column, and DamagedData when the file cannot be
    decoded to its end; a single row that is no text is a row like the others.
    """
    found = _read_parquet(path, column, name) if form == ".parquet" else _read_text(path, form, column, name)
    for raw, share in found:
        if isinstance(raw, str):
            yield SourceRow("", raw, share)
        elif len(raw) > LONGEST_ROW:
            yield SourceRow("", TOO_LONG, share)
        else:
            try:
                yield SourceRow(raw.decode("utf-8"), "", share)
            except UnicodeDecodeError:
                yield SourceRow("", NOT_UTF8, share)


def keyed(found: Iterable[SourceRow], seen: set[bytes]) -> Iterator[SourceRow]:
    """Give each row with a text its key, mark those that are empty or `seen` before, and note the key there."""
    for row in found:
        if row.rejected:
            yield row
            continue
        key = text_hash(row.text)
        rejected = EMPTY if not row.text.strip() else DUPLICATE if key in seen else ""
        seen.add(key)
        yield row._replace(rejected=rejected, key=key)


Raw = bytes | str
"""A row as it stands in a file, or why there is none."""


def _read_text(path: Path, form: str, column: str, name: str) -> Iterator[tuple[Raw, float]]:
    """The rows of a .txt or .jsonl file with the share of it that was read, unpacked on the way."""
    kind, packing = re.findall(r"\.\w+", f"{form}.plain")[:2]
    try:
        with path.open("rb") as file:
            stream = file if packing == ".plain" else _unpacked(file, packing)
            for raw in _text_pieces(stream) if kind == ".txt" else _json_rows(stream, column, name):
                yield raw, file.tell() / path.stat().st_size
    except OSError as error:
        if packing == ".plain":
            raise
        raise DamagedData(f"{name} cannot be unpacked to its end ({error}); fetch or write it again") from error


def _unpacked(file: BinaryIO, packing: str) -> BinaryIO:
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(file, COMPRESSED[packing]))


def _text_pieces(file: BinaryIO) -> Iterator[bytes]:
    pending = bytearray()
    while line := file.readline(LONGEST_PIECE):
        pending += line
        ends = len(pending) if len(pending) >= TEXT_FILE_DOCUMENT and not line.strip() else 0
        if not ends and len(pending) >= LONGEST_PIECE:
            ends = _last_break(pending)
        if ends:
            yield _text_document(pending[:ends])
            del pending[:ends]
    if pending.strip():
        yield _text_document(pending)


def _last_break(text: bytearray) -> int:
    """Behind its last line, else its last word, else its last whole character: where a long text may be cut."""
    found = next((at for mark in (b"\n", b" ") if (at := text.rfind(mark) + 1) >= TEXT_FILE_DOCUMENT), len(text))
    while 0 < found < len(text) and text[found] & 0xC0 == 0x80:
        found -= 1
    return found


def _text_document(raw: bytearray) -> bytes:
    return bytes(raw).removeprefix(codecs.BOM_UTF8).replace(b"\r\n", b"\n").strip(b"\n")


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file that hold something; of one over LONGEST_ROW only so much that it is seen to be that."""
    while line := file.readline(LONGEST_ROW + 1):
        rest = line
        while len(rest) > LONGEST_ROW and not rest.endswith(b"\n"):
            rest = file.readline(LONGEST_ROW + 1)
        line = line.removeprefix(codecs.BOM_UTF8)
        if line.strip():
            yield line


def _json_rows(file: BinaryIO, column: str, name: str) -> Iterator[Raw]:
    """Each line's text; the first of them may lack the column, not all."""
    other: set[str] | None = None  # what the first row has, as long as none has the column
    for line in _lines(file):
        if len(line) > LONGEST_ROW:
            yield line
            continue
        try:
            record: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield NOT_UTF8 if isinstance(error, UnicodeDecodeError) else NOT_JSON
            continue
        if not isinstance(record, dict):
            yield NO_TEXT
            continue
        if column in record:
            other = set()
        elif other is None:
            other = set(record)
        text = record.get(column)
        # Back to bytes: JSON can spell a lone surrogate, which UTF-8 cannot.
        yield text.encode("utf-8", "surrogatepass") if isinstance(text, str) else NO_TEXT
    if other:
        _require_column(column, sorted(other), name)


def looks_like(path: Path, form: str) -> str | None:
    """What iconv calls the encoding of a .txt or .jsonl file that is not UTF-8; None when its head is unclear."""
    if form not in (".txt", ".jsonl"):
        return None
    with path.open("rb") as file:
        head = file.read(LONGEST_ROW)
    zeros = head.count(b"\0")
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    if zeros > len(head) / 4:
        return "UTF-16LE" if head[1::2].count(b"\0") > zeros / 2 else "UTF-16BE"
    return "WINDOWS-1252" if re.search(rb"[A-Za-z][\xc0-\xff][a-z]", head) else None  # a letter among letters


def _read_parquet(path: Path, column: str, name: str) -> Iterator[tuple[Raw, float]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(
            path, page_checksum_verification=True, buffer_size=PARQUET_BUFFER, pre_buffer=False
        ) as file:
            _require_column(column, file.schema_arrow.names, name)
            _require_text(file.schema_arrow.field(column).type, column, name)
            read = 0
            for batch in file.iter_batches(batch_size=256, columns=[column], use_threads=False):
                # As bytes, so that one row of invalid UTF-8 is one rejected row and not the end of the file.
                for raw in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
                    read += 1
                    yield NO_TEXT if raw is None else raw, read / file.metadata.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise DamagedData(f"{name} cannot be read as parquet ({error}); fetch or write it again") from error


def _require_column(column: str, names: list[str], name: str) -> None:
    if column not in names:
        raise InputError(f"`data.text_column` is {column}, but {name} has {', '.join(names) or 'no columns'}")
    if names.count(column) > 1:
        raise InputError(f"`data.text_column` is {column}, which {name} has {names.count(column)} times; rename one")


def _require_text(kind: Any, column: str, name: str) -> None:
    """Raise InputError unless the values of an Arrow type are text or bytes, plain or by a dictionary."""
    from pyarrow import types

    values = kind.value_type if types.is_dictionary(kind) else kind
    forms = (types.is_string, types.is_large_string, types.is_string_view, types.is_binary, types.is_large_binary)
    if not any(is_form(values) for is_form in forms):
        raise InputError(f"`data.text_column` is {column}, but {name} has {kind} there; text would work")
