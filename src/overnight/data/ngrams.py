"""Unigram and bigram models of the training tokens: the scale on which a small model's loss is read."""

from __future__ import annotations

import numpy as np

from overnight.data.batches import TrainingBatches


def seen_tokens(batches: TrainingBatches, max_iters: int) -> list[np.ndarray]:
    """The rows, (length + 1,) tokens each, that a run of `max_iters` iterations trains on, each of them once."""
    rows = np.unique(np.concatenate([batches.row_numbers(iteration) for iteration in range(max_iters)]))
    return [batches.rows.read(int(row)) for row in rows]


def unigram(training_rows: list[np.ndarray], vocabulary: int) -> np.ndarray:
    """The share of each of `vocabulary` tokens among the targets of the rows, with add-one smoothing."""
    counts = np.bincount(np.concatenate([row[1:] for row in training_rows]), minlength=vocabulary)
    return (counts + 1) / (counts.sum() + vocabulary)


def ngram_losses(training_rows: list[np.ndarray], val: np.ndarray) -> dict[str, float]:
    """Mean cross-entropy, in nats per token, of unigram and bigram models of the rows on `val`'s tokens but the first.

    The unigram has add-one smoothing. The bigram is smoothed after Witten and Bell (1991, method C): after a token seen
    n times with t different successors, t / (n + t) of the probability goes to the unigram.
    """
    vocabulary = int(max(max(int(row.max()) for row in training_rows), int(val.max()))) + 1
    previous = np.concatenate([row[:-1] for row in training_rows]).astype(np.int64)
    following = np.concatenate([row[1:] for row in training_rows]).astype(np.int64)
    single = unigram(training_rows, vocabulary)

    pairs, pair_counts = np.unique(previous * vocabulary + following, return_counts=True)
    seen = np.bincount(previous, minlength=vocabulary)
    successors = np.bincount(pairs // vocabulary, minlength=vocabulary)
    before, after = val[:-1].astype(np.int64), val[1:].astype(np.int64)
    place = np.minimum(np.searchsorted(pairs, before * vocabulary + after), len(pairs) - 1)
    found = np.where(pairs[place] == before * vocabulary + after, pair_counts[place], 0)
    backing = np.where(successors[before] > 0, successors[before], 1)  # an unseen token: all to the unigram
    bigram = (found + backing * single[after]) / (seen[before] + backing)
    return {"unigram": float(-np.log(single[after]).mean()), "bigram": float(-np.log(bigram).mean())}
