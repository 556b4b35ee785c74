"""Documents to verified token shards: deduplicate, split by text, tokenise, write, and name the folder when whole."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerFast

from overnight import shards
from overnight.corpus import Row, is_reserved, rows, text_hash
from overnight.files import sync
from overnight.recipe import DamagedData, Data, InputError
from overnight.shards import Manifest, SourceRecord, SplitRule, SplitWriter
from overnight.tokenizer import encode, fingerprint, load_tokenizer, train_tokenizer

BATCH_CHARACTERS = 4_000_000
"""Text handed to the tokenizer at once: enough to keep every core busy, little enough to hold."""
TOKENIZER_CHARACTERS = 50_000_000
"""A tokenizer is trained on the first training documents, up to this much text."""
MOST_UNREADABLE = 0.01
"""Share of rows that are no text above which the source is taken to be damaged."""
SECONDS_BETWEEN_REPORTS = 10
CHARACTERS_PER_TOKEN = 4.61
"""GPT-2's vocabulary on FineWeb-Edu."""
TOKENIZER_BYTES_PER_SECOND = 1.2e6
"""`tokenizers` on English text, measured per core of a slow cloud machine."""
SOURCE_KEYS = {"source", "path", "files", "revision", "text_column"}
SPLIT_KEYS = {"reserved_fraction", "val_tokens", "train_tokens"}
"""With the tokenizer and the vocabulary, what a prepared folder must agree in to serve a recipe."""


class Item(NamedTuple):
    """A document that survived: the file it stands in, the hash of its text, the text, and whether it never trains."""

    file: int
    digest: bytes
    text: str
    reserved: bool


class Reader:
    """One pass over a source: keeps the first of equal documents, names their sides, counts and hashes what it read."""

    def __init__(self, data: Data):
        self.data = data
        self.counts: Counter[str] = Counter()
        self.sha256 = hashlib.sha256()
        self._seen: set[bytes] = set()

    def items(self) -> Iterator[Item]:
        """Yield the surviving documents in order. Raises DamagedData when too many rows are no text."""
        for row in rows(self.data):
            self.counts["rows"] += 1
            if (item := self._item(row)) is not None:
                yield item
        if self.counts["unreadable"] > MOST_UNREADABLE * self.counts["rows"]:
            raise DamagedData(
                f"`data.path` is {self.data.path}: {self.counts['unreadable']:,} of {self.counts['rows']:,} rows hold "
                f"no UTF-8 text in {self.data.text_column}, first {self.first_unreadable}; fetch or write it again"
            )

    def _item(self, row: Row) -> Item | None:
        try:
            raw = (row.text or "").encode()
        except UnicodeEncodeError:  # a lone surrogate, which JSON can spell and UTF-8 cannot
            row = row._replace(text=None)
        if row.text is None:
            if not self.counts["unreadable"]:
                self.first_unreadable = row.place
            self.counts["unreadable"] += 1
            return None
        self.sha256.update(len(raw).to_bytes(8, "little") + raw)
        self.counts.update(documents=1, characters=len(row.text), bytes=len(raw))
        digest = text_hash(row.text)
        if not row.text.strip() or digest in self._seen:
            self.counts["duplicates" if row.text.strip() else "empty"] += 1
            return None
        self._seen.add(digest)
        return Item(row.file, digest, row.text, is_reserved(digest, self.data.reserved_fraction))


def prepare(data: Data, vocab_size: int, report: Callable[[str], None] = print) -> Manifest:
    """Write the token shards of `data` into `data.dir` and return their manifest.

    The folder is built under another name and renamed when it is whole; equal inputs give equal bytes. A folder that
    already holds what is asked for is verified and returned. Raises InputError naming the recipe key for what cannot be
    read, does not fit or falls short, and DamagedData for a folder or source that is not what it should be.
    """
    folder = Path(data.dir)
    if shards.is_prepared(folder):
        _require_same_request(folder, data, vocab_size)
        report(f"{folder}: already prepared; verifying it")
        return shards.verify(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"`data.dir` is {folder}, which holds other files and no {shards.MANIFEST}: name a new folder")
    with _building(folder) as partial:
        manifest = _build(partial, data, vocab_size, report)
    report(f"{folder}: {_tokens(manifest.train):,} training and {_tokens(manifest.val):,} validation tokens")
    return manifest


