"""Documents to verified token shards: every file staged by itself, then put together, and named when whole.

`DIR.partial` holds the work in hand and survives whatever ends it; the same command goes on from there:

    inputs/         files that are being fetched
    tokenizer-KEY/  the tokenizer
    stage/KEY/      a staged file (staging.py)
    whole/          the prepared folder, before it gets its name
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.pipeline.base import PipelineStep
from transformers import PreTrainedTokenizerFast

from overnight import executors, shards, sources
from overnight.corpus import NOT_TEXT, TOO_LONG, is_reserved, rows, text_hash
from overnight.encoder import FastTokenizer
from overnight.files import room_in, sync
from overnight.prepare_progress import watched
from overnight.recipe import Data, InputError
from overnight.shards import Manifest, SourceRecord, SplitRule, SplitWriter
from overnight.sources import SourceFile
from overnight.staging import DUPLICATE, EMPTY, Allotment, Job, Stage, allot, pipeline, raise_left, read_stage
from overnight.tokenizer import fingerprint, load_tokenizer, train_tokenizer

TOKENIZER_CHARACTERS = 50_000_000
"""A tokenizer is trained on the first training documents, up to this much text."""
TOKENS_AT_ONCE = 16_000_000
"""What is held in memory while staged files are put together."""
CHARACTERS_PER_TOKEN = 4.61
"""GPT-2's vocabulary on FineWeb-Edu."""
BYTES_PER_SECOND = {"fastokens": 20e6, "tokenizers": 1.2e6}
"""Of text on one core, from parquet to shards, on a slow cloud machine; benchmarks/prepare.py measures it."""
TOKEN_BYTES_PER_INPUT_BYTE = {".parquet": 0.75, ".jsonl": 0.5, ".txt": 0.5}
"""Of two-byte tokens, at most, for English text; FineWeb-Edu's parquet files have 0.70."""
SOURCE_KEYS = {"source", "path", "files", "revision", "text_column"}
SPLIT_KEYS = {"reserved_fraction", "val_tokens", "train_tokens"}
"""With the tokenizer and the vocabulary, what a prepared folder must agree in to serve a recipe."""


@dataclass(frozen=True)
class Workers:
    """Where the files are staged: `executor` is local, slurm or ray, `options` are its own."""

    executor: str = "local"
    count: int = 1
    options: dict[str, Any] | None = None


def prepare(
    data: Data, vocab_size: int, report: Callable[[str], None] = print, workers: Workers | None = None
) -> Manifest | None:
    """Write the token shards of `data` into `data.dir` and return their manifest; None when Slurm will do it.

    Equal inputs give equal bytes, whatever the workers. A folder that already holds what is asked for is verified and
    returned. Raises InputError naming the recipe key for what cannot be read, does not fit or falls short, DamagedData
    for a folder or source that is not what it should be, and Unreachable for a network that stays away.
    """
    folder = Path(data.dir)
    if shards.is_prepared(folder):
        _require_same_request(folder, data, vocab_size)
        report(f"{folder}: already prepared; verifying it")
        if _partial(folder).exists():  # killed after the folder had its name
            with _claimed(folder) as partial:
                shutil.rmtree(partial)
        return shards.verify(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"`data.dir` is {folder}, which holds other files and no {shards.MANIFEST}: name a new folder")
    workers = workers or Workers()
    with _claimed(folder) as partial, room_in(partial, "data.dir"):
        commit = sources.pinned_commit(data)
        job = _job(partial, data, commit, vocab_size, workers.count, report)
        if workers.executor == "slurm":
            number = _submit(job, folder, commit, workers)
            report(f"{folder}: handed to Slurm; it is there when job {number} has ended, and says so in {partial}/logs")
            return None
        with watched(job, report):
            _stage(job, workers)
        raise_left(job.error(0).parent)
        manifest = finish(job, folder, commit)
    shutil.rmtree(partial)
    report(f"{folder}: {_tokens(manifest.train):,} training and {_tokens(manifest.val):,} validation tokens")
    return manifest


def _partial(folder: Path) -> Path:
    return folder.with_name(folder.name + ".partial")


