"""Refits the scaling law to the sweep behind it, and predicts what public runs measured, each without its own run.

The sweep (facts/kempner_sweep.csv) is in nats per Llama token, so of the fit only the exponents carry over; the
constants of facts/scaling_law.json were set by GPT-2 runs on GPT-2 tokens. Both datasets share the exponents.

The public runs (facts/measured_runs.csv) are predicted by the law, the factor of a recipe and the offset of a set, both
estimated from the other runs. All of it is normal: a Gaussian conditional, averaged over the size of the effects by
their evidence in the other runs.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares

from overnight.planning.gpus import facts
from overnight.planning.scaling_law import Expected, annealed_loss, constants, cosine_offset

LARGEST, FEWEST = 3e8, 4.5e8  # parameters and tokens of the rows that the law was fitted to


@dataclass(frozen=True)
class Point:
    """One annealed model of the sweep."""

    dataset: str
    width: int
    block_parameters: float
    tokens: float
    loss: float  # nats per Llama token


def points() -> list[Point]:
    """The rows that the law was fitted to."""
    rows = [
        Point(
            row["dataset"],
            int(row["d_model"]),
            12.0 * int(row["n_layers"]) * int(row["d_model"]) ** 2,
            float(row["tokens"]),
            float(row["val_loss"]),
        )
        for row in facts("kempner_sweep.csv")
        if float(row["params"]) < LARGEST and float(row["tokens"]) > FEWEST
    ]
    return rows


@dataclass(frozen=True)
class Fit:
    """alpha and beta, and E, A, B of each dataset."""

    alpha: float
    beta: float
    linear: dict[str, np.ndarray]

    def predict(self, point: Point) -> float:
        """Nats per Llama token."""
        return float(terms(point, self.alpha, self.beta) @ self.linear[point.dataset])


def terms(point: Point, alpha: float, beta: float) -> np.ndarray:
    """What E, A and B are multiplied with, (3,)."""
    return np.array([1.0, (point.block_parameters / 1e7) ** -alpha, (point.tokens / 1e9) ** -beta])


def solve(data: list[Point], alpha: float, beta: float) -> Fit:
    """E, A, B of each dataset by linear least squares, at given exponents."""
    linear = {}
    for dataset in {point.dataset for point in data}:
        chosen = [point for point in data if point.dataset == dataset]
        matrix = np.stack([terms(point, alpha, beta) for point in chosen])
        linear[dataset] = np.linalg.lstsq(matrix, np.array([point.loss for point in chosen]), rcond=None)[0]
    return Fit(alpha, beta, linear)


def fit(data: list[Point]) -> Fit:
    """Exponents by least squares, the linear constants solved at each step."""

    def errors(exponents: np.ndarray) -> list[float]:
        found = solve(data, *exponents)
        return [found.predict(point) - point.loss for point in data]

    return solve(data, *least_squares(errors, x0=[0.2, 0.4], bounds=([0.02, 0.05], [1.0, 1.5])).x)


def rms(errors: list[float]) -> float:
    """Root of the mean square."""
    return float(np.sqrt(np.mean(np.square(errors))))


MUON_TOKENS = 0.52  # of AdamW's, for the same loss (Liu et al. 2025, arXiv 2502.16982): Muon's prior
TOKENS_PER_ITER = 524_288
COSINES = {  # iterations of the schedule; iterations of its warmup, None where they are not known
    "practitioner-40m": (20_000, None),
    "practitioner-124m": (19_073, 715),
}
RECIPES = {  # the other recipes are the law's reference, AdamW at 6e-4 under a cosine, whose factor is 1 by definition
    "practitioner-40m": "AdamW at 1e-3",
    "tuned-adamw-124m": "tuned",
    "rotary-adamw-124m": "tuned",
    "rotary-muon-124m": "tuned",  # with fewer tokens for the same loss
}
SIZES = list(itertools.product((0.01, 0.02, 0.04), (0.01, 0.02, 0.04), (0.015, 0.03, 0.045, 0.06)))
ANNEALED_NOISE, NOISE = 0.005, 0.015  # nats: of a run's end; of a validation on the way
OFFSET_SPREAD = 0.3  # of the offset of a cosine that has not ended, from one run to another
MUON_SPREAD = 0.01  # of the loss


@dataclass(frozen=True)
class Measured:
    """A row of facts/measured_runs.csv, and what the law says of it before any factor or offset."""

    run: str
    dataset: str
    recipe: str
    iteration: int
    loss: float
    law: float  # after annealing
    lack: float  # what an annealed run would be below it

    @property
    def expected(self) -> float:
        """The prior mean."""
        return self.law + self.lack


def measured_runs() -> list[Measured]:
    """All rows, in the order of the file."""
    rows = []
    for row in facts("measured_runs.csv"):
        run, iteration, tokens = row["run"], int(row["iteration"]), 1e9 * float(row["tokens_billions"])
        length, warmup = COSINES.get(run, (iteration, None))
        tokens -= (warmup or 0) / 2 * TOKENS_PER_ITER
        if run == "rotary-muon-124m":
            tokens /= MUON_TOKENS
        parameters, unique = (
            1e6 * float(row["params_nonembedding_millions"]),
            1e9 * float(row["unique_tokens_billions"]),
        )
        law = annealed_loss(parameters, tokens, unique, row["dataset"])
        lack = cosine_offset(iteration / length) if row["annealed"] == "no" else 0.0
        recipe = RECIPES.get(run, "reference")
        rows.append(Measured(run, row["dataset"], recipe, iteration, float(row["val_loss"]), law, lack))
    return rows


def covariance(a: Measured, b: Measured, of_recipe: float, of_set: float, of_run: float) -> float:
    """What two rows have in common, in nats squared, given the standard deviations of the effects."""
    shared = of_set**2 * (a.dataset == b.dataset)
    if a.recipe == b.recipe != "reference":
        shared += of_recipe**2 * a.law * b.law
    if a.run == b.run:
        shared += of_run**2 + OFFSET_SPREAD**2 * a.lack * b.lack
    if a is b:
        shared += (NOISE if a.run in COSINES else ANNEALED_NOISE) ** 2
        shared += (MUON_SPREAD * a.law) ** 2 * (a.run == "rotary-muon-124m")
    return shared


def predicted(row: Measured, given: Sequence[Measured]) -> Expected:
    """A row's loss from the law and the rows `given`."""
    found = []
    above = np.array([other.loss - other.expected for other in given])
    for sizes in SIZES:
        between = np.array([[covariance(a, b, *sizes) for b in given] for a in given])
        across = np.array([covariance(row, other, *sizes) for other in given])
        solved = np.linalg.solve(between, np.column_stack([above, across]))
        evidence = -(above @ solved[:, 0] + np.linalg.slogdet(between)[1]) / 2
        spread = covariance(row, row, *sizes) - across @ solved[:, 1]
        found.append((row.expected + across @ solved[:, 0], spread, evidence))
    mean, spread, evidence = np.array(found).T
    share = np.exp(evidence - evidence.max()) / np.exp(evidence - evidence.max()).sum()
    loss = float(share @ mean)
    return Expected(loss, float(np.sqrt(share @ (spread + (mean - loss) ** 2))))


