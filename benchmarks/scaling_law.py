"""Refits the scaling law's exponents to the sweep behind it, and predicts each model size from the others.

The sweep (facts/kempner_sweep.csv) is in nats per Llama token, so of the fit only the exponents carry over; the
constants of facts/scaling_law.json were set by GPT-2 runs on GPT-2 tokens. Both datasets share the exponents.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares

from overnight.gpus import facts
from overnight.law import constants

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


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    data, law = points(), constants()
    whole = fit(data)
    print(f"{len(data)} models, exponents: alpha {whole.alpha:.4f}, beta {whole.beta:.4f}", end="")
    print(f" (facts/scaling_law.json: {law['alpha']:.4f}, {law['beta']:.4f})")
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


def line(errors: list[float]) -> str:
    """How many, their mean, root of the mean square, and the largest."""
    return f"{len(errors):>8}{statistics.mean(errors):>+9.4f}{rms(errors):>8.4f}{max(map(abs, errors)):>9.4f}"


if __name__ == "__main__":
    main()