@contextmanager
def _claimed(folder: Path) -> Iterator[Path]:
    """Lend the folder of the work in hand to one process, when no worker of an earlier one is left in it."""
    partial = _partial(folder)
    partial.mkdir(parents=True, exist_ok=True)
    with (partial / "lock").open("a") as lock, (partial / "workers.lock").open("a") as workers:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"`data.dir` is {folder}: another process is preparing it; wait for it to end") from None
        fcntl.flock(workers, fcntl.LOCK_EX)  # those of a killed process die with it
        fcntl.flock(workers, fcntl.LOCK_UN)
        for left in [partial / "errors", partial / "progress", *partial.glob("stage/*.partial")]:
            shutil.rmtree(left, ignore_errors=True)
        (partial / "progress").mkdir()
        yield partial


def _job(
    partial: Path, data: Data, commit: str | None, vocab_size: int, workers: int, report: Callable[[str], None]
) -> Job:
    """What the tasks need: the files, found and with room for what they become, and the tokenizer in the folder."""
    files = sources.find(data, commit)
    _require_room(partial, data, vocab_size, files, workers)
    about = [data.tokenizer, vocab_size]
    if data.tokenizer == "trained":
        about += [data.reserved_fraction, data.text_column, [file.key for file in files]]
    name = f"tokenizer-{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]}"
    if (partial / name).exists():
        tokenizer = load_tokenizer(str(partial / name))
    else:
        tokenizer = _tokenizer(partial / "inputs", data, files, vocab_size, report)
        tokenizer.save_pretrained(partial / f"{name}.partial")
        (partial / f"{name}.partial").rename(partial / name)
    return Job(
        folder=partial.absolute(),  # tasks on a cluster may start elsewhere
        data=data,
        files=tuple(files),
        tokenizer=name,
        tokenizer_sha256=fingerprint(tokenizer),
        vocab_size=vocab_size,
        eos_id=tokenizer.eos_token_id,
        dtype=shards.dtype_for(vocab_size),
    )


def _require_room(partial: Path, data: Data, vocab_size: int, files: list[SourceFile], workers: int) -> None:
    """Raise InputError when the disk will not hold the staged files, the shards, and the files fetched at one time."""
    size = np.dtype(shards.dtype_for(vocab_size)).itemsize
    staged = sum(file.size * TOKEN_BYTES_PER_INPUT_BYTE[file.suffix] for file in files) * size / 2
    wanted = staged if data.train_tokens is None else (data.train_tokens + data.val_tokens) * size
    remote = sorted((file.size for file in files if file.remote), reverse=True)
    fetched = sum(remote if data.tokenizer == "trained" else remote[:workers])  # each goes when it is staged
    held = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
    needed, free = staged + min(wanted, staged) + fetched - held, shutil.disk_usage(partial).free
    if needed > free:
        parts = {"fetched": fetched, "staged": staged, "shards": min(wanted, staged)}
        listed = ", ".join(f"{name} {size / 1e9:,.1f}" for name, size in parts.items())
        raise InputError(
            f"`data.dir`: {partial.parent} has {free / 1e9:,.1f} GB free, and preparing needs about "
            f"{needed / 1e9:,.1f} GB more ({listed}): make room, name a folder on another disk, or take fewer files"
        )


def _tokenizer(
    inputs: Path, data: Data, files: list[SourceFile], vocab_size: int, report: Callable[[str], None]
) -> PreTrainedTokenizerFast:
    if data.tokenizer == "trained":
        report(f"training a tokenizer of {vocab_size:,} entries on the training documents")
        return train_tokenizer(_tokenizer_texts(inputs, data, files), vocab_size)
    tokenizer = load_tokenizer(data.tokenizer)
    if len(tokenizer) != vocab_size:
        raise InputError(
            f"`model.vocab_size` is {vocab_size}, but the tokenizer {data.tokenizer} has {len(tokenizer)} entries: "
            f"use {len(tokenizer)}"
        )
    return tokenizer


def _tokenizer_texts(inputs: Path, data: Data, files: list[SourceFile]) -> Iterator[str]:
    """The first training documents, as the shards will have them."""
    seen: set[bytes] = set()
    left = TOKENIZER_CHARACTERS
    for file in files:
        path, _ = sources.fetch(file, inputs)
        for row in rows(path, file.suffix, data.text_column, file.name):
            if not row.text or not row.text.strip() or (key := text_hash(row.text)) in seen:
                continue
            seen.add(key)
            if not is_reserved(key, data.reserved_fraction):
                yield row.text
                left -= len(row.text)
                if left <= 0:
                    return


