"""One input file to staged tokens, as a datatrove pipeline: read its documents, key them, tokenise and write them.

A file is a task of its own; what it becomes depends on nothing but the file and the tokenizer, so tasks may run
anywhere and in any order. Which documents are used, and on which side, is decided when the staged files are put
together (prepare.py). A staged file is a folder that has its name only when it is whole:

    tokens.bin     the ids of all documents, each followed by the end of text, little-endian uint16 or uint32
    documents.bin  a DOCUMENT for each, in the order of the file; of texts that are equal the first alone
    stage.json     what was read: an InputRecord and the counts of what was not used
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from overnight.core import files
from overnight.data.encoder import encoder_of
from overnight.data.manifest import DType, InputRecord, narrowed
from overnight.errors import DamagedData, InputError
from overnight.prepare import sources
from overnight.prepare.dedup_split import DOCUMENT, Budgets
from overnight.prepare.documents import NO_TEXT, NOT_JSON, NOT_UTF8, TOO_LONG, looks_like, rows, text_hash
from overnight.prepare.sources import SourceFile
from overnight.prepare.workers import bound_to_parent, leave
from overnight.recipe.schema import Data

BATCH_CHARACTERS = 4_000_000
"""Text that is tokenised at once."""
CHECKED_DOCUMENTS, CHECKED_CHARACTERS = 16, 100_000
"""At the head of every file so many are tokenised with `tokenizers` as well."""
MOST_REJECTED = 0.01
"""Share of a file's rows that cannot be used above which the file is taken to be damaged."""
MOST_LISTED = 100
SECONDS_BETWEEN_REPORTS = 0.5
STAGE_FORMAT = 2
DUPLICATE, EMPTY = "duplicate", "empty"


@dataclass(frozen=True)
class Job:
    """What all tasks of a preparation share; `folder` is the one that is built in."""

    folder: Path
    data: Data = field(compare=False)
    key: str  # of data and files
    tokenizer: str  # its folder's name in `folder`
    tokenizer_sha256: str
    vocab_size: int
    eos_id: int
    dtype: DType

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """The input files, in order. They lie in a file, for a job goes to a process with each of its tasks."""
        return files_in(self.folder / f"files-{self.key}.json")

    @property
    def inputs(self) -> Path:
        """Where fetched files are kept until they are staged."""
        return self.folder / "inputs"

    def stage(self, rank: int) -> Path:
        """The staged folder of one file, named for all that decides its content."""
        about = json.dumps([self.files[rank].key, self.data.text_column, self.tokenizer, STAGE_FORMAT])
        return self.folder / "stage" / hashlib.sha256(about.encode()).hexdigest()[:16]

    def report(self, rank: int) -> Path:
        """Where the task of one file says how far it is."""
        return self.folder / "progress" / f"{rank:05d}.json"

    def error(self, rank: int) -> Path:
        """Where the task of one file leaves the problem that ended it."""
        return self.folder / "errors" / f"{rank:05d}.json"


@lru_cache(maxsize=1)
def files_in(path: Path) -> tuple[SourceFile, ...]:
    """The input files of a job."""
    return tuple(SourceFile(*each) for each in json.loads(path.read_bytes()))


@lru_cache(maxsize=1)
def budgets_of(job: Job) -> Budgets:
    """What this process knows of a job's staged files, for all of its tasks."""
    return Budgets(job.data, job.stage)


def pipeline(job: Job) -> list[PipelineStep]:
    """The steps of a task, for any of datatrove's executors."""
    return [ReadDocuments(job), KeyDocuments(), StageTokens(job)]


