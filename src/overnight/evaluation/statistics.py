"""What the difference of two models on the same items is worth: intervals, tests, and a verdict for each task.

Paired throughout: the bootstrap resamples items (Efron, 1979, percentile interval), McNemar's test (1947) is the exact
one on the items that one model has right and the other wrong, and Holm's procedure (1979) keeps the chance of any false
verdict among the tasks below `ALPHA`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

ALPHA = 0.05
RESAMPLES = 10_000
LEVEL = 0.95
SEED = 1337
TASK_METRICS = {"hellaswag": "acc_norm", "arc_challenge": "acc_norm", "openbookqa": "acc_norm"}  # of all others: acc


@dataclass(frozen=True)
class Verdict:
    """One task: scores of both, the difference with its interval, and what the test says after Holm."""

    task: str
    metric: str
    items: int
    chance: float
    ours: float
    theirs: float
    low: float
    high: float
    only_ours: int  # items that only our model has right
    only_theirs: int
    p: float
    p_holm: float

    @property
    def difference(self) -> float:
        """Ours minus theirs."""
        return self.ours - self.theirs

    @property
    def word(self) -> str:
        """ "better", "worse" or "no difference shown"."""
        if self.p_holm >= ALPHA:
            return "no difference shown"
        return "better" if self.only_ours > self.only_theirs else "worse"


@dataclass(frozen=True)
class Paired:
    """A task's items: whether each model had each of them right, float (items,) of zeros and ones."""

    task: str
    metric: str
    chance: float
    ours: np.ndarray
    theirs: np.ndarray


def metric_of(task: str) -> str:
    """The metric that decides a task, fixed before any score is seen."""
    return TASK_METRICS.get(task, "acc")


def verdicts(tasks: Sequence[Paired], *, seed: int = SEED) -> list[Verdict]:
    """One verdict a task, each in the light of all."""
    wins = [int(((task.ours > 0.5) & (task.theirs < 0.5)).sum()) for task in tasks]
    losses = [int(((task.ours < 0.5) & (task.theirs > 0.5)).sum()) for task in tasks]
    p_values = [mcnemar(won, lost) for won, lost in zip(wins, losses, strict=True)]
    found = []
    for task, won, lost, p, p_holm in zip(tasks, wins, losses, p_values, holm(p_values), strict=True):
        low, high = bootstrap_interval(task.ours - task.theirs, seed=seed)
        ours, theirs = float(task.ours.mean()), float(task.theirs.mean())
        about = (task.task, task.metric, len(task.ours), task.chance)
        found.append(Verdict(*about, ours, theirs, low, high, won, lost, p, p_holm))
    return found


def headline(found: Sequence[Verdict]) -> int:
    """Wins minus losses, after Holm."""
    words = [verdict.word for verdict in found]
    return words.count("better") - words.count("worse")


def mcnemar(won: int, lost: int) -> float:
    """Two-sided exact p-value of `won` and `lost` items if each were a fair coin's; 1 where there is none."""
    return float(binomtest(won, won + lost, 0.5).pvalue) if won + lost else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values: to reject where one is below alpha has a family-wise error of at most alpha."""
    order = np.argsort(p_values)
    scaled = np.asarray(p_values, float)[order] * np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0) if len(order) else []
    return adjusted.tolist()


def bootstrap_interval(
    values: np.ndarray, weights: np.ndarray | None = None, *, seed: int = SEED, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """The percentile interval of the mean of `values` (items,), or of sum(values) / sum(weights), over resampled items.

    Equal items are drawn together: how often each kind comes up in a resample is multinomial, which is the same
    distribution as drawing one by one, and for answers that are right or wrong has three kinds.
    """
    pairs = np.stack([values, np.ones(len(values)) if weights is None else weights], axis=1)
    kinds, counts = np.unique(pairs, axis=0, return_counts=True)
    random = np.random.default_rng(seed)
    means = np.empty(resamples)
    at_once = max(1, 2_000_000 // len(kinds))
    for start in range(0, resamples, at_once):
        drawn = random.multinomial(len(values), counts / len(values), size=min(at_once, resamples - start))
        sums = drawn @ kinds  # (resamples, 2)
        means[start : start + at_once] = sums[:, 0] / sums[:, 1]
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
