"""What a run will reach, from its own curve: the loss of each budget with its uncertainty, as pure functions.

The curve is taken for

    loss = level + slope * (x^-beta - 1) / -beta + gain * lack + drift + noise

where x are the tokens over those of the last validation, level is what the model would have now if it were annealed,
slope its fall for each e-fold of tokens, gain what the run's longest decay takes off, and lack the share of it that is
still to come: 1 on a trunk, 0 at the end. Drift is a Brownian motion in log x and stands for all that no power law is.
Level, slope and gain have normal priors: from the scaling law where the run is inside of what that was fitted to.
Elsewhere they are what small models had, and the slope is a Brownian motion itself. It wanders the more the higher the
curve stands: one that rests at the loss of the word frequencies has its steepest fall before it. For given beta, drift,
noise, and the iterations that a decay needs for its gain, the forecast is a Gaussian conditional (Rasmussen & Williams
2006, section 2.7), and over a grid of these it is averaged by their evidence.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from overnight.errors import InputError
from overnight.planning import scaling_law
from overnight.recipe.schedule import CELLS, branch_point, decay_area, decay_iters, decay_share, lr_at, towards
from overnight.recipe.schema import Recipe, Schedule
from overnight.run_dir.layout import read_run
from overnight.run_dir.metrics import Record

FEWEST = 5  # validations from which a curve can be told
MOST = 48  # validations that are looked at, the newest
OLDEST = 1 / 8  # of the last validation's iteration: what came before tells little of what comes
BENDING = ("optim.", "model.", "batch.", "schedule.kind")  # keys that make another curve
WARM = 2  # warmups before a curve begins
DRIFTS = (0.003, 0.01, 0.03, 0.1)  # nats an e-fold of tokens, where the law says the rest
NOISES = (0.002, 0.005, 0.012, 0.03)  # nats
# Where no law says how a curve falls, chosen on the first part of the grid of benchmarks/forecast.py:
BETAS = (0.2, 0.6, 1.0)
DRIFT = 0.04  # nats an e-fold of tokens
SLOPE, SLOPE_SIGMA = 0.15, 0.08  # of the loss, an e-fold
SLOPE_DRIFT = 0.0028  # of the loss cubed, an e-fold, over one e-fold of tokens: a slope wanders less as a curve settles
GAIN = 0.03  # of the loss, and its standard deviation
MEMORIES = (10, 30, 100, 300)  # iterations
LOSS_AT_124M = 3.28  # nats on FineWeb, of the runs whose gain facts/scaling_law.json has
BEND = 0.3  # of the gain: how far a loss in the middle of a decay may be from its rate's share


@dataclass(frozen=True)
class Point:
    """A place on a run's curve: after so many iterations of a schedule."""

    iteration: int
    schedule: Schedule

    @property
    def to_come(self) -> float:
        """The share of a long decay's gain that is still to come.

        Under `wsd` the learning rate's share of its peak; of a cosine what facts/scaling_law.json says.
        """
        if self.schedule.kind == "cosine":
            return scaling_law.cosine_offset(self.iteration / self.schedule.max_iters) / scaling_law.wsd_offset()
        return 1.0 if self.iteration < self.schedule.warmup_iters else lr_at(self.iteration, self.schedule)

    def lack(self, memory: np.ndarray, longest: int) -> np.ndarray:
        """The same, of the gain of a decay of `longest` iterations, for each memory, (grid,).

        A decay's gain goes with its area in Tissue et al. 2024 (arXiv 2408.11029), whose momentum forgets in `memory`
        iterations.
        """
        if self.schedule.kind == "cosine" or not self.decayed:
            return np.full_like(memory, self.to_come)
        over = self.decayed / decay_iters(self.schedule)
        return 1 - decay_gain(over, self.decayed / memory) / decay_gain(1.0, longest / memory)

    @property
    def decayed(self) -> int:
        """Iterations of a decay that are over."""
        return max(0, self.iteration - branch_point(self.schedule))


