"""What each budget costs and reaches: one row for each number of iterations, and what they say together."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from overnight.planning import scaling_law
from overnight.planning.gpus import USUAL, Gpu, Speed, facts, gpu_named
from overnight.planning.memory import Memory, by_formula
from overnight.planning.model_size import data_bytes, derive, run_bytes
from overnight.planning.roofline import validation_share
from overnight.recipe.schema import Recipe

MILESTONES = (6_000, 10_000, 15_000, 20_000)
SHORTEST_STEP = 0.1  # hours between two budgets from which a gain is carried over to a night
VISIBLE = 2 * 0.02  # nats: two standard errors of a forecast that was set right on the same validation set


@dataclass(frozen=True)
class Prices:
    """What the user pays, and how long a night is."""

    hours_per_night: float = 10.0
    per_kwh: float = 0.30


@dataclass(frozen=True)
class Losses:
    """What budgets are expected to end with."""

    of: Mapping[int, scaling_law.Expected]  # by max_iters, of those of which something is known
    source: str
    caveats: list[str]


@dataclass(frozen=True)
class Row:
    """One budget. Hours and what follows from them are None where no speed is known."""

    max_iters: int
    tokens: int
    epochs: float | None  # of the unique tokens
    effective_tokens: float  # seen once, they would be worth as much
    loss: float | None  # the last validation's, nats per token; None, like what follows from it, where nothing is known
    loss_low: float | None  # the 90 % interval
    loss_high: float | None
    chance_below_gpt2: float | None  # of GPT-2 124M's published loss, which has another validation split
    gain: float | None  # nats below the row before
    gain_per_hour: float | None
    hours: float | None  # validations included
    nights: float | None
    kwh: float | None  # at the card's full power
    cost: float | None


@dataclass(frozen=True)
class Budget:
    """The rows of a recipe on a card, and what they have in common."""

    recipe: str
    gpu: str | None
    speed: Speed | None
    seconds_per_iteration: float | None
    validation_hours: float | None  # of the longest run
    memory: Memory | None
    disk_gb: float  # of the run folder
    data_gb: float  # at most, while the data is prepared; 0 once it is
    gpt2: float | None  # GPT-2 124M's published loss on the data set; None on any other text
    dataset: str | None
    rows: list[Row]
    losses: str  # what they stand on
    caveats: list[str]

    @property
    def expected(self) -> dict[int, float]:
        """The losses that are expected, by max_iters, ascending."""
        return {row.max_iters: row.loss for row in self.rows if row.loss is not None}

    def cheapest_below_gpt2(self) -> int | None:
        """The fewest iterations whose expected loss is below GPT-2 124M's."""
        if self.gpt2 is None:
            return None
        return next((max_iters for max_iters, loss in self.expected.items() if loss < self.gpt2), None)

    def sweet_spot(self) -> int | None:
        """The last budget that is expected to gain on the one before what a validation could tell apart."""
        rows = [row for row in self.rows if row.loss is not None]
        return max((row.max_iters for row in rows if row.gain is None or row.gain >= VISIBLE), default=None)

    def best(self) -> int | None:
        """The budget of the lowest expected loss."""
        return min(self.expected, key=lambda max_iters: self.expected[max_iters], default=None)

    def as_json(self) -> dict[str, Any]:
        """Everything, for other programs."""
        whole = asdict(self)
        return whole | {
            "cheapest_below_gpt2": self.cheapest_below_gpt2(),
            "sweet_spot": self.sweet_spot(),
            "best": self.best(),
        }


def gpt2_loss(dataset: str) -> float:
    """GPT-2 124M's published validation loss on one of the law's datasets, nats per token."""
    wanted = ("gpt2-124m", f"{dataset}-val", "loss_nats_per_token")
    (row,) = [row for row in facts("reference_scores.csv") if (row["model"], row["task"], row["metric"]) == wanted]
    return float(row["value"])


