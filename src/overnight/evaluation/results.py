"""What an evaluation leaves behind: results.json, the items, comparison.md, and the figure in it."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template

from overnight.core.files import atomic_write, file_name, strict_json, write_figure
from overnight.core.published import redacted, text
from overnight.core.sums import SUMS, write_sums
from overnight.evaluation.statistics import ALPHA, LEVEL, RESAMPLES, Verdict, headline

GPT2_NAMES = ("openai-community/gpt2", "gpt2")
STANDARD_ERRORS = 3  # from the published figure, beyond which our measurement of GPT-2 is worth a warning
PAGE = Path(__file__).with_name("comparison.md")


def compared(opponent: str, verdicts: Sequence[Verdict], validation: dict[str, float] | None) -> dict[str, Any]:
    """Our model against one other; `validation` is the difference of the losses with its interval, nats per token."""
    tasks = [
        asdict(v) | {"difference": v.difference, "verdict": v.word, "published": published_scores(opponent, v)}
        for v in verdicts
    ]
    return {
        "opponent": opponent,
        "wins minus losses": headline(verdicts),
        "tasks": tasks,
        "validation": validation,
        "warnings": [warning for verdict in verdicts if (warning := implausible(opponent, verdict))],
    }


def published_scores(model: str, verdict: Verdict) -> float | None:
    """The published figure of GPT-2 124M under lm-eval for a task and metric, from facts/; None for anything else."""
    if model not in GPT2_NAMES:
        return None
    with (resources.files("overnight") / "facts" / "reference_scores.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            same = (row["model"], row["task"], row["metric"]) == ("gpt2-124m", verdict.task, verdict.metric)
            if same and row["harness"] == "lm-eval 0-shot":
                return float(row["value"])
    return None


def implausible(model: str, verdict: Verdict) -> str | None:
    """A warning when what we measured of GPT-2 is more than three standard errors from what was published."""
    known = published_scores(model, verdict)
    if known is None:
        return None
    error = math.sqrt(known * (1 - known) / verdict.items)
    if abs(verdict.theirs - known) <= STANDARD_ERRORS * error:
        return None
    return (
        f"{verdict.task}: {model} has {verdict.theirs:.4f} here and {known:.4f} in the published figure, "
        f"{abs(verdict.theirs - known) / error:.1f} standard errors away: explain that before you trust this table"
    )


def write_results(outcome: dict[str, Any], items: dict[str, list[dict[str, Any]]], folder: Path) -> None:
    """Write the folder; `items` are the lines of each benchmark. comparison.md comes last.

    `outcome` is what results.json holds: settings, the models' scores, ours first, comparisons and notes.
    """
    (folder / "items").mkdir(parents=True, exist_ok=True)
    (folder / SUMS).unlink(missing_ok=True)  # until all of it is new
    for name, lines in items.items():
        atomic_write(folder / "items" / f"{file_name(name)}.jsonl", "".join(strict_json(line) + "\n" for line in lines))
    for left in folder.glob("against-*.png"):  # by an evaluation against others
        left.unlink()
    atomic_write(folder / "results.json", strict_json(redacted(outcome), indent=1) + "\n")
    for comparison in outcome["comparisons"]:
        if comparison["tasks"]:
            draw_differences(comparison, outcome["models"][0]["facts"]["name"], folder)
    atomic_write(folder / "comparison.md", page().render(outcome, shown=text))
    write_sums(folder)


def figure_name(opponent: str) -> str:
    """The file of the figure against this opponent."""
    return f"against-{file_name(opponent)}.png"


def page() -> Template:
    """The template of comparison.md, which is to be understood without anything else at hand.

    Its values are those of results.json, and `shown`, which makes Markdown of foreign text.
    """
    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, keep_trailing_newline=True
    )
    functions = {"figure_name": figure_name, "tie_note": tie_note, "score": score, "level": f"{LEVEL:.0%}"}
    return environment.from_string(PAGE.read_text(encoding="utf-8"), globals=functions)


def console_lines(outcome: dict[str, Any]) -> list[str]:
    """The answer for a terminal: verdicts and losses as the page has them, without Markdown's marks."""
    module: Any = page().make_module(outcome | {"shown": str})
    against = [f"\nagainst {each['opponent']}\n{module.verdicts(each)}" for each in outcome["comparisons"]]
    return "".join([*against, module.losses()]).replace("**", "").splitlines()


def score(task: dict[str, Any]) -> str:
    """A model's score in a task by the metric that decides it; nothing where it is not right or wrong."""
    value = task["metrics"].get(task["metric"])
    return "" if value is None else f"{value:.1%}"


def tie_note(task: dict[str, Any]) -> str:
    """What is said beside a task's score where choices are equally likely, and lm-eval's figure is another."""
    if not task["ties"] or not score(task):
        return ""
    lm_eval = f"lm-eval, which takes the first: {task['lm-eval'][task['metric']]:.1%}"
    return f"; in {task['ties']:,} items the best choices tie and count as chance ({lm_eval})"


def notes(settings: dict[str, Any], home: str | None) -> list[str]:
    """What a reader has to know, in sentences."""
    found = [
        "Benchmarks are lm-eval's tasks, prompts and metrics, zero-shot. The metric of each task was fixed beforehand.",
        f"A verdict is McNemar's exact test on the items that one model has right and the other wrong, at {ALPHA:.0%} "
        "after Holm's correction over the tasks of the table. Where no difference is shown, that does not show that "
        "there is none.",
        f"Intervals are from {RESAMPLES:,} paired bootstrap resamples, seed {settings['seed']}, not corrected for the "
        "number of tasks.",
        "Chance is the mean of one over the number of choices.",
    ]
    if home:
        found.append(
            f"The validation set is of {home}, like the text that ours was trained on. An opponent from elsewhere was "
            "not trained on it: that loss favours ours."
        )
    if settings["limit"]:
        found.append(f"Only the first {settings['limit']} items of each task were used: a first look, not a result.")
    if any(name in GPT2_NAMES for name in settings["against"]):
        found.append(
            "Published figures of GPT-2 124M are lm-eval's, zero-shot, shown for plausibility alone. Its published "
            "3.2924 nats on FineWeb-Edu is from another validation split (karpathy/build-nanogpt) and compares with "
            "nothing here."
        )
    return found


def draw_differences(comparison: dict[str, Any], ours: str, folder: Path) -> None:
    """A figure of the differences with their intervals, one line a task."""
    from matplotlib.figure import Figure  # without pyplot, which would look for a display

    found = comparison["tasks"][::-1]
    colours = {"better": "#1a7f37", "worse": "#cf222e", "no difference shown": "#6e7781"}
    figure = Figure(figsize=(7, 1.2 + 0.4 * len(found)), layout="constrained")
    axes = figure.add_subplot()
    axes.axvline(0, color="black", linewidth=0.8)
    for height, task in enumerate(found):
        colour = colours[task["verdict"]]
        axes.plot([100 * task["low"], 100 * task["high"]], [height, height], color=colour, linewidth=2)
        axes.plot([100 * task["difference"]], [height], "o", color=colour)
    axes.set_yticks(range(len(found)), [f"{each['task']} ({each['metric']})" for each in found], parse_math=False)
    axes.set_xlabel(f"percentage points, {LEVEL:.0%} intervals; right of zero ours is better")
    axes.set_title(f"{Path(ours).name} against {comparison['opponent']}", fontsize=10, parse_math=False)
    for word, colour in colours.items():
        axes.plot([], [], "o-", color=colour, label=word)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    write_figure(folder / figure_name(comparison["opponent"]), figure, metadata={"Software": None})
