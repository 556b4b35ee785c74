"""Whether, and at what cost, text is prepared: is it what it was, what disk is free, download, disk and minutes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np

from overnight.core.console import byte_count
from overnight.core.extras import require
from overnight.core.files import sha256
from overnight.data.encoder import FastTokenizer
from overnight.data.manifest import InputRecord, dtype_for, is_prepared
from overnight.errors import InputError
from overnight.prepare.sources import SourceFile, find
from overnight.recipe.schema import Data, Recipe

CHARACTERS_PER_TOKEN = 4.61
"""GPT-2's vocabulary on FineWeb-Edu."""
BYTES_PER_SECOND = {"fastokens": 20e6, "tokenizers": 1.2e6}
"""Of text on one core, from parquet to shards, on a slow cloud machine; benchmarks/prepare.py measures it."""
TOKEN_BYTES_PER_INPUT_BYTE = {".parquet": 0.75, ".jsonl": 0.5, ".txt": 0.5}
"""Of two-byte tokens, at most, for English text; FineWeb-Edu's parquet files have 0.70."""
PACKED_TOKEN_BYTES = 1.5
"""The same of a text file that was packed to a third of its size."""


def cost_of(files: list[SourceFile], data: Data, vocab_size: int) -> str:
    """Say in one line what preparing files on this machine takes, by their sizes."""
    size = sum(file.size for file in files)
    shards = staged_bytes(files, vocab_size)
    tool = "fastokens" if FastTokenizer else "tokenizers"
    minutes = size / BYTES_PER_SECOND[tool] / (os.cpu_count() or 1) / 60
    return (
        f"{len(files)} files of {byte_count(size)}, nothing to download, up to {byte_count(2 * shards)} of disk"
        f" while they are prepared, {f'about {minutes:,.0f} minutes' if minutes >= 1.5 else 'a minute'} with {tool}"
    )


def staged_bytes(files: list[SourceFile], vocab_size: int) -> float:
    """Bytes of the tokens of these files, at most."""
    size = np.dtype(dtype_for(vocab_size)).itemsize
    return sum(file.size * TOKEN_BYTES_PER_INPUT_BYTE.get(file.form, PACKED_TOKEN_BYTES) for file in files) * size / 2


def expected_cost(data: Data) -> str:
    """Say in one line what preparing `data` takes: download, disk, and minutes on this machine."""
    if data.source == "embedded":
        return "nothing to download, 10 MB of text, under a minute"
    download = "a download of unknown size"
    if data.fetched_gb is not None:
        download = f"{data.fetched_gb:,.1f} GB to download" if data.fetched_gb else "nothing to download"
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


def require_data(recipe: Recipe) -> None:
    """Raise InputError unless the data is prepared, or is text on this machine that can be prepared on the way."""
    data = recipe.data
    if is_prepared(Path(data.dir)):
        return
    if not data.local:
        raise InputError(
            f"`data.dir`: {data.dir} holds no prepared data. `{recipe.command('prepare.py')}` makes it:"
            f" {expected_cost(data)}"
        )
    require("prepare", f"`data.dir`: {data.dir} holds no prepared data; preparing it")
    find(data, None)


def require_room(partial: Path, data: Data, vocab_size: int, files: list[SourceFile], workers: int) -> None:
    """Raise InputError when the disk will not hold the staged files, the shards, and the files fetched at one time."""
    size = np.dtype(dtype_for(vocab_size)).itemsize
    staged = staged_bytes(files, vocab_size)
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


def require_same_text(data: Data, inputs: list[InputRecord]) -> None:
    """Raise InputError when files on this machine are not those that were prepared, by name, size and SHA-256.

    Files that are gone altogether are not missed: shards are trained on where their text is not.
    """
    before = {record.name: record for record in inputs if "://" not in record.name}
    here = [place for place in ([data.path] if isinstance(data.path, str) else data.path or []) if "://" not in place]
    if data.source != "files" or not here or not any(os.path.exists(name) for name in before):
        return
    now = {file.name: file for file in find(data.model_copy(update={"path": here}), None)}
    last = max(before)
    problems = [f"{name} is gone" for name in before if name not in now]
    problems += [f"{name} is new" for name in now if name not in before and (data.train_tokens is None or name < last)]
    for name in before.keys() & now.keys():
        sizes = before[name].bytes, now[name].size
        if sizes[0] != sizes[1] or before[name].sha256 != sha256(Path(name)):
            problems.append(f"{name} has changed (it had {sizes[0]:,} bytes and has {sizes[1]:,})")
    if problems:
        raise InputError(
            [f"`data.path`: {each} since the data in {data.dir} was prepared" for each in sorted(problems)]
            + ["name a new `data.dir` to prepare the text as it is now, or go back to the text as it was"]
        )
