"""Forecasts beside what came: of a public run from the beginning of its curve, and of our own small ladders.

The public curve is nanoGPT's GPT-2 124M on one RTX 4070 (facts/curve_practitioner_124m_rtx4070.csv). From its points up
to an iteration the mean of its last five is forecast; beside it stands the naive way, the law shifted to go through the
newest point.

The ladders are small models on the embedded corpus that finish several budgets from one trunk, on three seeds, through
recipes/train.py: one with the proportions of recipes/fineweb_edu_40m_ladder.yaml, which sees some forty tokens for each
parameter, and the quickstart's own, which sees one. What counts is the forecast that stands in metrics.jsonl at half of
the trunk. A run that finished before is not trained again; --runs says where they are.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from overnight.planning.forecast import Point, effective_tokens_at, forecast, forecast_of_run
from overnight.planning.scaling_law import level_and_slope
from overnight.recipe.load import load
from overnight.recipe.schema import Recipe

ROOT = Path(__file__).resolve().parents[1]
UNIQUE = 100_000_000_000  # tokens of the set behind the public curve: more than one epoch is never begun
LAST = range(13_000, 15_001, 500)
SEEDS = (1, 2, 3)


@dataclass(frozen=True)
class Ladder:
    """Budgets that are finished from one trunk, and where their forecasts are taken."""

    name: str
    budgets: tuple[int, ...]  # the last is the run's length
    half: int  # of the trunk
    overrides: dict[str, object]


LADDERS = (
    Ladder(
        "small",
        (300, 500, 750, 1000),
        half=400,
        overrides={
            "model.n_layer": 2,
            "model.n_head": 2,
            "model.n_embd": 64,
            "model.n_positions": 128,
            "model.vocab_size": 1024,
            "batch.sequence_length": 128,
            "batch.tokens_per_iter": 8192,
            "optim.lr": 4e-3,
            "schedule.decay_fraction": 0.2,
            "data.dir": "data/ladder",
            "data.val_tokens": 32_768,
        },
    ),
    Ladder("quickstart", (80, 160, 240, 320), half=90, overrides={}),
)


def public_recipe() -> Recipe:
    """The public run's, as far as a forecast looks at it."""
    overrides = ["--optim.name", "adamw", "--optim.lr", "6e-4", "--schedule.kind", "cosine"]
    overrides += ["--schedule.max_iters", "19073", "--schedule.warmup_iters", "715"]
    return load(ROOT / "recipes" / "gpt2_124m.yaml", overrides)


def public_curve(recipe: Recipe) -> list[tuple[Point, float]]:
    """Its validations."""
    file = resources.files("overnight") / "facts" / "curve_practitioner_124m_rtx4070.csv"
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return [(Point(int(row["iteration"]), recipe.schedule), float(row["val_loss"])) for row in csv.DictReader(lines)]


def naive(recipe: Recipe, newest: tuple[Point, float]) -> float:
    """The law's fall from the newest point on."""

    def law(iteration: int) -> float:
        return level_and_slope(recipe, effective_tokens_at(recipe, Point(iteration, recipe.schedule), UNIQUE))[0]

    point, loss = newest
    return loss + statistics.mean(law(iteration) for iteration in LAST) - law(point.iteration)


def forecast_public_run() -> None:
    """Print forecasts of the public run."""
    recipe = public_recipe()
    curve = public_curve(recipe)
    came = statistics.mean(loss for point, loss in curve if point.iteration in LAST)
    print(f"GPT-2 124M on an RTX 4070: mean of {LAST[0]:,} to {LAST[-1]:,} iterations, {came:.4f} nats a token")
    print(f"{'points up to':>12}{'forecast':>10}{'90 %':>16}{'error':>9}{'naive':>9}{'error':>9}")
    wanted = [Point(iteration, recipe.schedule) for iteration in LAST]
    for upto in (5_000, 7_500, 10_000):
        seen = [(point, loss) for point, loss in curve if point.iteration <= upto]
        found = forecast(recipe, UNIQUE, seen, wanted).mix(dict.fromkeys(range(len(wanted)), 1 / len(wanted)))
        low, high = found.interval()
        simple = naive(recipe, seen[-1])
        between = f"{low:.3f} to {high:.3f}"
        print(
            f"{upto:>12,}{found.loss:>10.4f}{between:>16}{found.loss - came:>+9.4f}{simple:>9.4f}{simple - came:>+9.4f}"
        )


def train(runs: Path, ladder: Ladder, seed: int) -> Path:
    """Train a ladder unless it is there; returns its run directory."""
    name = f"{ladder.name}-seed{seed}"
    chosen = {
        "name": name,
        "seed": seed,
        "threads": 1,
        "schedule.max_iters": ladder.budgets[-1],
        "schedule.milestones": list(ladder.budgets[:-1]),
        "validation.every": 10,
        "validation.prompts": [],
        "validation.ngram_baselines": False,
        **ladder.overrides,
    }
    words = [word for key, value in chosen.items() for word in (f"--{key}", json.dumps(value).strip('"'))]
    command = [sys.executable, str(ROOT / "recipes" / "train.py"), str(ROOT / "recipes" / "quickstart.yaml"), *words]
    runs.mkdir(parents=True, exist_ok=True)
    with (runs / f"{name}.log").open("a") as log:
        subprocess.run(command, cwd=runs, env=os.environ, stdout=log, stderr=log, check=True)
    return runs / "runs" / name


def forecast_ladder(runs: Path, ladder: Ladder) -> None:
    """Print what was forecast at half of the trunk beside what came."""
    length = ladder.budgets[-1]
    print(f"\nthe {ladder.name} ladder, {length} iterations, forecasts made at iteration {ladder.half}, nats per token")
    print(f"{'seed':>4}{'budget':>8}{'forecast':>10}{'90 %':>16}{'came':>9}{'error':>9}{'inside':>8}")
    inside, widths, errors = 0, [], []
    for seed in SEEDS:
        run = train(runs, ladder, seed)
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        (made,) = [
            r for r in records if (r["kind"], r["iteration"]) == ("forecast", ladder.half) and "cooldown" not in r
        ]
        came = {r["iteration"]: r["val_loss"] for r in records if r.get("event") == "finished"}
        for row in made["budgets"]:
            if (budget := row["max_iters"]) not in ladder.budgets:
                continue  # ending at once, which nobody did
            loss, low, high = row["loss"], row["loss_low"], row["loss_high"]
            hit = low <= came[budget] <= high
            inside += hit
            widths.append(high - low)
            errors.append(loss - came[budget])
            between = f"{low:.3f} to {high:.3f}"
            print(
                f"{seed:>4}{budget:>8}{loss:>10.4f}{between:>16}{came[budget]:>9.4f}{errors[-1]:>+9.4f}"
                f"{'yes' if hit else 'no':>8}"
            )
    rms = math.sqrt(statistics.mean(error**2 for error in errors))
    print(f"inside {inside} of {len(errors)}, median width {statistics.median(widths):.3f}, error {rms:.4f} rms")
    print(f"a forecast from the whole curve, its file read: {cost(run, ladder):.0f} ms")


def cost(run: Path, ladder: Ladder) -> float:
    """Milliseconds of a forecast of a run, the median of several."""
    taken = []
    for _ in range(20):
        started = time.perf_counter()
        forecast_of_run(run, [*ladder.budgets], None)
        taken.append(1000 * (time.perf_counter() - started))
    return statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "forecast", help="where the ladders are trained")
    runs = parser.parse_args().runs.resolve()
    forecast_public_run()
    for ladder in LADDERS:
        forecast_ladder(runs, ladder)


if __name__ == "__main__":
    main()
