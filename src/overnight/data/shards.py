"""The token-shard format: write it, verify it, read it.

A `.ds` file is raw little-endian uint16 token ids (uint32 when the vocabulary is over 65,536) and its `.ds.index` the
cumulative document ends as little-endian uint64: what datatrove's DocumentTokenizer writes. The manifest beside the
`train` and `val` folders (manifest.py) records size and SHA-256 of every file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from overnight.core import files
from overnight.data.batches import Split
from overnight.data.encoder import json_fingerprint
from overnight.data.manifest import MANIFEST, FileRecord, Manifest, named_file, narrowed, read_manifest
from overnight.errors import DamagedData

TOKENS_PER_FILE = 100_000_000
TOKENS_AT_ONCE = 16_000_000
"""What is held in memory while token files are read or copied from end to end."""
Ids = Sequence[int] | np.ndarray


class SplitWriter:
    """Writes one side of the data as numbered shards of about TOKENS_PER_FILE tokens, up to `limit` tokens.

    The caller ends each document with the end-of-text token. The document that crosses the limit is cut there and
    does not end with it. The files have their names at once: the folder around them gets its own when all is whole.
    """

    def __init__(self, folder: Path, vocab_size: int, limit: int | None):
        self.folder, self.vocab_size, self.limit = folder, vocab_size, limit
        self.records: list[FileRecord] = []
        self.tokens = 0
        self._file: BinaryIO | None = None
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def full(self) -> bool:
        """Whether the limit is reached."""
        return self.tokens == self.limit

    def write(self, ids: Ids, lengths: Ids | None = None) -> None:
        """Append documents: their ids one after the other, and the tokens of each; without `lengths` it is one.

        Raises ValueError when an id is not in [0, vocab_size). A `full` side takes no more.
        """
        tokens = np.asarray(ids)
        sizes = np.asarray([len(tokens)] if lengths is None else lengths, dtype=np.int64)
        if self.limit is not None and self.tokens + len(tokens) > self.limit:
            tokens, sizes = _cut(tokens, sizes, self.limit - self.tokens)
        while len(sizes):
            file = self._open()
            ends = self._in_file + np.cumsum(sizes)
            whole = int(np.searchsorted(ends, TOKENS_PER_FILE)) + 1  # documents of this file
            here = int(sizes[:whole].sum())
            raw = narrowed(tokens[:here], self.vocab_size, self._path).tobytes()
            file.write(raw)
            self._sha256.update(raw)
            self._ends.append(ends[:whole])
            self._in_file += here
            self.tokens += here
            tokens, sizes = tokens[here:], sizes[whole:]
            if self._in_file >= TOKENS_PER_FILE:
                self.close()

    def _open(self) -> BinaryIO:
        """The shard being written, or the next one."""
        if self._file is None:
            self._path = self.folder / f"{len(self.records):05d}.ds"
            self._file = self._path.open("wb")
            self._in_file, self._sha256 = 0, hashlib.sha256()
            self._ends: list[np.ndarray] = []
        return self._file

    def close(self) -> None:
        """Finish the shard being written: its index and its record."""
        if self._file is None:
            return
        self._file.close()
        self._file = None
        index = np.concatenate(self._ends).astype("<u8").tobytes()
        self._path.with_name(f"{self._path.name}.index").write_bytes(index)
        self.records.append(
            FileRecord(
                path=f"{self.folder.name}/{self._path.name}",
                tokens=self._in_file,
                documents=len(index) // 8,
                bytes=self._path.stat().st_size,
                sha256=self._sha256.hexdigest(),
                index_sha256=hashlib.sha256(index).hexdigest(),
            )
        )


def _cut(tokens: np.ndarray, sizes: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `room` tokens of documents, the last of them cut there."""
    whole = int(np.searchsorted(np.cumsum(sizes), room)) + 1
    kept = sizes[:whole].copy()
    kept[-1] -= kept.sum() - room
    return tokens[:room], kept


@dataclass(frozen=True)
class Shards:
    """A prepared folder, opened; the tokenizer's files are in `folder / "tokenizer"`."""

    folder: Path
    manifest: Manifest
    train: Split
    val: Split


def open_shards(folder: str | Path, *, verify: bool = True, manifest: Manifest | None = None) -> Shards:
    """Open a prepared folder, hashing every file unless `verify` is False (then only sizes are compared).

    Its `manifest` is read where it was not before.

    Raises InputError when the folder or its manifest is missing, and DamagedData naming each file that differs.
    """
    folder = Path(folder)
    manifest = _checked(folder, manifest or read_manifest(folder), hashed=verify)
    train, val = (Split(folder, records, manifest.dtype) for records in (manifest.train, manifest.val))
    return Shards(folder, manifest, train, val)


def verify(folder: str | Path) -> Manifest:
    """Hash every file of a prepared folder against its manifest, which is returned. Raises as `open_shards` does."""
    return _checked(Path(folder), read_manifest(Path(folder)), hashed=True)


def _checked(folder: Path, manifest: Manifest, *, hashed: bool) -> Manifest:
    """The manifest of a folder whose files have its sizes, and its checksums where they are to be `hashed`."""
    problems = []
    for record in (*manifest.val, *manifest.train):
        path, index = (named_file(folder, record.path + end) for end in ("", ".index"))
        problems += _differences(path, record.bytes, record.sha256 if hashed else None)
        problems += _differences(index, record.documents * 8, record.index_sha256 if hashed else None)
    problems += tokenizer_problems(folder, manifest)
    if problems:
        raise DamagedData(problems)
    return manifest


def tokenizer_problems(folder: Path, manifest: Manifest) -> list[str]:
    """What of the tokenizer in a prepared folder is not what it was written as."""
    tokenizer, sums = folder / "tokenizer", manifest.tokenizer.files
    if sums is not None:
        return [
            each for name in sums for each in _differences(named_file(folder, f"tokenizer/{name}"), None, sums[name])
        ]
    try:  # an older version kept what defines the ids alone
        found = json_fingerprint((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        return [f"{tokenizer}/tokenizer.json: cannot be read ({error})"]
    named = manifest.tokenizer.sha256
    return [] if found == named else [f"{tokenizer}/tokenizer.json: SHA-256 {found}, but {MANIFEST} names {named}"]


def _differences(path: Path, size: int | None, sha256: str | None) -> list[str]:
    if not path.is_file():
        return [f"{path}: no file found, but {MANIFEST} names it"]
    if size is not None and path.stat().st_size != size:
        return [f"{path}: {path.stat().st_size} bytes, but {MANIFEST} names {size}"]
    if sha256 is None:
        return []
    found = files.sha256(path)
    return [] if found == sha256 else [f"{path}: SHA-256 {found}, but {MANIFEST} names {sha256}"]