def _stage(job: Job, workers: Workers) -> None:
    """Run the task of every file; a single worker is this process."""
    tasks, logs, options = len(job.files), job.folder / "logs", workers.options or {}
    count = min(workers.count, tasks)
    if workers.executor == "ray":
        executors.run_ray(lambda: pipeline(job), tasks, count, logs, options)
    elif count > 1:
        executors.run_local(lambda: pipeline(job), tasks, count, logs, options)
    else:
        executors.run_here(lambda: pipeline(job), tasks)


class Finish(PipelineStep):
    """The last task on a cluster: raises what the others left, or puts their output together."""

    type, name = "WRITER", "prepared folder"

    def __init__(self, job: Job, folder: Path, commit: str | None):
        super().__init__()
        self.job, self.folder, self.commit = job, folder, commit

    def run(self, data: object = None, rank: int = 0, world_size: int = 1) -> None:
        """Make the prepared folder."""
        raise_left(self.job.error(0).parent)
        finish(self.job, self.folder, self.commit)
        shutil.rmtree(self.job.folder)


def _submit(job: Job, folder: Path, commit: str | None, workers: Workers) -> str:
    options = {"venv_path": f"{sys.prefix}/bin/activate", "workers": workers.count} | (workers.options or {})
    finishing: list[PipelineStep] = [Finish(job, folder.absolute(), commit)]
    return executors.submit_slurm(pipeline(job), len(job.files), finishing, job.folder / "logs", options)