def default_milestones(recipe: Recipe) -> list[int]:
    """6k, 10k, 15k and 20k up to the recipe's own length; of a shorter recipe the quarters."""
    longest = recipe.schedule.max_iters
    below = [milestone for milestone in MILESTONES if milestone < longest]
    return [*(below or (longest * part // 4 for part in (1, 2, 3))), longest]


def budget(
    recipe: Recipe,
    milestones: Sequence[int],
    gpu: Gpu | None,
    speed: Speed | None,
    *,
    unique: int | None,
    losses: Callable[[Sequence[int]], Losses] | None = None,
    prices: Prices = Prices(),
    memory: Memory | None = None,
) -> Budget:
    """The table. `unique` are the training tokens there are; without `losses` the law's own are expected, and without
    `memory` what the formula says of the card. With `schedule.hours` the budget that fits them has a row."""
    dataset = scaling_law.gpt2_dataset(recipe)
    gpt2 = gpt2_loss(dataset) if dataset else None
    memory = memory or (by_formula(recipe, gpu) if gpu else None)
    looks = _validation_seconds(recipe, gpu, memory, speed) if speed else None
    milestones = sorted({*milestones, *_in_hours(recipe, speed, looks)})
    expected = losses(milestones) if losses else by_law(recipe, milestones, unique)
    rows: list[Row] = []
    for max_iters in milestones:
        hours = _hours(recipe, max_iters, speed, looks) if speed and looks is not None else None
        before, loss = rows[-1] if rows else None, expected.of.get(max_iters)
        rows.append(_row(recipe, max_iters, before, gpu, hours, unique, loss, prices, gpt2))
    return Budget(
        recipe=recipe.name,
        gpu=gpu.name if gpu else None,
        speed=speed,
        seconds_per_iteration=recipe.batch.tokens_per_iter / speed.tokens_per_second if speed else None,
        validation_hours=looks * _validations(recipe, rows[-1].max_iters) / 3600 if looks is not None else None,
        memory=memory,
        disk_gb=run_bytes(recipe) / 1e9,
        data_gb=data_bytes(recipe) / 1e9,
        gpt2=gpt2,
        dataset=dataset,
        rows=rows,
        losses=expected.source,
        caveats=expected.caveats,
    )


def by_law(recipe: Recipe, milestones: Sequence[int], unique: int | None, offset: float | None = None) -> Losses:
    """What the scaling law expects, shifted by `offset` nats where runs were measured, of budgets that it knows."""
    doubts = scaling_law.caveats(recipe, list(milestones), unique)
    if (why := scaling_law.unknown(recipe)) is not None:
        return Losses({}, f"nothing is expected: {why}", doubts)
    once = [m for m in milestones if (scaling_law.epochs(recipe, m, unique) or 0) <= scaling_law.MOST_EPOCHS]
    return Losses(
        {max_iters: scaling_law.expected(recipe, max_iters, unique, offset) for max_iters in once},
        "nats per token, the scaling law of facts/scaling_law.json with 90 % intervals"
        + (f", shifted by {offset:+.3f} as measured" if offset is not None else "")
        + (f"; nothing beyond {scaling_law.MOST_EPOCHS} epochs" if len(once) < len(milestones) else ""),
        doubts,
    )


def _row(
    recipe: Recipe,
    max_iters: int,
    before: Row | None,
    gpu: Gpu | None,
    hours: float | None,
    unique: int | None,
    expected: scaling_law.Expected | None,
    prices: Prices,
    gpt2: float | None,
) -> Row:
    tokens = max_iters * recipe.batch.tokens_per_iter
    low, high = expected.interval() if expected else (None, None)
    kwh = hours * gpu.tdp_watts / 1000 if hours is not None and gpu else None
    gain = before.loss - expected.loss if before and before.loss is not None and expected else None
    longer = hours - before.hours if before and hours is not None and before.hours is not None else 0
    return Row(
        max_iters=max_iters,
        tokens=tokens,
        epochs=scaling_law.epochs(recipe, max_iters, unique),
        effective_tokens=scaling_law.effective_tokens(tokens, unique),
        loss=expected.loss if expected else None,
        loss_low=low,
        loss_high=high,
        chance_below_gpt2=expected.chance_below(gpt2) if expected and gpt2 is not None else None,
        gain=gain,
        gain_per_hour=gain / longer if gain is not None and longer >= SHORTEST_STEP else None,
        hours=hours,
        nights=hours / prices.hours_per_night if hours is not None else None,
        kwh=kwh,
        cost=kwh * prices.per_kwh if kwh is not None else None,
    )


def _hours(recipe: Recipe, max_iters: int, speed: Speed, validation_seconds: float) -> float:
    """Iterations and validations of a run."""
    iterations = max_iters * recipe.batch.tokens_per_iter / speed.tokens_per_second
    return (iterations + _validations(recipe, max_iters) * validation_seconds) / 3600


def _in_hours(recipe: Recipe, speed: Speed | None, validation_seconds: float | None) -> list[int]:
    """The longest budget that fits `schedule.hours`, where these are given and the speed is known."""
    hours = recipe.schedule.hours
    if not (hours and speed and validation_seconds is not None):
        return []
    longest = int(3600 * hours * speed.tokens_per_second / recipe.batch.tokens_per_iter)
    return [
        bisect.bisect_right(range(1, longest + 1), hours, key=lambda n: _hours(recipe, n, speed, validation_seconds))
    ]


def _validations(recipe: Recipe, max_iters: int) -> int:
    """How many a run has, the first look included."""
    return 1 + -(-max_iters // recipe.validation.every)


def _validation_seconds(recipe: Recipe, gpu: Gpu | None, memory: Memory | None, speed: Speed) -> float:
    """Of one validation. On a card that is not known it takes the share of a training step that it usually takes."""
    rows = memory.micro_batch if memory else derive(recipe, "cuda", 1, None).first_micro_batch
    share = validation_share(recipe, gpu or gpu_named(USUAL), rows)
    return recipe.data.val_tokens * share / speed.tokens_per_second