def predict_measured_runs() -> None:
    """Print every row beside what the other runs predict, and beside that with the row before it known."""
    rows, kinds = measured_runs(), defaultdict(list)
    print("\npublic runs, each predicted without itself: nats per GPT-2 token, errors, half of the 90 % interval")
    print(f"{'run':<23}{'iteration':>9}{'measured':>10}{'predicted':>11}{'error':>9}{'+/-':>7}{'row before known':>19}")
    for number, row in enumerate(rows):
        others = [other for other in rows if other.run != row.run]
        cold = predicted(row, others)
        told = f"{row.run:<23}{row.iteration:>9}{row.loss:>10.4f}{cold.loss:>11.4f}{shown(cold, row)}"
        if row.run not in COSINES:
            kinds["annealed"].append((cold, row))
        else:
            kinds["not annealed, cold"].append((cold, row))
            if rows[number - 1].run == row.run:
                known = predicted(row, [*others, rows[number - 1]])
                kinds["not annealed, row before known"].append((known, row))
                told += f"{shown(known, row):>19}"
        print(told)
    everything = [each for kind in kinds.values() for each in kind]
    print(f"\n{'':<36}{'rows':>6}{'largest error':>15}{'in the interval':>17}{'median width':>14}")
    for name, kind in [*kinds.items(), ("all", everything)]:
        worst = max(abs(expected.loss - row.loss) for expected, row in kind)
        bounds = [(*expected.interval(), row.loss) for expected, row in kind]
        inside = sum(low <= loss <= high for low, high, loss in bounds)
        width = statistics.median(high - low for low, high, _ in bounds)
        print(f"{name:<36}{len(kind):>6}{worst:>15.4f}{inside:>17}{width:>14.3f}")