@contextmanager
def _building(folder: Path) -> Iterator[Path]:
    """Lend an empty folder beside `folder` to one process; it gets that name if the block ends well, else goes away."""
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"`data.dir` is {folder}: another process is preparing it; wait for it to end") from None
        try:
            _empty(partial)  # of what a killed process left
            yield partial
            for path in (partial, *partial.rglob("*")):
                sync(path)
            partial.rename(folder)
            sync(folder.parent)
        except BaseException:
            shutil.rmtree(partial)
            raise
    finally:
        os.close(lock)


def _build(folder: Path, data: Data, vocab_size: int, report: Callable[[str], None]) -> Manifest:
    tokenizer = _tokenizer(data, vocab_size, report)
    tokenizer.save_pretrained(folder / "tokenizer")
    reader = Reader(data)
    val = SplitWriter(folder / "val", vocab_size, data.val_tokens)
    train = SplitWriter(folder / "train", vocab_size, data.train_tokens)
    _write_sides(reader, tokenizer, val, train, report)
    _require_enough(data, val.tokens, train.tokens)
    val.close()
    train.close()
    return _write_manifest(folder, data, tokenizer, reader, val, train)


def _tokenizer(data: Data, vocab_size: int, report: Callable[[str], None]) -> PreTrainedTokenizerFast:
    if data.tokenizer == "trained":
        report(f"training a tokenizer of {vocab_size:,} entries on the training documents")
        return train_tokenizer(_tokenizer_texts(data), vocab_size)
    tokenizer = load_tokenizer(data.tokenizer)
    if len(tokenizer) != vocab_size:
        raise InputError(
            f"`model.vocab_size` is {vocab_size}, but the tokenizer {data.tokenizer} has {len(tokenizer)} entries: "
            f"use {len(tokenizer)}"
        )
    return tokenizer


def _tokenizer_texts(data: Data) -> Iterator[str]:
    left = TOKENIZER_CHARACTERS
    for item in Reader(data).items():
        if not item.reserved:
            yield item.text
            left -= len(item.text)
            if left <= 0:
                return


def _write_sides(
    reader: Reader,
    tokenizer: PreTrainedTokenizerFast,
    val: SplitWriter,
    train: SplitWriter,
    report: Callable[[str], None],
) -> None:
    """Write both sides, one source file after the other, until both budgets are met or the source ends.

    Validation takes the reserved documents of the first file in the order of their hashes, and those of a later file
    only when the files before it did not suffice: files that are added at the end change nothing of it.
    """
    progress = Progress(reader, train, report)
    for _, items in groupby(reader.items(), key=attrgetter("file")):
        reserved: list[Item] = []
        for batch in _batches(items):
            reserved += [item for item in batch if item.reserved and not val.full]
            reader.counts["reserved"] += sum(item.reserved for item in batch)
            training = [item for item in batch if not item.reserved]
            reader.counts["train"] += len(training)
            _write(training, tokenizer, train)
            progress.tick()
            if train.full and val.full:
                return
        for batch in _batches(sorted(reserved, key=attrgetter("digest"))):
            _write(batch, tokenizer, val)
        if train.full and val.full:
            return