def finish(job: Job, folder: Path, commit: str | None) -> Manifest:
    """Put the staged files together and give the folder its name. Raises InputError when they fall short."""
    staged, chosen = _staged(job)
    whole = job.folder / "whole"
    shutil.rmtree(whole, ignore_errors=True)
    try:
        shutil.copytree(job.folder / job.tokenizer, whole / "tokenizer")
        val = SplitWriter(whole / "val", job.vocab_size, job.data.val_tokens)
        train = SplitWriter(whole / "train", job.vocab_size, job.data.train_tokens)
        for stage, kept, held in zip(staged, chosen.train, chosen.val, strict=True):
            _copy_in_order(stage, kept, job, train)
            _copy_one_by_one(stage, held, job, val)
        _require_enough(job.data, val.tokens, train.tokens)
        val.close()
        train.close()
        manifest = _manifest(job, commit, staged, chosen, val, train)
        (whole / shards.MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
        for path in (whole, *whole.rglob("*")):
            sync(path)
        whole.rename(folder)
    except BaseException:
        shutil.rmtree(whole, ignore_errors=True)
        raise
    sync(folder.parent)
    return manifest


def _staged(job: Job) -> tuple[list[Stage], Allotment]:
    """The staged files that are needed, in order, and what becomes of their documents."""
    found: list[Stage] = []
    for rank, file in enumerate(job.files):
        stage = read_stage(job.stage(rank))
        if stage is None:
            if found and (chosen := allot([stage.documents for stage in found], job.data)).enough:
                break
            raise InputError(f"`data.path`: {file.name} was not staged; its task has ended, see {job.folder / 'logs'}")
        found.append(stage)
    chosen = allot([stage.documents for stage in found], job.data)
    return found[: len(chosen.train)], chosen


def _copy_in_order(stage: Stage, kept: np.ndarray, job: Job, writer: SplitWriter) -> None:
    """Append the documents numbered `kept`, ascending, reading the staged tokens once from end to end."""
    if not len(kept):
        return
    lengths = stage.documents["tokens"].astype(np.int64)
    chosen = np.zeros(len(lengths), bool)
    chosen[kept] = True
    dtype = shards.little_endian(job.dtype)
    parts = np.searchsorted(np.cumsum(lengths), np.arange(TOKENS_AT_ONCE, lengths.sum(), TOKENS_AT_ONCE))
    with (stage.folder / "tokens.bin").open("rb") as file:
        for sizes, wanted in zip(np.split(lengths, parts), np.split(chosen, parts), strict=True):
            tokens = np.fromfile(file, dtype, int(sizes.sum()))
            if wanted.any() and not writer.full:
                writer.write(_runs(tokens, sizes, wanted), sizes[wanted])


def _runs(tokens: np.ndarray, sizes: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The tokens of the documents that are wanted, copied in runs of neighbours: most are."""
    ends = np.concatenate([[0], np.cumsum(sizes)])
    borders = np.flatnonzero(np.diff(wanted, prepend=False, append=False))  # begin, end, begin, end, ...
    return np.concatenate([tokens[start:stop] for start, stop in ends[borders].reshape(-1, 2)])


def _copy_one_by_one(stage: Stage, held: np.ndarray, job: Job, writer: SplitWriter) -> None:
    """Append the documents numbered `held`, in that order."""
    lengths = stage.documents["tokens"].astype(np.int64)
    starts = np.cumsum(lengths) - lengths
    dtype = shards.little_endian(job.dtype)
    for number in held:
        if writer.full:
            return
        offset = int(starts[number]) * dtype.itemsize
        writer.write(np.fromfile(stage.folder / "tokens.bin", dtype, int(lengths[number]), offset=offset))


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


def _manifest(
    job: Job,
    commit: str | None,
    staged: list[Stage],
    chosen: Allotment,
    val: SplitWriter,
    train: SplitWriter,
) -> Manifest:
    counts = sum((Counter(stage.counts) for stage in staged), Counter())
    about = job.data.model_dump(include=SOURCE_KEYS | {"licence"}) | {"commit": commit, "path": _path(job.data)}
    return Manifest(
        tokenizer=shards.TokenizerRecord(name=job.data.tokenizer, sha256=job.tokenizer_sha256),
        vocab_size=job.vocab_size,
        eos_id=job.eos_id,
        dtype=job.dtype,
        source=SourceRecord.model_validate(about),
        inputs=[stage.record for stage in staged],
        split=SplitRule(**job.data.model_dump(include=SPLIT_KEYS)),
        val=val.records,
        train=train.records,
        counts=shards.Counts(
            duplicates=counts[DUPLICATE] + chosen.duplicates,
            reserved_unused=chosen.reserved - _documents(val.records),
            empty=counts[EMPTY],
            unreadable=counts[NOT_TEXT],
            too_long=counts[TOO_LONG],
            after_budget=chosen.training - _documents(train.records),
        ),
    )


def _path(data: Data) -> str | list[str] | None:
    """`data.path`, a list in the order in which its files are read."""
    return sorted(data.path) if isinstance(data.path, list) else data.path


def _require_same_request(folder: Path, data: Data, vocab_size: int) -> None:
    manifest = shards.read_manifest(folder)
    if manifest.split.rule == "adopted":
        return  # what the recipe says of text and split has no bearing on it
    held = manifest.source.model_dump(include=SOURCE_KEYS) | manifest.split.model_dump(include=SPLIT_KEYS)
    held = {f"data.{key}": value for key, value in held.items()}
    held |= {"data.tokenizer": manifest.tokenizer.name, "model.vocab_size": manifest.vocab_size}
    asked = data.model_dump(include=SOURCE_KEYS | SPLIT_KEYS) | {"path": _path(data)}
    asked = {f"data.{key}": value for key, value in asked.items()}
    asked |= {"data.tokenizer": data.tokenizer, "model.vocab_size": vocab_size}
    problems = [
        f"`{key}` is {asked[key]}, but {folder} was prepared with {held[key]}"
        for key in asked
        if asked[key] != held[key]
    ]
    if problems:
        raise InputError([*problems, f"`data.dir` is {folder}: name a new folder, or go back to those values"])


def _tokens(files: list[shards.FileRecord]) -> int:
    return sum(record.tokens for record in files)


def _documents(files: list[shards.FileRecord]) -> int:
    return sum(record.documents for record in files)


def expected_cost(data: Data) -> str:
    """Say in one line what preparing `data` takes: download, disk, and minutes on this machine."""
    if data.source == "embedded":
        return "nothing to download, 10 MB of text, under a minute"
    download = "nothing to download" if data.source == "files" else "a download of unknown size"
    if data.download_gb is not None:
        download = f"{data.download_gb:,.1f} GB to download"
    if data.train_tokens is None:
        return f"{download}; disk and time depend on the size of the text (data.train_tokens is empty)"
    tokens = data.train_tokens + data.val_tokens
    cores, tool = os.cpu_count() or 1, "fastokens" if FastTokenizer else "tokenizers"
    minutes = tokens * CHARACTERS_PER_TOKEN / BYTES_PER_SECOND[tool] / cores / 60
    return (
        f"{download}, {tokens * 2 / 1e9:,.1f} GB of shards and as much again while they are made, about {minutes:,.0f} "
        f"minutes of computing on {cores} cores with {tool} (at {BYTES_PER_SECOND[tool] / 1e6:g} MB/s a core and "
        f"{CHARACTERS_PER_TOKEN} characters a token)"
    )
