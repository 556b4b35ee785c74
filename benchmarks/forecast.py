"""Forecasts beside what came: of a public run from the beginning of its curve, and of our own small ladders.

The public curve is nanoGPT's GPT-2 124M on one RTX 4070 (facts/curve_practitioner_124m_rtx4070.csv). From its points up
to an iteration the mean of its last five is forecast; beside it stands the naive way, the law shifted to go through the
newest point.

The grid are small models on the embedded corpus that finish several budgets from one trunk, through recipes/train.py:
shapes, vocabularies, optimizers and schedules outside of what the scaling law was fitted to. What a forecast takes for
granted there was chosen on the first part of the grid; the second was looked at afterwards. Forecasts are made anew
from each run's validations as they came, on the trunk and inside of decays, for every budget that was still to come;
those of one run depend on each other, and none is of a budget that a learning rate which was changed later has reached.
A run that finished before is not trained again; --runs says where they are.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from overnight.planning import scaling_law
from overnight.planning.forecast import (
    FEWEST,
    Point,
    effective_tokens_at,
    forecast,
    forecast_of_run,
    usable,
    validations,
)
from overnight.planning.scaling_law import level_and_slope
from overnight.recipe.load import load
from overnight.recipe.schedule import branch_point, towards
from overnight.recipe.schema import Recipe
from overnight.run_dir.layout import finished_in, read_run
from overnight.run_dir.metrics import Metrics

ROOT = Path(__file__).resolve().parents[1]
UNIQUE = 100_000_000_000  # tokens of the set behind the public curve: more than one epoch is never begun
LAST = range(13_000, 15_001, 500)
SMALL = {
    "threads": 1,
    "data.val_tokens": 16_384,
    "validation.every": 10,
    "validation.prompts": [],
    "validation.ngram_baselines": False,
    "checkpoint.every": 1000,
    "schedule.warmup_iters": 8,
    "model.n_positions": 128,
    "model.n_head": 2,
    "batch.sequence_length": 128,
}


@dataclass(frozen=True)
class Shape:
    """A model, its optimizer and schedule, and the budgets that are finished from one trunk."""

    name: str
    layers: int
    width: int
    vocabulary: int
    tokens: int  # of an iteration
    budgets: tuple[int, ...]  # the last is the run's length
    optimizer: str
    lr: float
    decay: float  # fraction of each budget
    overrides: dict[str, object] = field(default_factory=dict)
    then_lr: float | None = None  # the learning rate when the first budget is finished
    seeds: tuple[int, ...] = (1, 2)

    def chosen(self, seed: int) -> dict[str, object]:
        """The overrides of the quickstart that make a run of it."""
        return {
            "name": f"{self.name}-seed{seed}",
            "seed": seed,
            **SMALL,
            "model.n_layer": self.layers,
            "model.n_embd": self.width,
            "model.vocab_size": self.vocabulary,
            "batch.tokens_per_iter": self.tokens,
            "schedule.milestones": list(self.budgets[:-1]),
            "schedule.max_iters": self.budgets[-1],
            "optim.name": self.optimizer,
            "optim.lr": self.lr,
            "schedule.decay_fraction": self.decay,
            "data.dir": f"data/v{self.vocabulary}",
            **self.overrides,
        }


TUNED = (
    Shape("embedding", 2, 32, 8192, 2048, (80, 160, 240), "muon", 8e-3, 0.3),
    Shape("adamw", 2, 48, 2048, 4096, (100, 200, 300), "adamw", 4e-3, 0.25),
    Shape("dropout", 3, 64, 512, 2048, (150, 270, 400), "muon", 6e-3, 0.2, {"model.dropout": 0.1}),
    Shape("wide", 1, 128, 4096, 4096, (120, 220, 320), "muon", 5e-3, 0.4),
    Shape("cosine", 2, 64, 1024, 4096, (300,), "adamw", 3e-3, 0.4, {"schedule.kind": "cosine"}),
    Shape("small-ladder", 2, 64, 1024, 8192, (300, 500, 750, 1000), "muon", 4e-3, 0.2, seeds=(11, 12)),
    Shape("quickstart", 4, 128, 4096, 4096, (80, 160, 240, 320), "muon", 8e-3, 0.4, seeds=(11, 12)),
    Shape("vocabulary", 2, 32, 16_384, 2048, (80, 160, 240), "muon", 8e-3, 0.3, seeds=(11, 12)),
    Shape("one-layer", 1, 64, 512, 2048, (200, 350, 500), "adamw", 5e-3, 0.15, seeds=(11, 12)),
    Shape("half-decay", 4, 64, 2048, 2048, (120, 240, 360), "muon", 1e-2, 0.5, seeds=(11, 12)),
    Shape("changed-rate", 2, 48, 1024, 4096, (120, 240, 360), "muon", 8e-3, 0.2, then_lr=2e-3, seeds=(11, 12)),
)
HELD_OUT = (
    Shape("deep", 6, 48, 1536, 2048, (100, 200, 300), "muon", 6e-3, 0.3, seeds=(21,)),
    Shape("large-vocab", 1, 48, 12_288, 2048, (120, 240, 360), "adamw", 5e-3, 0.35, seeds=(21,)),
    Shape("few-entries", 2, 64, 320, 4096, (120, 220, 330), "adamw", 6e-3, 0.25, seeds=(21,)),
    Shape("lowered-rate", 2, 64, 2048, 2048, (120, 240, 360), "muon", 6e-3, 0.3, then_lr=3e-3, seeds=(21,)),
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
    print(f"GPT-2 124M on an RTX 4070: mean of {LAST[0]:,} to {LAST[-1]:,} iterations, {came:.4f} nats per token")
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


def train(runs: Path, shape: Shape, seed: int) -> Path:
    """Train a run of the grid unless it is there; returns its run directory."""
    chosen = shape.chosen(seed)
    sessions = [chosen]
    if shape.then_lr:
        first = {"schedule.max_iters": shape.budgets[0], "schedule.milestones": []}
        sessions = [chosen | first, chosen | {"optim.lr": shape.then_lr}]
    runs.mkdir(parents=True, exist_ok=True)
    folder = runs / "runs" / str(chosen["name"])
    if finished_in(Metrics(folder / "metrics.jsonl").records()).keys() >= set(shape.budgets):
        return folder
    for number, overrides in enumerate(sessions):
        words = [word for key, value in overrides.items() for word in (f"--{key}", json.dumps(value).strip('"'))]
        allowed = ["--allow-change", "optim.lr"] if number else []
        command = [sys.executable, str(ROOT / "recipes" / "train.py"), str(ROOT / "recipes" / "quickstart.yaml")]
        with (runs / f"{chosen['name']}.log").open("a") as log:
            subprocess.run([*command, *words, *allowed], cwd=runs, stdout=log, stderr=log, check=True)
    return folder


def forecasts_of(folder: Path) -> Iterator[tuple[bool, scaling_law.Expected, float]]:
    """Every forecast that could be made while a run went on: (inside of a decay, forecast, what came)."""
    recipe, records = read_run(folder)
    schedule, unique = recipe.schedule, json.loads((folder / "environment.json").read_text())["unique_tokens"]
    came = {budget: end["val_loss"] for budget, end in finished_in(records).items()}
    change = max((at for at, record in enumerate(records) if record.get("key") == "optim.lr"), default=0)
    for at, record in enumerate(records):
        if record["kind"] != "val":
            continue
        decay, seen = record.get("cooldown"), validations(schedule, records[: at + 1])
        own = came if at > change else finished_in(records[:change])
        ahead = [budget for budget in own if record["iteration"] < budget and decay in (None, budget)]
        if schedule.kind == "wsd" and decay is None:
            ahead = [each for each in ahead if branch_point(towards(schedule, each)) >= record["iteration"]]
        if ahead and len(usable(recipe, seen)) >= FEWEST:
            found = forecast(recipe, unique, seen, [Point(each, towards(schedule, each)) for each in ahead])
            yield from ((decay is not None, found.at(number), came[each]) for number, each in enumerate(ahead))


def print_grid(runs: Path, title: str, shapes: Sequence[Shape]) -> None:
    """Print how many of the forecasts of each shape have what came in their 90 % interval."""
    print(f"\n{title}")
    print(
        f"{'':14}{'model':>8}{'vocabulary':>12}{'seeds':>7}{'trunk':>16}{'width':>8}{'decay':>14}{'width':>8}{'error':>9}"
    )
    sums: dict[bool, list[tuple[scaling_law.Expected, float]]] = {False: [], True: []}
    for shape in shapes:
        made: dict[bool, list[tuple[scaling_law.Expected, float]]] = {False: [], True: []}
        for seed in shape.seeds:
            for inside_decay, found, came in forecasts_of(train(runs, shape, seed)):
                made[inside_decay].append((found, came))
        print(
            f"{shape.name:14}{f'{shape.layers} x {shape.width}':>8}{shape.vocabulary:>12,}{len(shape.seeds):>7}"
            + coverage(made)
        )
        for side in sums:
            sums[side] += made[side]
    print(f"{'all':41}" + coverage(sums))


def coverage(made: dict[bool, list[tuple[scaling_law.Expected, float]]]) -> str:
    """Inside and all, the share, the median width; on the trunk and inside of decays; and the error, rms."""
    out = ""
    for side, width in ((False, 16), (True, 14)):
        inside = [low <= came <= high for found, came in made[side] for low, high in [found.interval()]]
        widths = [high - low for found, _ in made[side] for low, high in [found.interval()]]
        told = f"{sum(inside)}/{len(inside)} {sum(inside) / len(inside):.0%}" if inside else "-"
        out += f"{told:>{width}}" + (f"{statistics.median(widths):>8.3f}" if widths else f"{'-':>8}")
    errors = [found.loss - came for found, came in made[False]]
    return out + f"{math.sqrt(statistics.mean(error**2 for error in errors)):>9.3f}"


def cost(folder: Path, budgets: Sequence[int]) -> float:
    """Milliseconds of a forecast of a run, its file read, the median of several."""
    taken = []
    for _ in range(20):
        started = time.perf_counter()
        forecast_of_run(folder, [*budgets], None)
        taken.append(1000 * (time.perf_counter() - started))
    return statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "forecast", help="where the ladders are trained")
    runs = parser.parse_args().runs.resolve()
    forecast_public_run()
    print_grid(runs, "the part that the priors were chosen on, nats per token", TUNED)
    print_grid(runs, "the part that was looked at afterwards", HELD_OUT)
    ladder = next(shape for shape in TUNED if shape.name == "small-ladder")
    folder = train(runs, ladder, ladder.seeds[0])
    print(f"\na forecast from a whole curve, its file read: {cost(folder, ladder.budgets):.0f} ms")


if __name__ == "__main__":
    main()
