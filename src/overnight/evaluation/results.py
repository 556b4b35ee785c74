"""What an evaluation leaves behind: results.json, the items, comparison.md, and the figure in it."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from overnight.core.files import atomic_write, file_name, strict_json, write_figure
from overnight.core.published import redacted, text
from overnight.core.sums import SUMS, write_sums
from overnight.evaluation.statistics import ALPHA, LEVEL, RESAMPLES, Verdict, headline

GPT2_NAMES = ("openai-community/gpt2", "gpt2")
STANDARD_ERRORS = 3  # from the published figure, beyond which our measurement of GPT-2 is worth a warning
COLUMNS = (
    f"| task (metric) | chance | ours | theirs | difference, {LEVEL:.0%} interval | items only one has right "
    "| p after Holm | verdict |"
)


@dataclass
class Scores:
    """What one model reached: `validation` and `texts` as TokenLoss gives them, `tasks` by name."""

    facts: dict[str, Any]
    validation: dict[str, Any] | None = None
    texts: dict[str, dict[str, Any]] = field(default_factory=dict)
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass
class Comparison:
    """Our model against one other."""

    opponent: str
    verdicts: list[Verdict]
    validation: dict[str, float] | None  # difference of the losses with its interval, nats per token
    warnings: list[str]


@dataclass
class Results:
    """Everything that was measured; the same command gives the same again."""

    settings: dict[str, Any]
    models: list[Scores]  # ours first
    comparisons: list[Comparison]
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        """results.json."""
        compared = [
            {
                "opponent": each.opponent,
                "wins minus losses": headline(each.verdicts),
                "tasks": [
                    asdict(v)
                    | {"difference": v.difference, "verdict": v.word, "published": published_scores(each.opponent, v)}
                    for v in each.verdicts
                ],
                "validation": each.validation,
                "warnings": each.warnings,
            }
            for each in self.comparisons
        ]
        models = [asdict(scores) for scores in self.models]
        return {"settings": self.settings, "models": models, "comparisons": compared, "notes": self.notes}


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


def write_results(outcome: Results, items: dict[str, list[dict[str, Any]]], folder: Path) -> None:
    """Write the folder; `items` are the lines of each benchmark. comparison.md comes last."""
    (folder / "items").mkdir(parents=True, exist_ok=True)
    (folder / SUMS).unlink(missing_ok=True)  # until all of it is new
    for name, lines in items.items():
        atomic_write(folder / "items" / f"{file_name(name)}.jsonl", "".join(strict_json(line) + "\n" for line in lines))
    for left in folder.glob("against-*.png"):  # by an evaluation against others
        left.unlink()
    atomic_write(folder / "results.json", strict_json(redacted(outcome.as_json()), indent=1) + "\n")
    for comparison in outcome.comparisons:
        if comparison.verdicts:
            draw_differences(comparison, outcome.models[0].facts["name"], folder / figure_name(comparison.opponent))
    atomic_write(folder / "comparison.md", markdown(outcome))
    write_sums(folder)


def figure_name(opponent: str) -> str:
    """The file of the figure against this opponent."""
    return f"against-{file_name(opponent)}.png"


def markdown(outcome: Results) -> str:
    """comparison.md, which is to be understood without anything else at hand."""
    ours = outcome.models[0].facts
    lines = [f"# {text(ours['name'])}", ""]
    lines += [
        f"{ours['parameters']:,} parameters, context {ours['context']}. "
        f"Every model was measured by the same command in {outcome.settings['dtype']}, on the same items."
    ]
    for comparison in outcome.comparisons:
        lines += ["", f"## Against {text(comparison.opponent)}", "", *verdict_lines(comparison)]
        if comparison.verdicts:
            lines.append(f"![differences with intervals]({figure_name(comparison.opponent)})")
    lines += ["", "## Losses", "", *loss_lines(outcome)]
    if len(outcome.comparisons) != 1:
        lines += ["", "## Benchmarks", "", *score_lines(outcome)]
    if ties := tie_lines(outcome):
        lines += ["", "## Ties", "", *ties]
    lines += ["", "## How to read this", "", *[f"- {text(note)}" for note in outcome.notes]]
    return "\n".join(lines) + "\n"


def verdict_lines(comparison: Comparison, shown: Callable[[object], str] = text) -> list[str]:
    """The answer in sentences, the loss first, the table behind it, and warnings; `shown` is how names are."""
    found = comparison.verdicts
    lines = [f"**{loss_sentence(comparison.validation)}**", ""] if comparison.validation else []
    if not found:
        return [*lines, "No benchmark was asked for."]
    words = [verdict.word for verdict in found]
    better, worse = words.count("better"), words.count("worse")
    lines += [
        f"**Better on {better} of {len(found)} tasks, worse on {worse}, no difference shown on "
        f"{len(found) - better - worse}: wins minus losses {headline(found):+d}.**",
        "",
    ]
    reference = any(published_scores(comparison.opponent, verdict) is not None for verdict in found)
    heads = COLUMNS + (" published |" if reference else "")
    lines += [heads, "|" + "---|" * (heads.count("|") - 1)]
    for v in found:
        known = published_scores(comparison.opponent, v)
        row = [
            f"{shown(v.task)} ({shown(v.metric)}, {v.items:,} items)",
            f"{v.chance:.1%}",
            f"{v.ours:.1%}",
            f"{v.theirs:.1%}",
            f"{100 * v.difference:+.1f} ({100 * v.low:+.1f} to {100 * v.high:+.1f}) points",
            f"{v.only_ours} : {v.only_theirs}",
            f"{v.p_holm:.2g}",
            v.word,
        ]
        row += [] if not reference else [f"{known:.1%}" if known is not None else "no reference"]
        lines.append("| " + " | ".join(row) + " |")
    return [*lines, "", *[f"**Warning.** {shown(warning)}" for warning in comparison.warnings]]


def loss_sentence(validation: dict[str, float]) -> str:
    """Which model predicts the validation set better, from the difference of the losses and its interval."""
    difference, low, high = (validation[key] for key in ("difference", "low", "high"))
    word = "No difference shown" if low <= 0 <= high else "Better" if difference < 0 else "Worse"
    return f"{word} on the same validation text: {difference:+.3f} ({low:+.3f} to {high:+.3f}) nats per token."


def loss_lines(outcome: Results, shown: Callable[[object], str] = text) -> list[str]:
    """Losses of all models on all texts; `shown` is how names are."""
    lines = ["| text | model | nats per token | perplexity | bits per byte | tokens |", "|---|---|---|---|---|---|"]
    for scores in outcome.models:
        texts = ({"validation set": scores.validation} if scores.validation else {}) | scores.texts
        for name, found in texts.items():
            bits = f"{found['bits_per_byte']:.4f}" if found["bits_per_byte"] is not None else "-"
            lines.append(
                f"| {shown(name)} | {shown(scores.facts['name'])} | {found['loss']:.4f} | {found['perplexity']:.2f} "
                f"| {bits} | {found['tokens']:,} |"
            )
    if len(lines) == 2:
        return ["No loss was measured: the model belongs to no run, and neither `--shards` nor `--texts` was given."]
    for each in outcome.comparisons:
        if each.validation:
            v = each.validation
            lines += [
                "",
                f"On the validation set ours minus {shown(each.opponent)}: {v['difference']:+.4f} nats per token "
                f"({LEVEL:.0%} interval {v['low']:+.4f} to {v['high']:+.4f}, rows resampled).",
            ]
    return lines


def score_lines(outcome: Results) -> list[str]:
    """Scores of all models side by side."""
    names = [scores.facts["name"] for scores in outcome.models]
    lines = ["| task | chance | " + " | ".join(map(text, names)) + " |", "|---|---|" + "---|" * len(names)]
    for task, ours in outcome.models[0].tasks.items():
        each = [scores.tasks[task] for scores in outcome.models]
        values = [f"{s['metrics'][s['metric']]:.1%}" if s["metric"] in s["metrics"] else "-" for s in each]
        lines.append(f"| {text(task)} ({text(ours['metric'])}) | {ours['chance']:.1%} | " + " | ".join(values) + " |")
    return lines


def tie_note(task: dict[str, Any]) -> str:
    """What is said beside a task's score where choices are equally likely, and lm-eval's figure is another."""
    metric = task["metric"]
    if not task["ties"] or metric not in task["metrics"]:
        return ""
    lm_eval = f"lm-eval, which takes the first: {task['lm-eval'][metric]:.1%}"
    return f"; in {task['ties']:,} items the best choices tie and count as chance ({lm_eval})"


def tie_lines(outcome: Results) -> list[str]:
    """Each model's score in the tasks where that is so."""
    return [
        f"- {text(name)} ({text(task['metric'])}), {text(scores.facts['name'])}: "
        f"{task['metrics'][task['metric']]:.1%}{tie_note(task)}"
        for scores in outcome.models
        for name, task in scores.tasks.items()
        if tie_note(task)
    ]


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
            f"The validation set is held out from {home}, on which ours was trained and an opponent from elsewhere "
            "was not: that loss favours ours."
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


