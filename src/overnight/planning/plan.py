"""`recipes/plan.py`: which card, how fast, which budgets, and the answer as a table, JSON or a figure."""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from overnight.core.console import byte_count, count, duration
from overnight.core.files import atomic_write, strict_json, write_figure
from overnight.core.scripts import no_command
from overnight.data.manifest import with_prepared_data
from overnight.errors import InputError
from overnight.planning.figure import draw_gpt2, new_axes
from overnight.planning.forecast import forecast_of_run
from overnight.planning.gpus import USUAL, Gpu, Speed, gpu_named, known_gpus, present
from overnight.planning.memory import Memory, by_formula
from overnight.planning.model_size import derive, derived_rows
from overnight.planning.roofline import speed_of
from overnight.planning.scaling_law import offset_of
from overnight.planning.table import VISIBLE, Budget, Losses, Prices, budget, by_law, default_milestones
from overnight.recipe.schema import Recipe


def plan(recipe: Recipe, chosen: argparse.Namespace, probe: Callable[[Recipe], dict[str, Any]]) -> int:
    """Print the plan that the command line asks for; returns the exit code. `probe` measures the device at hand."""
    recipe, unique = with_prepared_data(recipe)
    milestones = _milestones(recipe, chosen.milestones)
    if not 0 < chosen.hours_per_night <= 24 or not 0 <= chosen.price_kwh < math.inf:
        raise InputError(
            f"`--hours-per-night {chosen.hours_per_night:g}`, `--price-kwh {chosen.price_kwh:g}`: 10 and 0.3 would work"
        )
    prices = Prices(chosen.hours_per_night, chosen.price_kwh)
    losses = partial(_losses, recipe, unique, chosen.calibrate)
    budgets = [
        budget(
            recipe, milestones, card.gpu, card.speed, unique=unique, losses=losses, prices=prices, memory=card.memory
        )
        for card in _cards(recipe, chosen, probe)
    ]
    if chosen.json:
        print(
            strict_json(budgets[0].as_json() if len(budgets) == 1 else [each.as_json() for each in budgets], indent=1)
        )
    else:
        _print(recipe, budgets, unique, prices)
    if chosen.plot:
        draw_plan(budgets, chosen.plot)
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
        return by_law(recipe, milestones, unique, _offset(recipe, measured))
    found = forecast_of_run(measured, list(milestones), unique)
    source = f"nats per token, forecast with 90 % intervals from the validations of {measured} so far"
    return Losses({m: found.at(number) for number, m in enumerate(milestones)}, source, [])


def _offset(recipe: Recipe, file: Path) -> float:
    try:
        rows = list(csv.DictReader(line for line in file.read_text(encoding="utf-8").splitlines() if line[:1] != "#"))
    except OSError as error:
        raise InputError(f"`--calibrate {file}`: {error.strerror}") from None
    return offset_of(rows, str(file), recipe)


class Card(NamedTuple):
    """What to plan for: a card, how fast it is with the recipe, and the memory that it takes."""

    gpu: Gpu | None
    speed: Speed | None
    memory: Memory | None = None


def _cards(recipe: Recipe, chosen: argparse.Namespace, probe: Callable[[Recipe], dict[str, Any]]) -> list[Card]:
    """The cards to plan for."""
    if chosen.gpu == "all":
        return [_estimated(recipe, gpu) for gpu in known_gpus().values()]
    here = present()
    if chosen.gpu:
        gpu: Gpu | None = gpu_named(chosen.gpu)
    else:
        gpu = here[1] if here else None
    if chosen.throughput is not None:
        if not 0 < chosen.throughput < math.inf:
            raise InputError(f"`--throughput {chosen.throughput:g}`: tokens a second; 119500 would work")
        return [Card(gpu, Speed(chosen.throughput, "as you say"))]
    if chosen.probe or (here and gpu is None and not chosen.probe_file):  # a card that no table knows is measured
        return [_probed(recipe, gpu, chosen.probe_file, probe)]
    if chosen.probe_file:
        return [_probe_of(chosen.probe_file, gpu)]
    return [_estimated(recipe, gpu) if gpu else Card(None, None)]


