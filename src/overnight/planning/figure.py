"""What the figures of a plan and of a run share: their axes, the units on them, and the file they are drawn into."""

from __future__ import annotations

from typing import Any

from overnight.core.extras import require

UNITS = ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands"))


def new_axes(title: str, what: str) -> Any:
    """Empty axes with a title and losses upwards; `what` names the figure where matplotlib is missing."""
    require("figures", what)
    from matplotlib.figure import Figure  # without pyplot, which would look for a display

    axes = Figure(figsize=(9, 5.2), layout="constrained").add_subplot()
    axes.set_title(title, pad=10)
    axes.grid(alpha=0.3)
    axes.locator_params(axis="x", steps=[1, 2, 5, 10])
    axes.spines[["right"]].set_visible(False)
    return axes


def label_tokens(axes: Any, most: int, tokens_per_iter: set[int]) -> None:
    """Write tokens below, in billions or millions, and iterations above where all runs have equal ones."""
    size, word = next((unit for unit in UNITS if most >= unit[0]), (1.0, ""))
    axes.set_xlabel(f"training tokens, {word}" if word else "training tokens")
    axes.xaxis.set_major_formatter(lambda tokens, _: f"{tokens / size:g}")
    if len(tokens_per_iter) == 1:
        [each] = tokens_per_iter
        above = axes.secondary_xaxis("top", functions=(lambda tokens: tokens / each, lambda number: number * each))
        above.xaxis.set_major_formatter(lambda number, _: f"{number:,.0f}")
        above.set_xlabel("iterations")


def draw_gpt2(axes: Any, dataset: str, loss: float, *, right: bool = False) -> None:
    """A line at GPT-2 124M's published loss, with its name inside of the axes, at the end where no curve is near."""
    axes.axhline(loss, color="black", linestyle="--", linewidth=1)
    words = f"GPT-2 124M's published loss on {dataset}: {loss:.4f}"
    where = {"xytext": (-6 if right else 6, 4), "textcoords": "offset points", "fontsize": 8}
    where["ha"] = "right" if right else "left"
    axes.annotate(words, (int(right), loss), xycoords=("axes fraction", "data"), **where)
