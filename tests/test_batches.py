"""The order of the data is a pure function of (seed, iteration), and every row is seen once an epoch."""

from pathlib import Path

import numpy as np
import pytest
import torch

from overnight.data.batches import Split, TrainingBatches, permutation, validation_batches
from overnight.data.shards import SplitWriter
from overnight.errors import InputError
from overnight.recipe.schema import Batch

CPU = torch.device("cpu")


def split_of(tmp_path: Path, *sizes: int) -> Split:
    """Files whose tokens count up from 0 over the whole split, so that a token tells its place."""
    start, records = 0, []
    for number, size in enumerate(sizes):
        writer = SplitWriter(tmp_path / f"{number}", 60_000, None)
        writer.write(range(start, start + size))
        writer.close()
        records += writer.records
        start += size
    return Split(tmp_path, records, "uint16")


def batches_of(split: Split, rows: int, length: int, **processes: int) -> TrainingBatches:
    return TrainingBatches(split, Batch(tokens_per_iter=rows * length, sequence_length=length), 7, **processes)


def test_b6_every_row_is_seen_once_an_epoch_and_no_iteration_is_short(tmp_path):
    batches = batches_of(split_of(tmp_path, 101, 68), rows=4, length=8)
    assert len(batches.rows) == 12 + 8  # a row needs the token after it, and never crosses a file
    batches = batches_of(
        batches.rows.split, rows=3, length=8
    )  # 20 rows are no multiple of 3: epochs end inside iterations
    seen = np.concatenate([batches.row_numbers(iteration) for iteration in range(20)])
    assert all(len(batches.row_numbers(iteration)) == 3 for iteration in range(20))
    for epoch in range(3):
        assert sorted(seen[epoch * 20 : epoch * 20 + 20]) == list(range(20))
    assert not np.array_equal(seen[:20], seen[20:40])


def test_targets_are_the_next_tokens_of_the_file(tmp_path):
    batches = batches_of(split_of(tmp_path, 101, 68), rows=20, length=8)
    ids, targets = next(batches.micro_batches(0, 20, CPU))
    assert ids.shape == targets.shape == (20, 8) and ids.dtype == torch.int64
    assert torch.equal(targets, ids + 1)
    assert sorted(ids[:, 0].tolist()) == [*range(0, 96, 8), *range(101, 101 + 64, 8)]


@pytest.mark.parametrize(("num_processes", "micro_batch"), [(1, 8), (1, 2), (2, 4), (4, 1)])
def test_the_batch_is_the_same_however_it_is_cut(tmp_path, num_processes, micro_batch):
    split = split_of(tmp_path, 1000)
    whole = sorted(next(batches_of(split, 8, 16).micro_batches(3, 8, CPU))[0][:, 0].tolist())
    parts = [
        ids
        for rank in range(num_processes)
        for ids, _ in batches_of(split, 8, 16, rank=rank, num_processes=num_processes).micro_batches(
            3, micro_batch, CPU
        )
    ]
    assert all(len(ids) == micro_batch for ids in parts)
    assert sorted(torch.cat(parts)[:, 0].tolist()) == whole


def test_the_order_stays_what_it_was_when_this_was_written():
    assert permutation(1337, 0, 10).tolist() == FIRST_EPOCH
    assert permutation(1337, 1, 10).tolist() != FIRST_EPOCH


FIRST_EPOCH = [2, 4, 5, 6, 9, 7, 3, 8, 0, 1]


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_validation_reads_every_target_once_over_all_processes(tmp_path, num_processes):
    split = split_of(tmp_path, 101, 68, 1)
    targets = [
        target
        for rank in range(num_processes)
        for _, batch in validation_batches(split, 8, 4, CPU, rank=rank, num_processes=num_processes)
        for target in batch.flatten().tolist()
    ]
    assert sorted(targets) == [*range(1, 101), *range(102, 169)]


def test_a_training_set_shorter_than_a_row_is_refused(tmp_path):
    with pytest.raises(InputError, match="has no row of that length"):
        batches_of(split_of(tmp_path, 8), rows=2, length=8)