def shown(expected: Expected, row: Measured) -> str:
    """The error, and half of the interval."""
    low, high = expected.interval()
    return f"{expected.loss - row.loss:>+9.4f}{(high - low) / 2:>7.3f}"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    data, law = points(), constants()
    whole = fit(data)
    print(f"{len(data)} models, exponents: alpha {whole.alpha:.4f}, beta {whole.beta:.4f}", end="")
    print(f" (facts/scaling_law.json: {law['alpha']:.4f}, {law['beta']:.4f})")
    ratios, known = [point.tokens / point.block_parameters for point in data], law["valid_range"]["D/N"]
    print(f"{min(ratios):.2f} to {max(ratios):.0f} tokens for each block parameter (facts/scaling_law.json: {known})")
    print(f"residuals of the fit: {rms([whole.predict(point) - point.loss for point in data]):.4f} nats rms")
    left_out: dict[int, list[float]] = defaultdict(list)
    for width in sorted({point.width for point in data}):
        others = fit([point for point in data if point.width != width])
        left_out[width] = [others.predict(point) - point.loss for point in data if point.width == width]
    print("\neach size predicted from the others, errors in nats per Llama token")
    print(f"{'width':>6}{'models':>8}{'mean':>9}{'rms':>8}{'largest':>9}")
    for width, errors in left_out.items():
        print(f"{width:>6}{line(errors)}")
    print(f"{'all':>6}{line([error for errors in left_out.values() for error in errors])}")
    predict_measured_runs()
    fit_batches()


def fit_batches() -> None:
    """Refit what larger updates cost, and print it beside the sweep that it is fitted to."""
    law = constants()["batch"]
    print(f"\nlosses of updates of other sizes, at {law['at_tokens']:.1e} tokens and the width of 384")
    print(f"{'':8}{'tokens':>10}{'loss':>8}{'fitted':>8}{'error':>8}{'rate':>8}")
    for optimizer, factor in (("adamw", "adamw_tuned_linear_to_0"), ("muon", "muon_wsd")):
        rows = [row for row in facts("batch_sizes.csv") if row["optimizer"] == optimizer]
        sizes, losses = (np.array([float(row[key]) for row in rows]) for key in ("tokens_per_iter", "loss"))
        found, at = fit_batch(sizes, losses, constants()["recipe_factor_on_loss"][factor])
        for row, loss, fitted in zip(rows, losses, at, strict=True):
            size, rate = int(row["tokens_per_iter"]), row["peak_lr"] or "-"
            mark = "" if size >= law["range"][0] else "   left out"
            print(f"{optimizer:8}{size:>10,}{loss:>8.3f}{fitted:>8.3f}{fitted - loss:>+8.3f}{rate:>8}{mark}")
        print(f"{'':8}critical size {found[0]:,.0f} tokens, power {found[1]:.3f}")


def fit_batch(sizes: np.ndarray, losses: np.ndarray, factor: float) -> tuple[tuple[float, float], np.ndarray]:
    """The critical size and the power of the batch's term, and the losses (n,) that it then gives."""
    law, beta = constants()["batch"], constants()["beta"]
    scale = factor * constants()["datasets"]["fineweb-edu"]["B"] * (law["at_tokens"] / 1e9) ** -beta

    def curve(of: np.ndarray) -> np.ndarray:  # of: the loss of small updates, the logarithm of the size, the power
        return of[0] + scale * ((1 + (sizes / np.exp(of[1])) ** of[2]) ** beta - 1)

    used = sizes >= law["range"][0]
    found = least_squares(lambda of: (curve(of) - losses)[used], [losses.min(), np.log(8e5), 1.5]).x
    return (float(np.exp(found[1])), float(found[2])), curve(found)


def line(errors: list[float]) -> str:
    """How many, their mean, root of the mean square, and the largest."""
    return f"{len(errors):>8}{statistics.mean(errors):>+9.4f}{rms(errors):>8.4f}{max(map(abs, errors)):>9.4f}"


if __name__ == "__main__":
    main()