def draw_differences(comparison: Comparison, ours: str, path: Path) -> None:
    """The differences with their intervals, one line a task."""
    from matplotlib.figure import Figure  # without pyplot, which would look for a display

    found: Sequence[Verdict] = list(reversed(comparison.verdicts))
    colours = {"better": "#1a7f37", "worse": "#cf222e", "no difference shown": "#6e7781"}
    figure = Figure(figsize=(7, 1.2 + 0.4 * len(found)), layout="constrained")
    axes = figure.add_subplot()
    axes.axvline(0, color="black", linewidth=0.8)
    for height, verdict in enumerate(found):
        colour = colours[verdict.word]
        axes.plot([100 * verdict.low, 100 * verdict.high], [height, height], color=colour, linewidth=2)
        axes.plot([100 * verdict.difference], [height], "o", color=colour)
    axes.set_yticks(range(len(found)), [f"{each.task} ({each.metric})" for each in found], parse_math=False)
    axes.set_xlabel(f"percentage points, {LEVEL:.0%} intervals; right of zero ours is better")
    axes.set_title(f"{Path(ours).name} against {comparison.opponent}", fontsize=10, parse_math=False)
    for word, colour in colours.items():
        axes.plot([], [], "o-", color=colour, label=word)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    write_figure(path, figure, metadata={"Software": None})
