"""`recipes/plan.py`: which card, how fast, which budgets, and the answer as a table, JSON or a figure."""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from overnight.core.extras import require
from overnight.core.files import strict_json
from overnight.data.manifest import is_prepared, read_manifest
from overnight.errors import InputError
from overnight.planning.forecast import forecast_of_run
from overnight.planning.gpus import USUAL, Gpu, Speed, gpu_named, known_gpus, present
from overnight.planning.memory import Memory, by_formula
from overnight.planning.model_size import derive, derived_rows
from overnight.planning.roofline import speed_of
from overnight.planning.scaling_law import in_fit_range, offset_of
from overnight.planning.table import Budget, Losses, Prices, budget, by_law, default_milestones, gpt2_loss, lines
from overnight.recipe.schema import Recipe


def plan(recipe: Recipe, chosen: argparse.Namespace, probe: Callable[[Recipe], dict[str, Any]]) -> int:
    """Print the plan that the command line asks for; returns the exit code. `probe` measures the device at hand."""
    milestones = _milestones(recipe, chosen.milestones)
    if not 0 < chosen.hours_per_night <= 24 or not 0 <= chosen.price_kwh < math.inf:
        raise InputError(
            f"`--hours-per-night {chosen.hours_per_night:g}`, `--price-kwh {chosen.price_kwh:g}`: 10 and 0.3 would work"
        )
    prices = Prices(chosen.hours_per_night, chosen.price_kwh)
    unique = unique_tokens(recipe)
    losses = _losses(recipe, milestones, unique, chosen.calibrate)
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


def unique_tokens(recipe: Recipe) -> int | None:
    """Training tokens there are: counted where the data is prepared, otherwise what the recipe asks for."""
    folder = Path(recipe.data.dir)
    if is_prepared(folder):
        return sum(record.tokens for record in read_manifest(folder).train)
    return recipe.data.train_tokens


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


def _losses(recipe: Recipe, milestones: list[int], unique: int | None, measured: Path | None) -> Losses:
    """What each budget will reach: by the law, by the law set right by runs in a table, or by the curve of a run."""
    if measured is None:
        return by_law(recipe, milestones, unique)
    if not measured.is_dir():
        return by_law(recipe, milestones, unique, _offset(recipe, measured))
    found = forecast_of_run(measured, milestones, unique)
    source = f"nats per token, forecast with 90 % intervals from the validations of {measured} so far"
    caveats = (
        [] if in_fit_range(recipe) else ["GPT-2's loss is of other text or other tokens, or the model of another size"]
    )
    return Losses({m: found.at(number) for number, m in enumerate(milestones)}, source, caveats)


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
        gpu = here[1] if here else gpu_named(USUAL)
    if chosen.throughput is not None:
        if not 0 < chosen.throughput < math.inf:
            raise InputError(f"`--throughput {chosen.throughput:g}`: tokens a second; 119500 would work")
        return [Card(gpu, Speed(chosen.throughput, "as you say"))]
    if chosen.probe or (here and gpu is None and not chosen.probe_file):  # a card that no table knows is measured
        return [_probed(recipe, gpu, chosen.probe_file, probe)]
    if chosen.probe_file:
        return [_probe_of(chosen.probe_file, gpu)]
    assert gpu is not None
    return [_estimated(recipe, gpu)]


def _estimated(recipe: Recipe, gpu: Gpu) -> Card:
    memory = by_formula(recipe, gpu)
    return Card(gpu, speed_of(recipe, gpu, memory.micro_batch), memory)


def _probed(recipe: Recipe, gpu: Gpu | None, file: Path | None, probe: Callable[[Recipe], dict[str, Any]]) -> Card:
    measured = probe(recipe)
    if file:
        file.write_text(strict_json(measured, indent=1) + "\n", encoding="utf-8")
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
        print(f"\n{each.recipe} on {each.gpu}\n")
        print("\n".join(lines(each, prices)))


def draw_plan(budgets: list[Budget], file: Path) -> None:
    """Loss against hours, or against iterations where no speed is known, with the intervals and GPT-2's line."""
    require("figures", "`--plot`")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    timed = all(row.hours is not None for each in budgets for row in each.rows)
    for each in budgets:
        x = [float((row.hours if timed else row.max_iters) or 0) for row in each.rows]
        axes.plot(x, [row.loss for row in each.rows], marker="o", label=each.gpu)
        axes.fill_between(x, [r.loss_low for r in each.rows], [r.loss_high for r in each.rows], alpha=0.15)
        for at, row in zip(x, each.rows, strict=True):
            axes.annotate(f"{row.max_iters:,}", (at, row.loss), xytext=(4, 6), textcoords="offset points", fontsize=8)
    gpt2 = gpt2_loss(budgets[0].dataset)
    axes.axhline(gpt2, color="black", linestyle="--", linewidth=1, label=f"GPT-2 124M, published {gpt2:.4f}")
    axes.set_xlabel("hours" if timed else "iterations")
    axes.set_ylabel("expected validation loss, nats a token; 90 % interval")
    axes.legend()
    try:
        figure.savefig(file, dpi=150)
    except (OSError, ValueError) as error:
        raise InputError(f"`--plot {file}`: {error}") from None
    finally:
        pyplot.close(figure)
