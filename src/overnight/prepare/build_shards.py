"""Staged files to a prepared folder: the documents that are used, in order, in shards, under a manifest."""

from __future__ import annotations

import shutil
from collections import Counter

import numpy as np

from overnight.data.manifest import (
    SOURCE_KEYS,
    SPLIT_KEYS,
    Counts,
    Manifest,
    SourceRecord,
    SplitRule,
    TokenizerRecord,
    little_endian,
    name_prepared,
    ordered_path,
)
from overnight.data.shards import TOKENS_AT_ONCE, SplitWriter
from overnight.errors import InputError, listed
from overnight.prepare.dedup_split import Allotment, Stage, allot, read_stage
from overnight.prepare.documents import DUPLICATE, EMPTY, NO_TEXT, NOT_JSON, NOT_UTF8, TOO_LONG
from overnight.prepare.tokenize_files import Job
from overnight.recipe.schema import Data


def build_shards(job: Job) -> Manifest:
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
        return name_prepared(whole, _manifest(job, staged, chosen, val, train), job.target)
    except BaseException:
        shutil.rmtree(whole, ignore_errors=True)
        raise


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
    dtype = little_endian(job.dtype)
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
    dtype = little_endian(job.dtype)
    for number in held:
        if writer.full:
            return
        offset = int(starts[number]) * dtype.itemsize
        writer.write(np.fromfile(stage.folder / "tokens.bin", dtype, int(lengths[number]), offset=offset))


def _require_enough(data: Data, val_tokens: int, train_tokens: int) -> None:
    problems = [] if val_tokens or train_tokens else [f"`data.path` is {listed(data.path)}, where no row has a text"]
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


def _manifest(job: Job, staged: list[Stage], chosen: Allotment, val: SplitWriter, train: SplitWriter) -> Manifest:
    counts = sum((Counter(stage.counts) for stage in staged), Counter())
    about = job.data.model_dump(include=SOURCE_KEYS)
    about |= {"commit": job.commit, "path": ordered_path(job.data), "licence": job.data.license}
    return Manifest(
        tokenizer=TokenizerRecord(name=job.data.tokenizer, sha256=job.tokenizer_sha256),
        vocab_size=job.vocab_size,
        eos_id=job.eos_id,
        dtype=job.dtype,
        source=SourceRecord.model_validate(about),
        inputs=[stage.record for stage in staged],
        split=SplitRule(**job.data.model_dump(include=SPLIT_KEYS)),
        val=val.records,
        train=train.records,
        counts=Counts(
            duplicates=counts[DUPLICATE] + chosen.duplicates,
            reserved_unused=chosen.reserved - sum(record.documents for record in val.records),
            empty=counts[EMPTY],
            unreadable=counts[NOT_UTF8] + counts[NOT_JSON],
            missing=counts[NO_TEXT],
            too_long=counts[TOO_LONG],
            after_budget=chosen.training - sum(record.documents for record in train.records),
        ),
    )
