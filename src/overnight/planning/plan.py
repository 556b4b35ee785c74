"""`recipes/plan.py`: which card, how fast, which budgets, and the answer as a table, JSON or a figure."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from overnight.core.console import byte_count, count, duration
from overnight.core.files import atomic_write, strict_json, write_figure
from overnight.core.nvml import driver
from overnight.core.scripts import no_command
from overnight.data.manifest import with_prepared_data
from overnight.errors import InputError, first_line
from overnight.planning.figure import draw_gpt2, new_axes
from overnight.planning.forecast import forecast_of_run
from overnight.planning.gpus import USUAL, Gpu, Speed, gpu_named, known_gpus, match_gpu
from overnight.planning.memory import Memory, by_formula
from overnight.planning.model_size import derive, derived_rows
from overnight.planning.roofline import speed_of
from overnight.planning.scaling_law import offset_of
from overnight.planning.table import VISIBLE, Budget, Card, Losses, Prices, Row, budget, by_law, default_milestones
from overnight.recipe.schema import Recipe


def plan(recipe: Recipe, chosen: argparse.Namespace, probe: Callable[[Recipe], dict[str, Any]]) -> int:
    """Print the plan that the command line asks for; returns the exit code. `probe` measures the device at hand."""
    recipe, unique = with_prepared_data(recipe)
    milestones = _milestones(recipe, chosen.milestones)
    prices = Prices(chosen.hours_per_night, chosen.price_kwh)
    if not 0 < prices.hours_per_night <= 24 or not 0 <= prices.per_kwh < math.inf:
        raise InputError(
            f"`--hours-per-night {prices.hours_per_night:g}`, `--price-kwh {prices.per_kwh:g}`: 10 and 0.3 would work"
        )
    if chosen.plot and chosen.gpu == "all":
        raise InputError("`--plot` draws the losses of one card; `--gpu rtx-4070` would work")
    losses = partial(_losses, recipe, unique, chosen.calibrate)
    cards = [card._replace(at_hand=_at_hand(chosen)) for card in _cards(recipe, chosen, probe)]
    budgets = [budget(recipe, card, milestones, unique, losses, prices) for card in cards]
    if chosen.json:
        found = [asdict(each) for each in budgets]
        print(strict_json(found[0] if len(found) == 1 else found, indent=1))
    else:
        device = "cuda" if any(each.gpu for each in budgets) else "cpu"
        for name, value in derived_rows(recipe, derive(recipe, device, 1, unique)):
            print(f"{name:<22}{value}")
        for each in budgets:
            print(f"\n{each.recipe} on {each.gpu or 'this machine'}\n")
            print("\n".join(lines(each, prices)))
    if chosen.plot:
        draw_plan(budgets[0], chosen.plot)
    return 0


def _milestones(recipe: Recipe, given: str | None) -> list[int]:
    if given is None:
        return default_milestones(recipe)
    try:
        found = [int(part.replace("_", "")) for part in given.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise InputError(f"`--milestones {given}`: iterations with commas between would work, 6000,10000")
    return found


def _losses(recipe: Recipe, unique: int | None, measured: Path | None, milestones: Sequence[int]) -> Losses:
    """What each budget will reach: by the law, by the law set right by runs in a table, or by the curve of a run."""
    if measured is None:
        return by_law(recipe, milestones, unique)
    if not measured.is_dir():
        return by_law(recipe, milestones, unique, offset_of(measured, recipe))
    found = forecast_of_run(measured, list(milestones), unique)
    source = f"nats per token, forecast with 90 % intervals from the validations of {measured} so far"
    return Losses({m: found.at(number) for number, m in enumerate(milestones)}, source, [])


def _cards(recipe: Recipe, chosen: argparse.Namespace, probe: Callable[[Recipe], dict[str, Any]]) -> list[Card]:
    """The cards to plan for."""
    if chosen.gpu == "all":
        return [_estimated(recipe, gpu) for gpu in known_gpus().values()]
    detected = driver()
    here = detected.gpus[0] if detected else None
    gpu = gpu_named(chosen.gpu) if chosen.gpu else match_gpu(here.name, here.total_gib) if here else None
    if chosen.throughput is not None:
        if not 0 < chosen.throughput < math.inf:
            raise InputError(f"`--throughput {chosen.throughput:g}`: tokens a second; 119500 would work")
        return [Card(gpu, Speed(chosen.throughput, "as you say"))]
    if chosen.probe_file and not chosen.probe:
        return [_measured(gpu, *_read(chosen.probe_file))]
    if chosen.probe or (here and gpu is None):  # a card that no table knows is measured
        measured = probe(recipe)
        if chosen.probe_file:
            atomic_write(chosen.probe_file, strict_json(measured, indent=1) + "\n")
        found = Probed.model_validate(measured)
        return [_measured(gpu, found, f"measured just now on {found.device}")]
    return [_estimated(recipe, gpu) if gpu else Card(None, None)]


def _at_hand(chosen: argparse.Namespace) -> int:
    """Cards of this machine, unless one was named, or processes that a launcher has started; at least 1."""
    detected = None if chosen.gpu else driver()
    return max(1, len(detected.gpus) if detected else 1, int(os.environ.get("WORLD_SIZE") or 1))


def _estimated(recipe: Recipe, gpu: Gpu) -> Card:
    memory = by_formula(recipe, gpu)
    return Card(gpu, speed_of(recipe, gpu, memory.micro_batch), memory)


class Probed(BaseModel):
    """What the plan takes from what a probe has measured; a CPU's memory says nothing of a card's."""

    device: str
    tokens_per_second: float
    micro_batch: int
    peak_gib: float
    formula_gib: float | None


def _read(file: Path) -> tuple[Probed, str]:
    """What `--probe --probe-file` wrote, and where it is known from."""
    try:
        found = Probed.model_validate_json(file.read_bytes())
    except (OSError, ValueError) as error:
        problem = first_line(error)
        raise InputError(f"`--probe-file {file}`: not what `--probe --probe-file` writes ({problem})") from None
    return found, f"measured on {found.device}, {file}"


def _measured(gpu: Gpu | None, found: Probed, source: str) -> Card:
    memory = None
    if found.formula_gib is not None:
        beside = f"by the formula {found.formula_gib:.1f}, the CUDA context included"
        memory = Memory(found.micro_batch, found.peak_gib, f"by PyTorch's allocator, {source}; {beside}")
    return Card(gpu, Speed(found.tokens_per_second, source), memory)


HEADINGS = (
    *("iterations", "tokens", "epochs", "loss", "90 %", "below GPT-2", "gain", "per night"),
    *("hours", "nights", "kWh", "money"),
)


def lines(budget: Budget, prices: Prices) -> list[str]:
    """The table and the sentences under it, for a person."""
    table = [HEADINGS, *(_cells(row, prices) for row in budget.rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    out = ["  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)) for cells in table]
    return [*out, "", *_sentences(budget), *_basis(budget, prices)]


def _cells(row: Row, prices: Prices) -> tuple[str, ...]:
    per_night = None if row.gain_per_hour is None else row.gain_per_hour * prices.hours_per_night
    return (
        f"{row.max_iters:,}",
        count(row.tokens),
        _shown(row.epochs, ".2f"),
        _shown(row.loss, ".3f"),
        "-" if row.loss is None else f"{row.loss_low:.3f}-{row.loss_high:.3f}",
        _shown(row.chance_below_gpt2, ".0%"),
        *(_shown(value, ".3f") for value in (row.gain, per_night)),
        *(_shown(value, ".1f") for value in (row.hours, row.nights, row.kwh)),
        _shown(row.cost, ".2f"),
    )


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _sentences(budget: Budget) -> list[str]:
    """What the losses of all rows say together, and an empty line; nothing where no loss is expected."""
    rows = {row.max_iters: row for row in budget.rows}
    if budget.best is None:
        return []
    out, of = [], " of those with a prediction" if any(row.loss is None for row in budget.rows) else ""
    if budget.cheapest_below_gpt2 is not None:
        cheapest = rows[budget.cheapest_below_gpt2]
        out.append(
            f"The cheapest expected to pass GPT-2 124M's published {budget.gpt2:.4f} ({budget.dataset}, another"
            f" validation split) is {cheapest.max_iters:,} iterations, with a chance of"
            f" {cheapest.chance_below_gpt2:.0%}."
        )
    elif budget.gpt2 is not None:
        out.append(f"No budget here{of} is expected to pass GPT-2 124M's published {budget.gpt2:.4f}.")
    best = rows[budget.best]
    if budget.sweet_spot is not None:
        after = "" if best.hours is None else f", after {duration(best.hours * 3600)}"
        out += [
            f"The sweet spot{of} is {budget.sweet_spot:,}: the last budget that gains {VISIBLE:.2f} nats or more on the"
            " one before, two standard errors of a calibrated forecast.",
            f"The best{of} is {best.max_iters:,}, {best.loss:.3f} expected{after}.",
        ]
    return [*out, *_of_all(budget.in_one_run), ""]


def _of_all(whole: dict[str, float] | None) -> list[str]:
    """What the run costs that finishes all of the recipe's milestones."""
    if whole is None:
        return []
    words = {"iterations": "{:,} iterations", "hours": "{:.1f} hours", "kwh": "{:.1f} kWh", "cost": "money {:.2f}"}
    costs = ", ".join(form.format(whole[key]) for key, form in words.items() if key in whole)
    return [f"The recipe finishes all of its milestones in one run: {costs}."]


