"""What each budget costs and reaches: one row for each number of iterations, and what they say together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from overnight.core.console import count, duration
from overnight.planning import scaling_law
from overnight.planning.gpus import USUAL, Gpu, Speed, facts, gpu_named
from overnight.planning.memory import Memory, by_formula
from overnight.planning.model_size import data_bytes, derive, run_bytes
from overnight.planning.roofline import validation_share
from overnight.recipe.schema import Recipe

MILESTONES = (6_000, 10_000, 15_000, 20_000)
VISIBLE = 2 * 0.02  # nats: two standard errors of a forecast that was set right on the same validation set


@dataclass(frozen=True)
class Prices:
    """What the user pays, and how long a night is."""

    hours_per_night: float = 10.0
    per_kwh: float = 0.30


@dataclass(frozen=True)
class Losses:
    """What budgets are expected to end with."""

    of: Mapping[int, scaling_law.Expected]  # by max_iters
    source: str
    caveats: list[str]


@dataclass(frozen=True)
class Row:
    """One budget. Hours and what follows from them are None where no speed is known."""

    max_iters: int
    tokens: int
    epochs: float | None  # of the unique tokens
    effective_tokens: float  # seen once, they would be worth as much
    loss: float  # the last validation's, nats a token
    loss_low: float  # the 90 % interval
    loss_high: float
    chance_below_gpt2: float  # of GPT-2 124M's published loss, which has another validation split
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
    gpu: str
    speed: Speed | None
    seconds_per_iteration: float | None
    validation_hours: float | None  # of the longest run
    memory: Memory | None
    disk_gb: float
    gpt2: float
    dataset: str
    rows: list[Row]
    losses: str  # what they stand on
    caveats: list[str]

    def cheapest_below_gpt2(self) -> int | None:
        """The fewest iterations whose expected loss is below GPT-2 124M's."""
        return next((row.max_iters for row in self.rows if row.loss < self.gpt2), None)

    def sweet_spot(self) -> int:
        """The last budget that is expected to gain on the one before what a validation could tell apart."""
        return [row.max_iters for row in self.rows if row.gain is None or row.gain >= VISIBLE][-1]

    def best(self) -> int:
        """The budget of the lowest expected loss."""
        return min(self.rows, key=lambda row: row.loss).max_iters

    def as_json(self) -> dict[str, Any]:
        """Everything, for other programs."""
        whole = asdict(self)
        return whole | {
            "cheapest_below_gpt2": self.cheapest_below_gpt2(),
            "sweet_spot": self.sweet_spot(),
            "best": self.best(),
        }


def gpt2_loss(dataset: str) -> float:
    """GPT-2 124M's published validation loss on one of the law's datasets, nats a token."""
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
    losses: Losses | None = None,
    prices: Prices = Prices(),
    memory: Memory | None = None,
) -> Budget:
    """The table. `unique` are the training tokens there are; without `losses` the law's own are expected, and without
    `memory` what the formula says of the card."""
    dataset = scaling_law.dataset_of(recipe)
    seconds = recipe.batch.tokens_per_iter / speed.tokens_per_second if speed else None
    losses = losses or by_law(recipe, milestones, unique)
    memory = memory or (by_formula(recipe, gpu) if gpu else None)
    looks = _validation_seconds(recipe, gpu, memory, speed) if speed else None
    rows: list[Row] = []
    for max_iters in sorted(set(milestones)):
        loss = losses.of[max_iters]
        hours = _hours(recipe, max_iters, speed, looks) if speed and looks is not None else None
        rows.append(_row(recipe, max_iters, rows[-1] if rows else None, gpu, hours, unique, loss, prices))
    return Budget(
        recipe=recipe.name,
        gpu=gpu.name if gpu else "unknown",
        speed=speed,
        seconds_per_iteration=seconds,
        validation_hours=looks * _validations(recipe, rows[-1].max_iters) / 3600 if looks is not None else None,
        memory=memory,
        disk_gb=(run_bytes(recipe) + data_bytes(recipe)) / 1e9,
        gpt2=gpt2_loss(dataset),
        dataset=dataset,
        rows=rows,
        losses=losses.source,
        caveats=losses.caveats,
    )


def by_law(recipe: Recipe, milestones: Sequence[int], unique: int | None, offset: float | None = None) -> Losses:
    """What the scaling law expects, shifted by `offset` nats where runs were measured."""
    return Losses(
        {max_iters: scaling_law.expected(recipe, max_iters, unique, offset) for max_iters in milestones},
        "nats per token, the scaling law of facts/scaling_law.json with 90 % intervals"
        + (f", shifted by {offset:+.3f} as measured" if offset is not None else ""),
        scaling_law.caveats(recipe, list(milestones)),
    )