class ReadDocuments(PipelineStep):
    """Fetches the task's file and yields a Document for each of its rows; `metadata` says why a row has no text."""

    type, name = "READER", "text files"

    def __init__(self, job: Job):
        super().__init__()
        self.job = job

    def run(self, data: object = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Yield the rows of file number `rank`. Raises what `sources.fetch` and `corpus.rows` raise."""
        file = self.job.files[rank]
        path, _ = sources.fetch(file, self.job.inputs)
        for number, row in enumerate(rows(path, file.form, self.job.data.text_column, file.name)):
            yield Document(row.text or "", str(number), metadata={"share": row.share, "rejected": row.rejected})


class KeyDocuments(PipelineStep):
    """Gives each document the key that deduplication and split go by, and drops the text of what the file repeats."""

    type, name = "DEDUP", "keys"

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Yield all documents with `metadata["key"]`, or with the reason why they are not used."""
        seen: set[bytes] = set()
        for document in data:
            if not document.metadata["rejected"]:
                key = text_hash(document.text)
                if not document.text.strip():
                    document.metadata["rejected"] = EMPTY
                elif key in seen:
                    document.metadata["rejected"] = DUPLICATE
                seen.add(key)
                document.metadata["key"] = key
            yield document


class StageTokens(PipelineStep):
    """Tokenises the documents of a task and writes the staged file, unless it is there or not needed any more."""

    type, name = "WRITER", "token shards"

    def __init__(self, job: Job):
        super().__init__()
        self.job = job

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> None:
        """Stage file number `rank`; a problem with the input is left in `Job.error`, and no further task begins."""
        job = self.job
        with bound_to_parent(job.folder, rank):
            if job.stage(rank).exists() or any(job.error(0).parent.glob("*.json")) or budgets_of(job).met_before(rank):
                return
            try:
                with files.disk_full_error(job.folder, "data.dir"):
                    self._stage(data, rank)
                sources.discard_fetched(job.files[rank], job.inputs)
            except InputError as error:
                leave(job.error(rank), error)
            finally:
                job.report(rank).unlink(missing_ok=True)

    def _stage(self, data: Iterable[Document], rank: int) -> None:
        target = self.job.stage(rank)
        aside = target.with_name(f"{target.name}.{os.getpid()}.partial")
        aside.mkdir(parents=True)
        try:
            self._write(aside, data, rank)
            files.sync(aside)
            aside.rename(target)
            files.sync(target.parent)
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def _write(self, folder: Path, data: Iterable[Document], rank: int) -> None:
        tally = Tally(self.job, rank)
        encode = encoder_of(self.job.folder / self.job.tokenizer)
        with (folder / "tokens.bin").open("wb") as tokens, (folder / "documents.bin").open("wb") as documents:
            for number, batch in enumerate(_batches(tally.counted(data))):
                texts = [document.text for document in batch]
                if number == 0:
                    encode.check(_head(texts), self.job.files[rank].name)
                ids, ends = encode(texts)
                # Each end of text stands behind the last token of its document.
                ids = np.insert(ids, ends, self.job.eos_id)
                tokens.write(narrowed(ids, self.job.vocab_size, self.job.files[rank].name).tobytes())
                lengths = np.diff(ends, prepend=0) + 1
                documents.write(_documents([document.metadata["key"] for document in batch], lengths))
                tally.tokens += int(lengths.sum())
            for file in (tokens, documents):
                file.flush()
                os.fsync(file.fileno())
        path, sha256 = sources.fetch(self.job.files[rank], self.job.inputs)  # which knows it since it was read
        files.atomic_write(folder / "stage.json", json.dumps(tally.summary(path.stat().st_size, sha256)))
        files.sync(folder / "stage.json")


class Tally:
    """Counts the documents of one file on their way, and says every half second how far it is."""

    def __init__(self, job: Job, rank: int):
        self.file, self.path = job.files[rank], job.report(rank)
        self.source = sources.local_path(self.file, job.inputs)
        self.counts: Counter[str] = Counter()
        self.rejected: list[str] = []
        self.tokens = 0
        self._last = 0.0

    def counted(self, data: Iterable[Document]) -> Iterator[Document]:
        """Yield what is to be written. Raises `_unreadable` at the end when it is too many rows that cannot be read.

        A row without a text, or with one that is too long, is what it was: it is counted, and no sign of damage.
        """
        for document in data:
            self.counts["rows"] += 1
            reason = document.metadata["rejected"]
            if reason in (NOT_UTF8, NOT_JSON, NO_TEXT, TOO_LONG):
                self.counts[reason] += 1
                if len(self.rejected) < MOST_LISTED:
                    self.rejected.append(f"row {document.id}: {reason}")
                continue
            raw = len(document.text) if document.text.isascii() else len(document.text.encode())
            self.counts.update(documents=1, characters=len(document.text), text_bytes=raw)
            if reason:
                self.counts[reason] += 1
            else:
                yield document
            self._report(document.metadata["share"])
        bad = self.counts[NOT_UTF8] + self.counts[NOT_JSON]
        if bad > MOST_REJECTED * self.counts["rows"]:
            raise self._unreadable(bad)

    def _unreadable(self, bad: int) -> InputError:
        """DamagedData, or InputError where another encoding explains it."""
        first = next(each for each in self.rejected if each.endswith((NOT_UTF8, NOT_JSON)))
        said = f"`data.path`: {self.file.name}: {bad:,} of {self.counts['rows']:,} rows cannot be used, first {first}"
        encoding = looks_like(self.source, self.file.form) if self.counts[NOT_UTF8] == bad else None
        if encoding is None:
            return DamagedData(f"{said}; fetch or write it again")
        name = shlex.quote(self.file.name)
        return InputError(
            f"{said}: it looks like {encoding}, and text has to be UTF-8; "
            f"`iconv -f {encoding} -t UTF-8 {name} > utf8{self.file.form}` makes that of it"
        )

    def _report(self, share: float) -> None:
        if time.monotonic() - self._last > SECONDS_BETWEEN_REPORTS:
            self._last = time.monotonic()
            about = {"share": share, "tokens": self.tokens, "pid": os.getpid(), "host": platform.node()} | self.counts
            files.atomic_write(self.path, json.dumps(about))

    def summary(self, size: int, sha256: str) -> dict:
        """The content of `stage.json` for a file of that size and SHA-256."""
        numbers = {name: self.counts[name] for name in ("rows", "documents", "characters", "text_bytes")}
        record = InputRecord(name=self.file.name, bytes=size, sha256=sha256, rejected=self.rejected, **numbers)
        return {"record": record.model_dump(), "counts": dict(self.counts)}


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _head(texts: list[str]) -> list[str]:
    sizes = np.cumsum([len(text) for text in texts[:CHECKED_DOCUMENTS]])
    return texts[: max(1, int(np.searchsorted(sizes, CHECKED_CHARACTERS)))]


def _documents(keys: list[bytes], lengths: np.ndarray) -> bytes:
    records = np.empty(len(keys), DOCUMENT)
    halves = np.frombuffer(b"".join(keys), ">u8").reshape(-1, 2)
    records["high"], records["low"], records["tokens"] = halves[:, 0], halves[:, 1], lengths
    return records.tobytes()