def _basis(budget: Budget, prices: Prices) -> list[str]:
    """What the numbers stand on, and where they do not."""
    out = [_basis_of_hours(budget, prices)]
    if budget.speed and budget.gpu:
        out.append(f"energy    {budget.gpu} at its full power; money at {prices.per_kwh:g} per kWh, in your currency")
    if memory := budget.memory:
        out.append(f"memory    {memory.peak_gib:.1f} GiB with {memory.micro_batch} rows at once, {memory.source}")
    bound = "at most" if budget.data_bounded else "at least"
    data = f", and {bound} {byte_count(1e9 * budget.data_gb)} more while the data is prepared" if budget.data_gb else ""
    data = "; what the data takes is not known before `prepare.py --dry-run`" if budget.data_gb is None else data
    out.append(f"disk      {byte_count(1e9 * budget.disk_gb)} for the run{data}")
    out.append(f"loss      {budget.losses}")
    if (gain := budget.gain_of_smaller_batch) is not None:
        out.append(f"batch     updates of a quarter of the tokens would end the longest run {gain:.3f} nats lower")
    return out + [f"WARNING   {caveat}" for caveat in budget.caveats]


def _basis_of_hours(budget: Budget, prices: Prices) -> str:
    if budget.speed and budget.seconds_per_iteration:
        each = budget.seconds_per_iteration
        return (
            f"hours     {count(budget.speed.tokens_per_second)} tokens a second,"
            f" {f'{each:.2f} s' if each >= 0.1 else f'{1000 * each:.3g} ms'} an iteration; {budget.speed.source}\n"
            f"          validations included, {budget.validation_hours:.1f} h of the longest; nights of"
            f" {prices.hours_per_night:g} h"
        )
    if budget.gpu:
        return "hours     not known: the estimate is for bf16, which this card does not have; --probe measures them"
    return (
        f"hours     not known: there is no GPU here. `--gpu {USUAL}` plans for the card that the recipes are"
        " written for, `--probe` measures this machine"
    )