@dataclass(frozen=True)
class Forecast:
    """Losses at several points, jointly normal, nats per token."""

    mean: np.ndarray  # (points,)
    covariance: np.ndarray  # (points, points)

    def at(self, point: int) -> scaling_law.Expected:
        """One of them."""
        return self.mix({point: 1.0})

    def gain(self, before: int, after: int) -> scaling_law.Expected:
        """By how much the loss at one point lies below that at another."""
        return self.mix({before: 1.0, after: -1.0})

    def mix(self, weights: dict[int, float]) -> scaling_law.Expected:
        """A weighted sum of losses."""
        vector = np.zeros(len(self.mean))
        vector[list(weights)] = list(weights.values())
        return scaling_law.Expected(float(vector @ self.mean), math.sqrt(max(0.0, vector @ self.covariance @ vector)))


def forecast(
    recipe: Recipe, unique: int | None, seen: Sequence[tuple[Point, float]], wanted: Sequence[Point]
) -> Forecast:
    """The validation losses to expect at the points `wanted`; `seen` are those that the run has had, in nats per token.

    `unique` are the training tokens there are. Raises `InputError` when the curve is too short.
    """
    used = usable(recipe, seen)
    if len(used) < FEWEST:
        every = recipe.validation.every
        enough = (-(-first_told(recipe) // every) + FEWEST - 1) * every
        raise InputError(
            f"{len(used)} validations after iteration {first_told(recipe)} are too few for a forecast: {FEWEST} are"
            f" needed, which are there at iteration {enough}"
        )
    # Where the points lie: e-folds of effective tokens from the last validation, which is at 0.
    points = [point for point, _ in used] + list(wanted)
    n, losses = len(used), np.array([loss for _, loss in used])
    last = max(point.iteration for point, _ in used)
    now = effective_tokens_at(recipe, Point(last, recipe.schedule), unique)
    time = np.array(
        [math.log(effective_tokens_at(recipe, point, unique) / now) for point in points]
    )  # e-folds of tokens
    # The grid: what each curve makes of level, slope and gain, and how each scatter lets points vary together.
    prior = prior_of(recipe, now, losses[-1])
    basis, log_prior = curves(prior, points, time, max(1, decay_iters(recipe.schedule)))  # (curves, points, 3)
    residual, noise = scatter(prior, points, time)  # (scatters, points, points), (scatters,)

    # Whitening: the losses, the curves and the points that are wanted, in units of the scatter, by its Cholesky factor.
    factor = np.linalg.cholesky(residual[:, :n, :n] + noise[:, None, None] ** 2 * np.eye(n))
    columns = np.column_stack([losses, basis[:, :n].swapaxes(0, 1).reshape(n, -1)])  # one solution serves all curves
    white = np.linalg.solve(factor, np.broadcast_to(columns, (len(noise), *columns.shape)))
    white_basis = white[..., 1:].reshape(len(noise), n, -1, 3).swapaxes(1, 2)  # (scatters, curves, n, 3)
    white_across = np.linalg.solve(factor, residual[:, :n, n:])[:, None]  # (scatters, 1, n, wanted)
    # Bayesian linear regression: the posterior of level, slope and gain, for each scatter and curve.
    surprise = white[:, None, :, :1] - (white_basis @ prior.mean)[..., None]  # (scatters, curves, n, 1)
    precision = white_basis.mT @ white_basis + np.diag(prior.sigma**-2)
    pull = white_basis.mT @ surprise
    shift = np.linalg.solve(precision, pull)  # of level, slope and gain from their prior means
    beyond = basis[:, n:] - white_across.mT @ white_basis  # (scatters, curves, wanted, 3)

    # The evidence of each scatter and curve (Rasmussen & Williams, equation 2.43), as weights that add up to 1.
    log_weight = log_prior - ((surprise**2).sum((2, 3)) - (pull * shift).sum((2, 3))) / 2
    log_weight -= np.log(np.diagonal(factor, axis1=1, axis2=2)).sum(1)[:, None] + np.linalg.slogdet(precision)[1] / 2
    share = np.exp(log_weight - log_weight.max())
    share /= share.sum()
    # The mixture: its mean, and by the law of total variance its covariance.
    means = basis[:, n:] @ prior.mean + (white_across.mT @ surprise + beyond @ shift)[..., 0]
    mean = np.einsum("sc,scw->w", share, means)
    covariances = residual[:, None, n:, n:] - white_across.mT @ white_across
    covariances = covariances + beyond @ np.linalg.solve(precision, beyond.mT)
    apart = means - mean
    spread = np.einsum("sc,scv,scw->vw", share, apart, apart)
    return Forecast(mean, np.einsum("sc,scvw->vw", share, covariances) + spread)


def usable(recipe: Recipe, seen: Sequence[tuple[Point, float]]) -> list[tuple[Point, float]]:
    """The part of a curve that tells what comes, in order."""
    newest = max((point.iteration for point, _ in seen), default=0)
    first = max(first_told(recipe), OLDEST * newest)
    return [(point, loss) for point, loss in seen if point.iteration >= first][-MOST:]


def first_told(recipe: Recipe) -> int:
    """The iteration from which a curve tells anything: the warmup is over for some time."""
    return max(1, WARM * recipe.schedule.warmup_iters)


def effective_tokens_at(recipe: Recipe, point: Point, unique: int | None) -> float:
    """Tokens up to a point that count: each by the learning rate's share of its peak, and less when repeated.

    A cosine's count in full after its warmup: so do those behind what facts/scaling_law.json says of it.
    """
    iteration, warmup = point.iteration, recipe.schedule.warmup_iters
    lost = warmup / 2 if iteration >= warmup else iteration - iteration**2 / (2 * warmup)
    if point.decayed:
        decay = decay_iters(point.schedule)
        lost += point.decayed - decay * decay_area(point.decayed / decay)
    return scaling_law.effective_tokens((iteration - lost) * recipe.batch.tokens_per_iter, unique)


@dataclass(frozen=True)
class Prior:
    """Normal priors of level, slope and gain in nats, and what is tried of everything else."""

    mean: np.ndarray  # (3,)
    sigma: np.ndarray  # (3,)
    betas: np.ndarray
    log_weight: np.ndarray  # of each beta
    drifts: tuple[float, ...]  # nats an e-fold
    slope_drift: float  # of the slope, nats an e-fold, over one e-fold of tokens
    memories: tuple[float, ...]  # iterations


def prior_of(recipe: Recipe, tokens: float, loss: float) -> Prior:
    """What is known before the first validation: the law's, or what small models had, where `loss` sets the scale.

    The gain inside of the law's range is what facts/scaling_law.json says of 124M, as a share of the loss.
    """
    if not scaling_law.in_fit_range(recipe):
        mean = np.array([loss, SLOPE * loss, GAIN * loss])
        sigma = np.array([2.0, SLOPE_SIGMA * loss, GAIN * loss])
        return Prior(mean, sigma, np.array(BETAS), np.zeros(len(BETAS)), (DRIFT,), SLOPE_DRIFT * loss**3, MEMORIES)
    decay = recipe.schedule.decay_fraction if recipe.schedule.kind == "wsd" else 0.0
    counted = 1 - decay * (1 - decay_area(1.0))
    level, slope = scaling_law.level_and_slope(recipe, tokens / counted)  # the law counts all tokens of an annealed run
    gain = scaling_law.wsd_offset() / LOSS_AT_124M * level
    sigma = np.array([scaling_law.constants()["sigma_nats"]["uncalibrated"], 0.2 * slope, 0.2 * gain])
    z = np.linspace(-2, 2, 9)  # standard deviations of the logarithm of beta, a tenth each
    betas = scaling_law.constants()["beta"] * np.exp(0.1 * z)
    return Prior(np.array([level, slope, gain]), sigma, betas, -(z**2) / 2, DRIFTS, 0.0, memories=(1, 1000))


def curves(prior: Prior, points: Sequence[Point], time: np.ndarray, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """What level, slope and gain are multiplied with, (curves, points, 3), and the log of each curve's prior weight.

    A curve is a beta and a memory.
    """
    pairs = itertools.product(zip(prior.betas, prior.log_weight, strict=True), prior.memories)
    beta, log_weight, memory = np.array([(*of_beta, memory) for of_beta, memory in pairs]).T
    fall = np.expm1(-beta[:, None] * time) / beta[:, None]
    lack = np.stack([point.lack(memory, longest) for point in points], axis=1)
    return np.stack([np.ones_like(fall), fall, lack], axis=-1), log_weight


def scatter(prior: Prior, points: Sequence[Point], time: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The covariance of what no curve is, (scatters, points, points), and the noise of a validation, (scatters,)."""
    drift, noise = np.array(list(itertools.product(prior.drifts, NOISES))).T
    left = np.array([point.to_come for point in points])
    bend = BEND * prior.mean[2] * 4 * left * (1 - left)
    wandering = prior.slope_drift**2 * twice_brownian(time)
    return drift[:, None, None] ** 2 * brownian(time) + wandering + np.diag(bend**2), noise


def decay_gain(over: float, memories: np.ndarray) -> np.ndarray:
    """The part of a decay's gain that the part `over` of it has brought, which took so many memories; (grid,).

    Each fall of the learning rate brings its share of the gain as its momentum is forgotten (Tissue et al.'s S2), so
    that a decay without end would bring 1. Exact for a learning rate that falls in straight pieces.
    """
    at = np.linspace(0, over, CELLS + 1)
    falls = -np.diff([decay_share(1 - each) for each in at])
    remembered = np.exp(-np.outer(memories, 1 - at / over))  # (grid, cells + 1)
    kept = np.diff(remembered, axis=1) / (memories[:, None] / CELLS)  # the mean over each cell
    return ((1 - kept) * falls).sum(1)


def brownian(time: np.ndarray) -> np.ndarray:
    """The covariance, (points, points), of a Brownian motion that is 0 at time 0, before and after it."""
    before, after = np.minimum(time, 0), np.maximum(time, 0)
    return np.minimum.outer(-before, -before) + np.minimum.outer(after, after)


def twice_brownian(time: np.ndarray) -> np.ndarray:
    """The same of the integral of one."""

    def one_side(time: np.ndarray) -> np.ndarray:
        shorter, longer = np.minimum.outer(time, time), np.maximum.outer(time, time)
        return shorter**2 * (3 * longer - shorter) / 6

    return one_side(np.maximum(-time, 0)) + one_side(np.maximum(time, 0))


def validations(schedule: Schedule, records: list[Record]) -> list[tuple[Point, float]]:
    """The curve that the validations among a run's records are, of its trunk and of its decays.

    Where the learning rate, or another key that bends the curve, was changed on the way, another curve begins. Decays
    that were trained before belong to the one before, and may have gone further than the change.
    """
    changes = [at for at, r in enumerate(records) if r.get("event") == "changed" and r["key"].startswith(BENDING)]
    return [
        (Point(r["iteration"], towards(schedule, r["cooldown"]) if "cooldown" in r else schedule), r["loss"])
        for r in records[max(changes, default=-1) + 1 :]
        if r["kind"] == "val"
    ]


def forecast_of_run(folder: Path, budgets: list[int], unique: int | None) -> Forecast:
    """What the budgets of a run will end with, in their order; `unique` are its training tokens.

    Raises `InputError` where `folder` is no run, or its curve is too short.
    """
    recipe, records = read_run(folder)
    seen = validations(recipe.schedule, records)
    return forecast(recipe, unique, seen, [Point(budget, towards(recipe.schedule, budget)) for budget in budgets])