def _row(
    recipe: Recipe,
    max_iters: int,
    before: Row | None,
    gpu: Gpu | None,
    hours: float | None,
    unique: int | None,
    expected: scaling_law.Expected,
    prices: Prices,
) -> Row:
    tokens = max_iters * recipe.batch.tokens_per_iter
    low, high = expected.interval()
    kwh = hours * gpu.tdp_watts / 1000 if hours is not None and gpu else None
    gain = before.loss - expected.loss if before else None
    longer = hours - before.hours if before and hours is not None and before.hours is not None else None
    return Row(
        max_iters=max_iters,
        tokens=tokens,
        epochs=tokens / unique if unique else None,
        effective_tokens=scaling_law.effective_tokens(tokens, unique),
        loss=expected.loss,
        loss_low=low,
        loss_high=high,
        chance_below_gpt2=expected.chance_below(gpt2_loss(scaling_law.dataset_of(recipe))),
        gain=gain,
        gain_per_hour=gain / longer if gain is not None and longer else None,
        hours=hours,
        nights=hours / prices.hours_per_night if hours is not None else None,
        kwh=kwh,
        cost=kwh * prices.per_kwh if kwh is not None else None,
    )


def _hours(recipe: Recipe, max_iters: int, speed: Speed, validation_seconds: float) -> float:
    """Iterations and validations of a run."""
    iterations = max_iters * recipe.batch.tokens_per_iter / speed.tokens_per_second
    return (iterations + _validations(recipe, max_iters) * validation_seconds) / 3600


def _validations(recipe: Recipe, max_iters: int) -> int:
    """How many a run has, the first look included."""
    return 1 + -(-max_iters // recipe.validation.every)


def _validation_seconds(recipe: Recipe, gpu: Gpu | None, memory: Memory | None, speed: Speed) -> float:
    """Of one validation. On a card that is not known it takes the share of a training step that it usually takes."""
    rows = memory.micro_batch if memory else derive(recipe, "cuda", 1, None).first_micro_batch
    share = validation_share(recipe, gpu or gpu_named(USUAL), rows)
    return recipe.data.val_tokens * share / speed.tokens_per_second


def lines(budget: Budget, prices: Prices) -> list[str]:
    """The table and the sentences under it, for a person."""
    head = ("iterations", "tokens", "epochs", "loss", "90 %", "below GPT-2", "gain", "per night", "hours", "nights")
    table = [(*head, "kWh", "money")]
    for row in budget.rows:
        per_night = row.gain_per_hour * prices.hours_per_night if row.gain_per_hour is not None else None
        table.append(
            (
                f"{row.max_iters:,}",
                count(row.tokens),
                _shown(row.epochs, ".2f"),
                f"{row.loss:.3f}",
                f"{row.loss_low:.3f}-{row.loss_high:.3f}",
                f"{row.chance_below_gpt2:.0%}",
                _shown(row.gain, ".3f"),
                _shown(per_night, ".3f"),
                _shown(row.hours, ".1f"),
                _shown(row.nights, ".1f"),
                _shown(row.kwh, ".1f"),
                _shown(row.cost, ".2f"),
            )
        )
    widths = [max(len(cells[column]) for cells in table) for column in range(len(head) + 2)]
    out = ["  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)) for cells in table]
    return [*out, "", *_sentences(budget), "", *_basis(budget, prices)]


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _sentences(budget: Budget) -> list[str]:
    rows = {row.max_iters: row for row in budget.rows}
    cheapest, sweet, best = budget.cheapest_below_gpt2(), budget.sweet_spot(), rows[budget.best()]
    if cheapest is None:
        first = f"No budget here is expected to pass GPT-2 124M's published {budget.gpt2:.4f}."
    else:
        chance = rows[cheapest].chance_below_gpt2
        first = (
            f"The cheapest expected to pass GPT-2 124M's published {budget.gpt2:.4f} ({budget.dataset}, another"
            f" validation split) is {cheapest:,} iterations, with a chance of {chance:.0%}."
        )
    return [
        first,
        f"The sweet spot is {sweet:,}: the last budget that gains {VISIBLE:.2f} nats or more on the one before, which"
        " a validation can tell apart.",
        f"The best is {best.max_iters:,}, {best.loss:.3f} expected"
        + (f", after {duration(best.hours * 3600)}." if best.hours is not None else "."),
    ]


def _basis(budget: Budget, prices: Prices) -> list[str]:
    """What the numbers stand on, and where they do not."""
    out = []
    if budget.speed and budget.seconds_per_iteration and budget.validation_hours is not None:
        rate = f"{count(budget.speed.tokens_per_second)} tokens a second"
        out += [
            f"hours     {rate}, {budget.seconds_per_iteration:.2f} s an iteration; {budget.speed.source}",
            f"          validations included, {budget.validation_hours:.1f} h of the longest; nights of"
            f" {prices.hours_per_night:g} h",
            f"energy    {budget.gpu} at its full power; {prices.per_kwh:g} a kWh",
        ]
    if budget.speed is None:
        out.append("hours     not known: the estimate is of bf16, which this card has not; --probe measures them")
    if budget.memory:
        rows = f"{budget.memory.micro_batch} rows at once"
        out.append(f"memory    {budget.memory.peak_gib:.1f} GiB with {rows}, {budget.memory.source}")
    out.append(f"disk      {budget.disk_gb:.1f} GB, the data included")
    out.append(f"loss      {budget.losses}")
    return out + [f"WARNING   {doubt}" for doubt in budget.caveats]