def draw_plan(plan: Budget, file: Path) -> None:
    """The expected losses with their intervals and GPT-2's line over hours; over iterations where no speed is known."""
    if plan.best is None:
        raise InputError(f"`--plot`: there is no loss to draw; {plan.losses}")
    rows = [row for row in plan.rows if row.loss is not None]
    timed = all(row.hours is not None for row in rows)
    where = f" on {plan.gpu}" if plan.gpu else ""
    axes = new_axes(f"{plan.recipe}{where}: what each budget is expected to reach", "`--plot`")
    x = np.array([row.hours if timed else row.max_iters for row in rows], dtype=float)
    loss, low, high = np.array([(row.loss, row.loss_low, row.loss_high) for row in rows], dtype=float).T
    axes.plot(x, loss, marker="o", label="predicted last validation loss")
    axes.fill_between(x, low, high, alpha=0.15, linewidth=0, label="90 % interval")
    for at, row in zip(x, rows, strict=True):
        words = f"{row.max_iters:,} iterations\n{count(row.tokens)} tokens\n{row.loss:.3f}"
        below = {"xytext": (-4, -6), "textcoords": "offset points", "ha": "right", "va": "top", "fontsize": 8}
        axes.annotate(words, (at, row.loss), **below)  # on this side of a curve that falls less and less
    if plan.gpt2 is not None and plan.dataset:
        draw_gpt2(axes, plan.dataset, plan.gpt2, right=True)
    axes.set_xlabel("hours" if timed else "iterations")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.set_ylabel("validation loss, nats per token")
    axes.margins(x=0.16)  # room for the words beside the first
    axes.legend(loc="upper right", fontsize=9)
    write_figure(file, axes.figure)


if __name__ == "__main__":
    sys.exit(no_command("plan"))
