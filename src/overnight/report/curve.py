"""The curve of a run as a figure: losses, forecasts as they were made, finished models, GPT-2's published loss."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from overnight.core.extras import require
from overnight.core.files import write_figure
from overnight.planning.scaling_law import gpt2_dataset
from overnight.planning.table import gpt2_loss
from overnight.run_dir.layout import finished_in, read_run
from overnight.run_dir.metrics import Record

BESIDE = {"xycoords": ("data", "axes fraction"), "rotation": 90, "ha": "right", "va": "top", "fontsize": 7}
HIGHEST = 1.2  # nats above the median validation loss that are shown


def draw_curve(runs: Sequence[Path], file: Path) -> None:
    """Draw the runs over each other into `file`, a .png, .svg or .pdf.

    Raises `InputError` for a folder that is no run, and a format that there is not.
    """
    require("figures", "a curve")
    from matplotlib.figure import Figure  # without pyplot, which would look for a display

    read = {run.name: read_run(run) for run in runs}
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot()
    bounds = []
    for number, (name, (_, records)) in enumerate(read.items()):
        bounds.append(_draw_run(axes, name, records, f"C{number}"))
    for dataset in {each for recipe, _ in read.values() if (each := gpt2_dataset(recipe))}:
        loss = gpt2_loss(dataset)
        axes.axhline(loss, color="black", linestyle="--", linewidth=1, label=f"GPT-2 124M, {dataset}, {loss:.4f}")
        bounds.append((loss, loss))
    axes.set_ylim(min(low for low, _ in bounds) - 0.1, max(high for _, high in bounds))
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss, nats a token")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    write_figure(file, figure)


def _draw_run(axes: Any, name: str, records: list[Record], color: str) -> tuple[float, float]:
    """One run; returns the losses between which it is worth looking at."""
    by_decay: dict[int | None, list[tuple[int, float]]] = defaultdict(list)
    for record in records:
        if record["kind"] == "val":
            by_decay[record.get("cooldown")].append((record["tokens"], record["loss"]))
    for decay in {record.get("cooldown") for record in records}:
        of_decay = [r for r in records if r["kind"] == "train" and r.get("cooldown") == decay]
        axes.plot([r["tokens"] for r in of_decay], [r["loss"] for r in of_decay], color, alpha=0.25, linewidth=0.7)
    trunk = by_decay.pop(None, [])
    axes.plot(*zip(*trunk, strict=True), color=color, marker=".", label=f"{name}, validation")
    for points in by_decay.values():
        joined = [max((point for point in trunk if point[0] < points[0][0]), default=points[0]), *points]
        axes.plot(*zip(*joined, strict=True), color=color, marker=".", linestyle=":")
    for change in [record for record in records if record.get("event") == "changed"]:
        axes.axvline(change["tokens"], color=color, linestyle=":", linewidth=1)
        axes.annotate(f"{change['key']} {change['now']}", (change["tokens"], 0.98), **BESIDE)
    for end in finished_in(records).values():
        axes.plot(end["tokens"], end["val_loss"], color=color, marker="*", markersize=13, linestyle="")
        where = {"xytext": (-4, -12), "textcoords": "offset points", "ha": "right", "fontsize": 8}
        axes.annotate(f"{end['iteration']:,}: {end['val_loss']:.3f}", (end["tokens"], end["val_loss"]), **where)
    expected = _draw_forecasts(axes, name, records, color)
    values = sorted(loss for points in (trunk, *by_decay.values()) for _, loss in points)
    return min([values[0], *expected]), values[len(values) // 2] + HIGHEST


def _draw_forecasts(axes: Any, name: str, records: list[Record], color: str) -> list[float]:
    """What was said of the longest budget at each validation, with its 90 % interval; returns the losses expected."""
    forecasts = [record for record in records if record["kind"] == "forecast"]
    if not forecasts:
        return []
    budget = max(row["max_iters"] for record in forecasts for row in record["budgets"])
    made = [record for record in forecasts if record.get("cooldown", budget) == budget]
    said = [(r["tokens"], row) for r in made for row in r["budgets"] if row["max_iters"] == budget]
    tokens = [at for at, _ in said]
    low, high = ([row[key] for _, row in said] for key in ("loss_low", "loss_high"))
    axes.fill_between(tokens, low, high, color=color, alpha=0.12, linewidth=0)
    label = f"{name}, forecast of {budget:,}, 90 %"
    expected = [row["loss"] for _, row in said]
    axes.plot(tokens, expected, color=color, linestyle="--", linewidth=1, label=label)
    return expected