def _estimated(recipe: Recipe, gpu: Gpu) -> Card:
    memory = by_formula(recipe, gpu)
    return Card(gpu, speed_of(recipe, gpu, memory.micro_batch), memory)


def _probed(recipe: Recipe, gpu: Gpu | None, file: Path | None, probe: Callable[[Recipe], dict[str, Any]]) -> Card:
    measured = probe(recipe)
    if file:
        atomic_write(file, strict_json(measured, indent=1) + "\n")
    return _measured(gpu, measured, f"measured just now on {measured['device']}")


def _probe_of(file: Path, gpu: Gpu | None) -> Card:
    try:
        measured = json.loads(file.read_text(encoding="utf-8"))
        return _measured(gpu, measured, f"measured on {measured['device']}, {file}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"`--probe-file {file}`: not what `--probe --probe-file` writes ({error!r})") from None


def _measured(gpu: Gpu | None, measured: dict[str, Any], source: str) -> Card:
    """What a probe found; a CPU's memory says nothing of a card's."""
    speed, memory = Speed(float(measured["tokens_per_second"]), source), None
    if measured["formula_gib"] is not None:
        gib, formula = float(measured["peak_gib"]), float(measured["formula_gib"])
        source = f"by PyTorch's allocator, {source}; by the formula {formula:.1f}, the CUDA context included"
        memory = Memory(int(measured["micro_batch"]), gib, source)
    return Card(gpu, speed, memory)


def _print(recipe: Recipe, budgets: list[Budget], unique: int | None, prices: Prices) -> None:
    for name, value in derived_rows(recipe, derive(recipe, "cuda", 1, unique)):
        print(f"{name:<22}{value}")
    for each in budgets:
        print(f"\n{each.recipe} on {each.gpu or 'this machine'}\n")
        print("\n".join(lines(each, prices)))


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
                _shown(row.loss, ".3f"),
                f"{row.loss_low:.3f}-{row.loss_high:.3f}" if row.loss is not None else "-",
                _shown(row.chance_below_gpt2, ".0%"),
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
    return [*out, "", *_sentences(budget), *_basis(budget, prices)]


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _sentences(budget: Budget) -> list[str]:
    rows = {row.max_iters: row for row in budget.rows}
    cheapest, sweet, best = budget.cheapest_below_gpt2(), budget.sweet_spot(), budget.best()
    out = []
    if cheapest is not None:
        out.append(
            f"The cheapest expected to pass GPT-2 124M's published {budget.gpt2:.4f} ({budget.dataset}, another"
            f" validation split) is {cheapest:,} iterations, with a chance of {rows[cheapest].chance_below_gpt2:.0%}."
        )
    elif budget.gpt2 is not None and best is not None:
        out.append(f"No budget here is expected to pass GPT-2 124M's published {budget.gpt2:.4f}.")
    if best is not None:
        hours = rows[best].hours
        out += [
            f"The sweet spot is {sweet:,}: the last budget that gains {VISIBLE:.2f} nats or more on the one before,"
            " the least that a validation can show.",
            f"The best is {best:,}, {rows[best].loss:.3f} expected"
            + (f", after {duration(hours * 3600)}." if hours is not None else "."),
        ]
    return [*out, ""] if out else []


def _basis(budget: Budget, prices: Prices) -> list[str]:
    """What the numbers stand on, and where they do not."""
    out = []
    if budget.speed and budget.seconds_per_iteration and budget.validation_hours is not None:
        rate, each = f"{count(budget.speed.tokens_per_second)} tokens a second", budget.seconds_per_iteration
        out += [
            f"hours     {rate}, {f'{each:.2f} s' if each >= 0.1 else f'{1000 * each:.3g} ms'} an iteration;"
            f" {budget.speed.source}",
            f"          validations included, {budget.validation_hours:.1f} h of the longest; nights of"
            f" {prices.hours_per_night:g} h",
        ]
        if budget.gpu:
            out.append(f"energy    {budget.gpu} at its full power; {prices.per_kwh:g} per kWh")
    elif budget.gpu:
        out.append(
            "hours     not known: the estimate is for bf16, which this card does not have; --probe measures them"
        )
    else:
        out.append(
            f"hours     not known: there is no GPU here. `--gpu {USUAL}` plans for the card that the recipes are"
            " written for, `--probe` measures this machine"
        )
    if budget.memory:
        rows = f"{budget.memory.micro_batch} rows at once"
        out.append(f"memory    {budget.memory.peak_gib:.1f} GiB with {rows}, {budget.memory.source}")
    data = f", and at most {byte_count(1e9 * budget.data_gb)} more while the data is prepared" if budget.data_gb else ""
    out.append(f"disk      {byte_count(1e9 * budget.disk_gb)} for the run{data}")
    out.append(f"loss      {budget.losses}")
    return out + [f"WARNING   {doubt}" for doubt in budget.caveats]


def draw_plan(budgets: list[Budget], file: Path) -> None:
    """Loss against hours of one card; of several, which all reach the same loss, their hours."""
    if not any(each.expected for each in budgets):
        raise InputError(f"`--plot`: there is no loss to draw; {budgets[0].losses}")
    axes = _losses_by_budget(budgets[0]) if len(budgets) == 1 else _hours_by_card(budgets)
    write_figure(file, axes.figure)


def _losses_by_budget(plan: Budget) -> Any:
    """The expected losses with their intervals and GPT-2's line; over iterations where no speed is known."""
    rows = [row for row in plan.rows if row.loss is not None]
    timed = all(row.hours is not None for row in rows)
    where = f" on {plan.gpu}" if plan.gpu else ""
    axes = new_axes(f"{plan.recipe}{where}: what each budget is expected to reach", "`--plot`")
    x = np.array([row.hours if timed else row.max_iters for row in rows], dtype=float)
    loss, low, high = np.array([(row.loss, row.loss_low, row.loss_high) for row in rows], dtype=float).T
    axes.plot(x, loss, marker="o", label="expected validation loss")
    axes.fill_between(x, low, high, alpha=0.15, linewidth=0, label="90 % interval")
    for at, row in zip(x, rows, strict=True):
        words = f"{row.max_iters:,} iterations\n{count(row.tokens)} tokens\n{row.loss:.3f}"
        below = {"xytext": (0, -10), "textcoords": "offset points", "ha": "center", "va": "top", "fontsize": 8}
        axes.annotate(words, (at, row.loss), **below)
    if plan.gpt2 is not None and plan.dataset:
        draw_gpt2(axes, plan.dataset, plan.gpt2)
    axes.set_xlabel("hours" if timed else "iterations")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.set_ylabel("validation loss, nats per token")
    axes.margins(x=0.08)
    axes.legend(loc="upper right", fontsize=9)
    return axes


def _hours_by_card(budgets: list[Budget]) -> Any:
    """A bar for each card whose speed is known, the fastest first: the hours of its longest budget."""
    known = [(hours, str(each.gpu)) for each in budgets if (hours := each.rows[-1].hours) is not None]
    known.sort(reverse=True)
    axes = new_axes(f"{budgets[0].recipe}: hours for {budgets[0].rows[-1].max_iters:,} iterations", "`--plot`")
    axes.figure.set_figheight(2 + 0.2 * len(known))
    bars = axes.barh([card for _, card in known], [hours for hours, _ in known])
    axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    axes.set_xlabel("hours, an estimate from the parts of an iteration")
    axes.tick_params(axis="y", labelsize=8)
    axes.margins(y=0.01)
    return axes


if __name__ == "__main__":
    sys.exit(no_command("plan"))
