"""Which tokens an iteration trains on: a pure function of (seed, iteration), whatever the micro-batch or processes.

They are read from the shards of one side of the data (shards.py has the format) by their place.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from overnight.data.manifest import DType, FileRecord, little_endian, named_file
from overnight.errors import DamagedData, InputError
from overnight.recipe.schema import Batch

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def permutation(seed: int, epoch: int, rows: int) -> np.ndarray:
    """The order, int64 (rows,), in which `epoch` visits the rows of the training set.

    It is made of Philox's raw output, the one stream that NumPy promises never to change (NEP 19), and not of
    `Generator.permutation`, which may change between versions.
    """
    keys = np.random.Philox(key=[seed, epoch]).random_raw(rows)
    return np.argsort(keys, kind="stable")


class Split:
    """One side of prepared data, read by position with `os.pread`: memory does not grow, threads may share it.

    `files` are the manifest's records in order and `tokens` their sum.
    """

    def __init__(self, folder: Path, records: list[FileRecord], dtype: DType):
        self.files, self.tokens = records, sum(record.tokens for record in records)
        self.dtype = little_endian(dtype)
        self._paths = [named_file(folder, record.path) for record in records]
        self._descriptors = [os.open(path, os.O_RDONLY) for path in self._paths]

    def read(self, file_index: int, start: int, count: int) -> np.ndarray:
        """Return tokens [start, start + count) of one file, shape (count,), in the dtype on disk.

        Raises DamagedData naming the file when it ends before that, for it was longer when it was opened.
        """
        size = self.dtype.itemsize
        raw = os.pread(self._descriptors[file_index], count * size, start * size)
        if len(raw) != count * size:
            raise DamagedData(f"{self._paths[file_index]}: {count} tokens at {start} expected, {len(raw)} bytes found")
        return np.frombuffer(raw, dtype=self.dtype)

    def read_all(self) -> np.ndarray:
        """Return all tokens of the side, shape (tokens,): for validation, which fits in memory."""
        return np.concatenate([self.read(index, 0, record.tokens) for index, record in enumerate(self.files)])


class Rows:
    """A split cut into rows of `length` tokens; each row is read with the one token that follows it."""

    def __init__(self, split: Split, length: int):
        self.split, self.length = split, length
        whole = [max(0, file.tokens - 1) // length for file in split.files]  # a row never crosses a file
        self.first_row = np.concatenate([[0], np.cumsum(whole, dtype=np.int64)])

    def __len__(self) -> int:
        return int(self.first_row[-1])

    def read(self, row: int) -> np.ndarray:
        """Tokens of one row and the next token: (length + 1,)."""
        return self.split.read(*self.place(row), self.length + 1)

    def place(self, row: int) -> tuple[int, int]:
        """The number of the file in which a row lies, and the tokens of that file before it."""
        file = int(np.searchsorted(self.first_row, row, side="right")) - 1
        return file, int(row - self.first_row[file]) * self.length


class TrainingBatches:
    """The global batch of every iteration, cut for this process into micro-batches."""

    def __init__(self, split: Split, batch: Batch, seed: int, *, rank: int = 0, num_processes: int = 1):
        self.rows = Rows(split, batch.sequence_length)
        self.rows_per_iter = batch.tokens_per_iter // batch.sequence_length
        self.seed, self.rank, self.num_processes = seed, rank, num_processes
        self._order: tuple[int, np.ndarray] | None = None
        if not len(self.rows):
            raise InputError(
                f"`batch.sequence_length` {batch.sequence_length}: the training set of {split.tokens:,} tokens has no"
                f" row of that length; {max(1, split.tokens // 8)} would work"
            )

    def row_numbers(self, iteration: int) -> np.ndarray:
        """The rows of an iteration, int64 (rows_per_iter,). An epoch's end inside it is crossed, never cut short."""
        positions = np.arange(iteration * self.rows_per_iter, (iteration + 1) * self.rows_per_iter)
        epochs = positions // len(self.rows)
        return np.concatenate([self._epoch(int(e))[positions[epochs == e] % len(self.rows)] for e in np.unique(epochs)])

    def places(self, iteration: int) -> dict[str, list[int]]:
        """Where the rows of an iteration lie: by shard file, the tokens before each, in the order of training."""
        found: dict[str, list[int]] = {}
        for row in self.row_numbers(iteration):
            file, offset = self.rows.place(row)
            found.setdefault(self.rows.split.files[file].path, []).append(offset)
        return found

    def _epoch(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, permutation(self.seed, epoch, len(self.rows)))
        return self._order[1]

    def micro_batches(self, iteration: int, micro_batch: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """(ids, targets) of this process, each (micro_batch, sequence_length) int64 on `device`.

        A micro-batch is copied while the device still computes the one before: page-locked memory, no synchronisation.
        """
        mine = self.row_numbers(iteration)[self.rank :: self.num_processes]
        for start in range(0, len(mine), micro_batch):
            yield to_device([self.rows.read(row) for row in mine[start : start + micro_batch]], device)


def validation_batches(
    split: Split, length: int, micro_batch: int, device: torch.device, *, rank: int = 0, num_processes: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """The whole set in order as (ids, targets), strided over the processes; the last row of a file may be shorter.

    Every token but the first of each file is a target exactly once, on exactly one process.
    """
    rows = Rows(split, length)
    mine = range(rank, len(rows), num_processes)
    for start in range(0, len(mine), micro_batch):
        yield to_device([rows.read(row) for row in mine[start : start + micro_batch]], device)
    for number, file in enumerate(split.files):
        done = int(rows.first_row[number + 1] - rows.first_row[number]) * length
        if file.tokens - done > 1 and number % num_processes == rank:
            yield to_device([split.read(number, done, file.tokens - done)], device)


def to_device(rows: list[np.ndarray], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of t + 1 tokens as ids and targets, (rows, t) int64 each."""
    import torch  # here alone: the workers that prepare data read shards too, and would wait seconds for it

    tokens = torch.from_numpy(np.stack(rows).astype(np.int64))
    if device.type == "cuda":
        tokens = page_locked(tokens).to(device, non_blocking=True)
    return tokens[:, :-1], tokens[:, 1:]


def page_locked(tokens: Tensor) -> Tensor:
    """`tokens` where the device can fetch them by itself, or as they are where the system gives no such memory.

    WSL2 and containers bound it. The copy then holds up the host: slower, the same tokens.
    """
    try:
        return tokens.pin_memory()
    except RuntimeError:
        return tokens
