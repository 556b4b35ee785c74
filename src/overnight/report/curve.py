"""The curve of a run as a figure: losses, forecasts as they were made, finished models, GPT-2's published loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from overnight.core.files import write_figure
from overnight.planning.figure import draw_gpt2, label_tokens, new_axes
from overnight.planning.scaling_law import gpt2_dataset
from overnight.planning.table import gpt2_loss
from overnight.recipe.schedule import branch_point, towards
from overnight.recipe.schema import Recipe
from overnight.run_dir.layout import finished_in, read_run
from overnight.run_dir.metrics import Record

HIGHEST = 1.2  # nats above the median validation loss that are shown
PLATE = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}  # behind words on lines
WINDOWS = 50  # a run's training loss is smoothed over its length divided by this


def draw_curve(runs: Sequence[Path], file: Path) -> None:
    """Draw the runs over each other into `file`, a .png, .svg or .pdf.

    Raises `InputError` for a folder that is no run, and a format that there is not.
    """
    read = {run.name: read_run(run) for run in runs}
    axes = new_axes(f"{', '.join(read)}: loss along the training", "a curve")
    bounds = []
    for number, (name, (recipe, records)) in enumerate(read.items()):
        whose = f"{name}, " if len(read) > 1 else ""
        bounds.append(_draw_run(axes, whose, recipe, records, f"C{number}"))
    for dataset in {each for recipe, _ in read.values() if (each := gpt2_dataset(recipe))}:
        draw_gpt2(axes, dataset, loss := gpt2_loss(dataset))
        bounds.append((loss, loss))
    axes.set_ylim(min(low for low, _ in bounds) - 0.2, max(high for _, high in bounds))
    axes.set_ylabel("loss, nats per token")
    recipes = [recipe for recipe, _ in read.values()]
    most = max(record["tokens"] for _, records in read.values() for record in records)
    label_tokens(axes, most, {recipe.batch.tokens_per_iter for recipe in recipes})
    axes.legend(loc="upper right", fontsize=8)
    write_figure(file, axes.figure)


def _draw_run(axes: Any, whose: str, recipe: Recipe, records: list[Record], color: str) -> tuple[float, float]:
    """One run, named in the legend where there are several; returns the losses between which it is worth looking at."""
    _draw_training(axes, whose, recipe, records, color)
    validations = _draw_validations(axes, whose, recipe, records, color)
    _draw_marks(axes, whose, recipe, records, color)
    expected = _draw_forecasts(axes, whose, recipe, records, color)
    return min([validations.min(), *expected]), float(np.median(validations)) + HIGHEST


def _branches(recipe: Recipe, records: list[Record]) -> dict[int, list[Record]]:
    """The records of each decay behind the last one of the trunk before it, by the milestone; of the trunk under 0."""
    trunk = [record for record in records if record.get("cooldown") is None]
    found = {0: trunk}
    for decay in sorted({record["cooldown"] for record in records if record.get("cooldown")}):
        leaves = branch_point(towards(recipe.schedule, decay))
        before = [record for record in trunk if record["iteration"] <= leaves]
        found[decay] = [*before[-1:], *(record for record in records if record.get("cooldown") == decay)]
    return found


def _draw_training(axes: Any, whose: str, recipe: Recipe, records: list[Record], color: str) -> None:
    """The training loss of the trunk and of each decay: a mean over neighbouring lines, the lines themselves behind."""
    training = [record for record in records if record["kind"] == "train"]
    window = max(1, len(training) // WINDOWS)
    label = f"{whose}training" + (f", mean of {window} lines" if window > 1 else "")
    for branch in _branches(recipe, training).values():
        tokens, losses = _series(branch)
        if not len(losses):  # fewer iterations than `logging.every`
            continue
        axes.plot(tokens, losses, color, alpha=0.2, linewidth=0.6)
        axes.plot(tokens, _moving_mean(losses, window), color, alpha=0.6, linewidth=1.2, label=label)
        label = "_"  # matplotlib's word for a curve that no legend names


def _draw_validations(axes: Any, whose: str, recipe: Recipe, records: list[Record], color: str) -> np.ndarray:
    """The validation losses, each decay joined to its trunk, and the finished models; returns all losses."""
    validations = [record for record in records if record["kind"] == "val"]
    branches = _branches(recipe, validations)
    axes.plot(*_series(branches.pop(0)), color=color, marker=".", label=f"{whose}validation")
    for number, branch in enumerate(branches.values()):
        label = "_" if number else f"{whose}validation in a decay"
        axes.plot(*_series(branch), color=color, marker=".", linestyle=":", label=label)
    ends = list(finished_in(records).values())
    where = [end["tokens"] for end in ends], [end["val_loss"] for end in ends]
    axes.plot(*where, color=color, marker="*", markersize=13, linestyle="", label=f"{whose}finished" if ends else "_")
    for end in ends:
        below = {"xytext": (0, -20), "textcoords": "offset points", "ha": "center", "fontsize": 8, "bbox": PLATE}
        axes.annotate(f"{end['iteration']:,}: {end['val_loss']:.3f}", (end["tokens"], end["val_loss"]), **below)
    return _series(validations)[1]


def _draw_marks(axes: Any, whose: str, recipe: Recipe, records: list[Record], color: str) -> None:
    """Where the run was resumed, where a decay began, and where a key of its recipe was changed."""
    decays = {record["cooldown"] for record in records if record.get("cooldown")}
    begun = [branch_point(towards(recipe.schedule, decay)) * recipe.batch.tokens_per_iter for decay in decays]
    resumed = [record["tokens"] for record in records if record.get("event") == "resumed"]
    for tokens, marker, height, word in ((begun, "v", 0.05, "decay begins"), (resumed, "^", 0.015, "resumed")):
        where = {"transform": axes.get_xaxis_transform(), "linestyle": "", "markersize": 6, "color": color}
        axes.plot(tokens, [height] * len(tokens), marker=marker, label=f"{whose}{word}" if tokens else "_", **where)
    for change in [record for record in records if record.get("event") == "changed"]:
        axes.axvline(change["tokens"], color=color, linestyle=":", linewidth=1)
        beside = {"xycoords": ("data", "axes fraction"), "rotation": 90, "ha": "right", "va": "bottom", "fontsize": 7}
        axes.annotate(f"{change['key']} {change['now']}", (change["tokens"], 0.1), **beside)


def _draw_forecasts(axes: Any, whose: str, recipe: Recipe, records: list[Record], color: str) -> list[float]:
    """What was said of the longest budget at each validation, and the newest at that budget's end; the losses."""
    forecasts = [record for record in records if record["kind"] == "forecast"]
    if not forecasts:
        return []
    budget = max(row["max_iters"] for record in forecasts for row in record["budgets"])
    made = [record for record in forecasts if record.get("cooldown", budget) == budget]
    said = [(r["tokens"], row) for r in made for row in r["budgets"] if row["max_iters"] == budget]
    tokens = [at for at, _ in said]
    low, high = ([row[key] for _, row in said] for key in ("loss_low", "loss_high"))
    axes.fill_between(tokens, low, high, color=color, alpha=0.12, linewidth=0)
    label = f"{whose}forecast of {budget:,} iterations, 90 %"
    expected = [row["loss"] for _, row in said]
    axes.plot(tokens, expected, color=color, linestyle="--", linewidth=1, label=label)
    if budget not in finished_in(records):
        _draw_newest(axes, budget * recipe.batch.tokens_per_iter, said[-1][1], color)
    return expected


def _draw_newest(axes: Any, end: int, row: Record, color: str) -> None:
    """The newest forecast of a budget, at the tokens with which it will end."""
    reach = [[row["loss"] - row["loss_low"]], [row["loss_high"] - row["loss"]]]
    axes.errorbar([end], [row["loss"]], reach, color=color, marker="D", markerfacecolor="white", capsize=4)
    words = f"forecast of {row['max_iters']:,}:\n{row['loss']:.3f} ({row['loss_low']:.3f}-{row['loss_high']:.3f})"
    beside = {"xytext": (-8, 0), "textcoords": "offset points", "ha": "right", "va": "center", "fontsize": 8}

    axes.annotate(words, (end, row["loss"]), color=color, **beside)


def _series(records: Sequence[Record]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and losses of the records whose loss is a number."""
    told = [record for record in records if record["loss"] is not None]
    return np.array([record["tokens"] for record in told]), np.array([record["loss"] for record in told], dtype=float)


def _moving_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of each value's neighbours, `window` of them, fewer at the ends; (len(values),)."""
    window = min(window, len(values))
    weights = np.ones(max(1, window))
    return np.convolve(values, weights, "same") / np.convolve(np.ones_like(values), weights, "same")
