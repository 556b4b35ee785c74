"""One input file to staged tokens: read its documents, key them, tokenise and write them.

A file is a task of its own; what it becomes depends on nothing but the file and the tokenizer, so tasks may run
anywhere and in any order. Which documents are used, and on which side, is decided when the staged files are put
together (build_shards.py). A staged file is a folder that has its name only when it is whole:

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

from overnight.core import files
from overnight.data.encoder import encoder_of
from overnight.data.manifest import DType, InputRecord, narrowed
from overnight.errors import DamagedData, InputError
from overnight.prepare import sources
from overnight.prepare.dedup_split import DOCUMENT, Budgets
from overnight.prepare.documents import NOT_JSON, NOT_UTF8, SourceRow, keyed, looks_like, rows
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


@dataclass(frozen=True)
class Job:
    """What all tasks of a preparation share; `folder` is the one that is built in."""

    folder: Path
    target: Path  # the prepared folder
    data: Data = field(compare=False)
    commit: str | None  # of a Hub dataset
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


def stage_file(job: Job, rank: int) -> None:
    """Stage file number `rank`, unless it is there or not needed any more.

    A problem with the input is left in `Job.error`, and no further task begins.
    """
    with bound_to_parent(job.folder, rank):
        if job.stage(rank).exists() or any(job.error(0).parent.glob("*.json")) or budgets_of(job).met_before(rank):
            return
        try:
            with files.disk_full_error(job.folder, "data.dir"):
                _stage(job, rank)
            sources.discard_fetched(job.files[rank], job.inputs)
        except InputError as error:
            leave(job.error(rank), error)
        finally:
            job.report(rank).unlink(missing_ok=True)


def _stage(job: Job, rank: int) -> None:
    target = job.stage(rank)
    aside = target.with_name(f"{target.name}.{os.getpid()}.partial")
    aside.mkdir(parents=True)
    try:
        _write(aside, job, rank)
        for path in (*aside.iterdir(), aside):
            files.sync(path)
        aside.rename(target)
        files.sync(target.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write(folder: Path, job: Job, rank: int) -> None:
    file = job.files[rank]
    path, sha256 = sources.fetch(file, job.inputs)
    tally = Tally(file, path, job.report(rank))
    found = keyed(rows(path, file.form, job.data.text_column, file.name), set())
    encode = encoder_of(job.folder / job.tokenizer)
    with (folder / "tokens.bin").open("wb") as tokens, (folder / "documents.bin").open("wb") as documents:
        for number, batch in enumerate(_batches(tally.counted(found))):
            texts = [row.text for row in batch]
            if number == 0:
                encode.check(_head(texts), file.name)
            ids, ends = encode(texts)
            # Each end of text stands behind the last token of its document.
            ids = np.insert(ids, ends, job.eos_id)
            tokens.write(narrowed(ids, job.vocab_size, file.name).tobytes())
            lengths = np.diff(ends, prepend=0) + 1
            documents.write(_documents([row.key for row in batch], lengths))
            tally.tokens += int(lengths.sum())
    files.atomic_write(folder / "stage.json", json.dumps(tally.summary(sha256)))


class Tally:
    """Counts the documents of one file on their way, and says every half second in `report` how far it is."""

    def __init__(self, file: SourceFile, path: Path, report: Path | None = None):
        self.file, self.path, self.report = file, path, report
        self.counts: Counter[str] = Counter()
        self.rejected: list[str] = []
        self.tokens = 0
        self._last = 0.0

    def counted(self, found: Iterable[SourceRow]) -> Iterator[SourceRow]:
        """Yield what is to be written, and `refuse_unreadable` at the end.

        A row without a text, or with one that is too long, is what it was: it is counted, and no sign of damage.
        """
        for number, row in enumerate(found):
            self.counts["rows"] += 1
            if row.rejected:
                self.counts[row.rejected] += 1
            if row.key:
                raw = len(row.text) if row.text.isascii() else len(row.text.encode())
                self.counts.update(documents=1, characters=len(row.text), text_bytes=raw)
            elif len(self.rejected) < MOST_LISTED:
                self.rejected.append(f"row {number}: {row.rejected}")
            if not row.rejected:
                yield row
            self._report(row.share)
        self.refuse_unreadable()

    def refuse_unreadable(self) -> None:
        """Raise DamagedData where too many of the rows so far cannot be read, InputError where it is their encoding."""
        bad = self.counts[NOT_UTF8] + self.counts[NOT_JSON]
        if bad <= MOST_REJECTED * self.counts["rows"]:
            return
        first = next(each for each in self.rejected if each.endswith((NOT_UTF8, NOT_JSON)))
        said = f"`data.path`: {self.file.name}: {bad:,} of {self.counts['rows']:,} rows cannot be used, first {first}"
        encoding = looks_like(self.path, self.file.form) if self.counts[NOT_UTF8] == bad else None
        if encoding is None:
            raise DamagedData(f"{said}; fetch or write it again")
        name = shlex.quote(self.file.name)
        raise InputError(
            f"{said}: it looks like {encoding}, and text has to be UTF-8; "
            f"`iconv -f {encoding} -t UTF-8 {name} > utf8{self.file.form}` makes that of it"
        )

    def _report(self, share: float) -> None:
        if self.report and time.monotonic() - self._last > SECONDS_BETWEEN_REPORTS:
            self._last = time.monotonic()
            about = {"share": share, "tokens": self.tokens, "pid": os.getpid(), "host": platform.node()} | self.counts
            files.atomic_write(self.report, json.dumps(about))

    def summary(self, sha256: str) -> dict:
        """The content of `stage.json` for a file of that SHA-256."""
        numbers = {name: self.counts[name] for name in ("rows", "documents", "characters", "text_bytes")}
        numbers["bytes"] = self.path.stat().st_size
        record = InputRecord(name=self.file.name, sha256=sha256, rejected=self.rejected, **numbers)
        return {"record": record.model_dump(), "counts": dict(self.counts)}


def _batches(found: Iterable[SourceRow]) -> Iterator[list[SourceRow]]:
    batch: list[SourceRow] = []
    characters = 0
    for row in found:
        batch.append(row)
        characters += len(row.text)
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
