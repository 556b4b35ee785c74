"""What each budget costs and reaches: one row for each number of iterations, and what they say together."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from overnight.core.console import duration
from overnight.planning import scaling_law
from overnight.planning.gpus import USUAL, Gpu, Speed, facts, gpu_named
from overnight.planning.memory import Memory, by_formula
from overnight.planning.model_size import data_bounded, data_bytes, derive, iterations_in_all, run_bytes
from overnight.planning.roofline import validation_share
from overnight.recipe.schedule import ending_now
from overnight.recipe.schema import Recipe, Schedule

MILESTONES = (6_000, 10_000, 15_000, 20_000)
SHORTEST_STEP = 0.1  # hours between two budgets from which a gain is carried over to a night
VISIBLE = 2 * 0.02  # nats: two standard errors of a forecast that was set right on the same validation set


class Card(NamedTuple):
    """What to plan for: a card, how fast it is with the recipe, and the memory that it takes; None is not known."""

    gpu: Gpu | None
    speed: Speed | None
    memory: Memory | None = None  # by the formula, unless it was measured
    at_hand: int = 1  # cards, or processes, of which the plan is for one


class Timing(NamedTuple):
    """How long the parts of a run take, in seconds."""

    iteration: float
    validation: float
    every: int  # iterations between two validations

    def validation_hours(self, max_iters: int) -> float:
        """Of all validations of a run, the first look included."""
        return (1 - -max_iters // self.every) * self.validation / 3600

    def hours(self, max_iters: int) -> float:
        """Of a run, validations included."""
        return max_iters * self.iteration / 3600 + self.validation_hours(max_iters)


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
    loss: float | None = None  # the last validation's, nats per token; None, like what follows, where nothing is known
    loss_low: float | None = None  # the 90 % interval
    loss_high: float | None = None
    chance_below_gpt2: float | None = None  # of GPT-2 124M's published loss, which has another validation split
    gain: float | None = None  # nats below the row before
    gain_per_hour: float | None = None
    hours: float | None = None  # validations included
    nights: float | None = None
    kwh: float | None = None  # at the card's full power
    cost: float | None = None


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
    data_gb: float | None  # while the data is prepared; 0 once it is, None where a recipe says nothing of its size
    data_bounded: bool  # whether that is the most; without a limit of tokens it is the least
    gpt2: float | None  # GPT-2 124M's published loss on the data set; None on any other text
    dataset: str | None
    rows: list[Row]
    in_one_run: dict[str, float] | None  # iterations, hours and so on of a run that finishes several on its way
    gain_of_smaller_batch: float | None  # nats after the longest budget's tokens, in updates of a quarter of the size
    losses: str  # what they stand on
    caveats: list[str]
    cheapest_below_gpt2: int | None  # the fewest iterations whose expected loss is below GPT-2 124M's
    sweet_spot: int | None  # the last that is expected to gain VISIBLE on the one before; None where no gain is known
    best: int | None  # of the lowest expected loss


def gpt2_loss(dataset: str) -> float:
    """GPT-2 124M's published validation loss on one of the law's datasets, nats per token."""
    wanted = ("gpt2-124m", f"{dataset}-val", "loss_nats_per_token")
    (row,) = [row for row in facts("reference_scores.csv") if (row["model"], row["task"], row["metric"]) == wanted]
    return float(row["value"])


def default_milestones(recipe: Recipe) -> list[int]:
    """6k, 10k, 15k and 20k up to the recipe's own length; of a shorter recipe the quarters."""
    longest = recipe.schedule.max_iters
    below = [milestone for milestone in MILESTONES if milestone < longest]
    return [*(below or {longest * part // 4 for part in (1, 2, 3)} - {0}), longest]


def budget(
    recipe: Recipe,
    card: Card,
    milestones: Sequence[int],
    unique: int | None,
    losses: Callable[[Sequence[int]], Losses],
    prices: Prices,
) -> Budget:
    """The table. `unique` are the training tokens there are. With `schedule.hours` the budget that fits has a row."""
    gpu, speed = card.gpu, card.speed
    memory = card.memory or (by_formula(recipe, gpu) if gpu else None)
    timing = _timing(recipe, gpu, speed, memory) if speed else None
    fits = _fitting(recipe.schedule, timing) if timing else None
    milestones = sorted({*milestones, *([fits] if fits else [])})
    expected, dataset = losses(milestones), scaling_law.gpt2_dataset(recipe)
    gpt2 = gpt2_loss(dataset) if dataset else None
    rows: list[Row] = []
    for max_iters in milestones:
        before, loss = rows[-1] if rows else None, expected.of.get(max_iters)
        spent = _spent(timing.hours(max_iters), gpu, prices) if timing else {}
        rows.append(_row(recipe, max_iters, unique, before, loss, gpt2, spent))
    return Budget(
        recipe=recipe.name,
        gpu=gpu.name if gpu else None,
        speed=speed,
        seconds_per_iteration=timing.iteration if timing else None,
        validation_hours=timing.validation_hours(rows[-1].max_iters) if timing else None,
        memory=memory,
        disk_gb=run_bytes(recipe) / 1e9,
        data_gb=data_bytes(recipe) / 1e9 if data_bounded(recipe) or recipe.data.fetched_gb else None,
        data_bounded=data_bounded(recipe),
        gpt2=gpt2,
        dataset=dataset,
        rows=rows,
        in_one_run=_in_one_run(recipe, timing, gpu, prices),
        gain_of_smaller_batch=(
            scaling_law.gain_of_smaller_batch(recipe, milestones[-1], unique) if rows[-1].loss is not None else None
        ),
        losses=expected.source,
        caveats=[*expected.caveats, *_caveats(recipe, card, memory, timing)],
        **_answers(rows, gpt2),
    )


def _fitting(schedule: Schedule, timing: Timing) -> int | None:
    """The longest budget of the run that fits its `hours`; None without these, and where the shortest is too long."""
    if schedule.hours is None or timing.hours(_shortest(schedule)) > schedule.hours:
        return None
    return bisect.bisect_right(range(1, schedule.max_iters + 1), schedule.hours, key=timing.hours)


def _shortest(schedule: Schedule) -> int:
    """The shortest budget that a run can finish: its decay begins when its warmup is over."""
    return ending_now(schedule, schedule.warmup_iters) or 1


def _caveats(recipe: Recipe, card: Card, memory: Memory | None, timing: Timing | None) -> list[str]:
    """What to mind of the hours and the memory of a plan."""
    schedule, asked, gpu, found = recipe.schedule, recipe.batch.micro_batch, card.gpu, []
    if timing and schedule.hours and timing.hours(shortest := _shortest(schedule)) > schedule.hours:
        found.append(
            f"`schedule.hours` {schedule.hours:g} is too short for any budget: the shortest, {shortest:,} iterations,"
            f" takes {duration(3600 * timing.hours(shortest))}"
        )
    if gpu and memory and asked != "auto" and asked > memory.micro_batch:
        found.append(
            f"`batch.micro_batch` {asked} does not fit the {gpu.vram_gib:g} GiB of {gpu.name}:"
            f" {memory.micro_batch} does, and the plan is for it"
        )
    if card.speed and card.speed.at_most:
        found.append(
            "the hours are a lower bound: so small a model waits for the launch of its kernels; --probe measures"
        )
    if card.at_hand > 1:
        found.append(
            f"the plan is for one card, and here are {card.at_hand}: how much faster these are was not measured"
        )
    return found


def _timing(recipe: Recipe, gpu: Gpu | None, speed: Speed, memory: Memory | None) -> Timing:
    """On a card that is not known a validation takes the share of a training step that it usually takes."""
    rows = memory.micro_batch if memory else derive(recipe, "cuda", 1, None).first_micro_batch
    share = validation_share(recipe, gpu or gpu_named(USUAL), rows)
    validation = recipe.data.val_tokens * share / speed.tokens_per_second
    return Timing(recipe.batch.tokens_per_iter / speed.tokens_per_second, validation, recipe.validation.every)


def _in_one_run(recipe: Recipe, timing: Timing | None, gpu: Gpu | None, prices: Prices) -> dict[str, float] | None:
    """What a run costs that finishes its milestones one after the other: the trunk once, and each decay."""
    if not recipe.schedule.milestones:
        return None
    iterations = iterations_in_all(recipe.schedule)
    return {"iterations": iterations, **(_spent(timing.hours(iterations), gpu, prices) if timing else {})}


def _spent(hours: float, gpu: Gpu | None, prices: Prices) -> dict[str, float]:
    spent = {"hours": hours, "nights": hours / prices.hours_per_night}
    if gpu:
        spent["kwh"] = hours * gpu.tdp_watts / 1000
        spent["cost"] = spent["kwh"] * prices.per_kwh
    return spent


def _row(
    recipe: Recipe,
    max_iters: int,
    unique: int | None,
    before: Row | None,
    expected: scaling_law.Expected | None,
    gpt2: float | None,
    spent: dict[str, float],
) -> Row:
    tokens, reached = max_iters * recipe.batch.tokens_per_iter, {}
    if expected:
        low, high = expected.interval()
        reached = {"loss": expected.loss, "loss_low": low, "loss_high": high}
    if expected and gpt2 is not None:
        reached["chance_below_gpt2"] = expected.chance_below(gpt2)
    if expected and before and before.loss is not None:
        reached["gain"] = before.loss - expected.loss
        longer = spent["hours"] - before.hours if before.hours is not None else 0
        if longer >= SHORTEST_STEP:
            reached["gain_per_hour"] = reached["gain"] / longer
    epochs, worth = scaling_law.epochs(recipe, max_iters, unique), scaling_law.effective_tokens(tokens, unique)
    return Row(max_iters, tokens, epochs, worth, **reached, **spent)


def _answers(rows: list[Row], gpt2: float | None) -> dict[str, int | None]:
    """What the rows say together; the fields of a `Budget`."""
    loss_of = {row.max_iters: row.loss for row in rows if row.loss is not None}
    gaining = [row.max_iters for row in rows if row.loss is not None and (row.gain is None or row.gain >= VISIBLE)]
    compared = any(row.gain is not None for row in rows)
    return {
        "cheapest_below_gpt2": next((m for m, loss in loss_of.items() if gpt2 is not None and loss < gpt2), None),
        "sweet_spot": max(gaining) if compared else None,
        "best": min(loss_of, key=lambda max_iters: loss_of[max_iters], default=None),
    }


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