def _batches(items: Iterable[Item]) -> Iterator[list[Item]]:
    batch: list[Item] = []
    characters = 0
    for item in items:
        batch.append(item)
        characters += len(item.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _write(items: list[Item], tokenizer: PreTrainedTokenizerFast, writer: SplitWriter) -> None:
    if writer.full:
        return
    for ids in encode(tokenizer, [item.text for item in items]):
        if writer.full:
            return
        writer.write([*ids, tokenizer.eos_token_id])


class Progress:
    """Says every few seconds how far the reading has come."""

    def __init__(self, reader: Reader, train: SplitWriter, report: Callable[[str], None]):
        self.reader, self.train, self.report = reader, train, report
        self.started = self.last = time.monotonic()

    def tick(self) -> None:
        """Report documents, tokens and speed, if it is time to."""
        now = time.monotonic()
        if now - self.last < SECONDS_BETWEEN_REPORTS:
            return
        self.last = now
        read, tokens = self.reader.counts, self.train.tokens
        budget = f" of {self.train.limit:,}" if self.train.limit else ""
        speed = read["bytes"] / 1e6 / (now - self.started)
        self.report(f"{read['documents']:,} documents, {tokens:,}{budget} training tokens, {speed:.1f} MB/s")


def _require_enough(data: Data, val_tokens: int, train_tokens: int) -> None:
    problems = []
    if val_tokens < data.val_tokens:
        problems.append(
            f"`data.val_tokens` is {data.val_tokens:,}, but the reserved documents hold {val_tokens:,} tokens, "
            f"{data.val_tokens - val_tokens:,} short: use at most {val_tokens}, more text, or a "
            f"data.reserved_fraction above {data.reserved_fraction}"
        )
    if train_tokens < (data.train_tokens or 1):
        wanted = data.train_tokens or 1
        problems.append(
            f"`data.train_tokens` is {wanted:,}, but the training documents hold {train_tokens:,} tokens, "
            f"{wanted - train_tokens:,} short: use at most {train_tokens}, or more text in data.path or data.files"
        )
    if problems:
        raise InputError(problems)


def _write_manifest(
    folder: Path,
    data: Data,
    tokenizer: PreTrainedTokenizerFast,
    reader: Reader,
    val: SplitWriter,
    train: SplitWriter,
) -> Manifest:
    counts = reader.counts
    written = {"reserved": _documents(val.records), "train": _documents(train.records)}
    manifest = Manifest(
        tokenizer=shards.TokenizerRecord(name=data.tokenizer, sha256=fingerprint(tokenizer)),
        vocab_size=len(tokenizer),
        eos_id=tokenizer.eos_token_id,
        dtype=shards.dtype_for(len(tokenizer)),
        source=SourceRecord.model_validate(
            data.model_dump(include=SOURCE_KEYS | {"licence"})
            | {name: counts[name] for name in ("documents", "characters", "bytes")}
        ),
        corpus_sha256=reader.sha256.hexdigest(),
        split=SplitRule(**data.model_dump(include=SPLIT_KEYS)),
        val=val.records,
        train=train.records,
        counts=shards.Counts(
            duplicates=counts["duplicates"],
            reserved_unused=counts["reserved"] - written["reserved"],
            empty=counts["empty"],
            unreadable=counts["unreadable"],
            after_budget=counts["train"] - written["train"],
        ),
    )
    (folder / shards.MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return manifest


def _require_same_request(folder: Path, data: Data, vocab_size: int) -> None:
    manifest = shards.read_manifest(folder)
    held = manifest.source.model_dump(include=SOURCE_KEYS) | manifest.split.model_dump(include=SPLIT_KEYS)
    held = {f"data.{key}": value for key, value in held.items()}
    held |= {"data.tokenizer": manifest.tokenizer.name, "model.vocab_size": manifest.vocab_size}
    asked = {f"data.{key}": value for key, value in data.model_dump(include=SOURCE_KEYS | SPLIT_KEYS).items()}
    asked |= {"data.tokenizer": data.tokenizer, "model.vocab_size": vocab_size}
    problems = [
        f"`{key}` is {asked[key]}, but {folder} was prepared with {held[key]}"
        for key in asked
        if asked[key] != held[key]
    ]
    if problems:
        raise InputError([*problems, f"`data.dir` is {folder}: name a new folder, or go back to those values"])


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _tokens(files: list[shards.FileRecord]) -> int:
    return sum(record.tokens for record in files)


def _documents(files: list[shards.FileRecord]) -> int:
    return sum(record.documents for record in files)


def expected_cost(data: Data) -> str:
    """Say in one line what preparing `data` takes: download, disk, and minutes of tokenising on this machine."""
    if data.source == "embedded":
        return "nothing to download, 10 MB of text, under a minute"
    download = "nothing to download" if data.source == "files" else "a download of unknown size"
    if data.source == "datasets" and data.download_gb is not None:
        download = f"{data.download_gb:,.1f} GB to download"
    if data.train_tokens is None:
        return f"{download}; disk and time depend on the size of the text (data.train_tokens is empty)"
    tokens = data.train_tokens + data.val_tokens
    cores = os.cpu_count() or 1
    minutes = tokens * CHARACTERS_PER_TOKEN / TOKENIZER_BYTES_PER_SECOND / cores / 60
    return (
        f"{download}, {tokens * 2 / 1e9:,.1f} GB of shards, about {minutes:,.0f} minutes to tokenise on {cores} cores "
        f"(at {TOKENIZER_BYTES_PER_SECOND / 1e6} MB/s a core and {CHARACTERS_PER_TOKEN} characters a token)"
    )
