"""A finished model's report: a folder with its card, figures, recipe and measurements, from the run directory alone.

The card is the `README.md` of a model repository on the Hub (docs.huggingface.co/docs/hub/model-cards). What is said in
it stands in a file of the run; text that came from a recipe, a data set or a model is escaped.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from overnight.core.console import count, duration, plain
from overnight.core.files import atomic_write
from overnight.errors import InputError
from overnight.planning import scaling_law
from overnight.planning.gpus import facts as facts_of
from overnight.planning.table import gpt2_loss
from overnight.recipe.schedule import branch_point, towards
from overnight.recipe.schema import Recipe
from overnight.report.curve import draw
from overnight.run_dir.layout import finished, finished_in, folder_name, read_run
from overnight.run_dir.metrics import Record

CARD, RECIPE, METRICS, CURVE = "README.md", "recipe.yaml", "metrics.jsonl", "curve.png"
ENGLISH = ("HuggingFaceFW/fineweb-edu", "HuggingFaceFW/fineweb", "None")  # None: the embedded corpus
ATTRIBUTION = {
    "odc-by": "Contains information made available under the Open Data Commons Attribution License (ODC-By)."
}


def report(run: Path, budget: int, repo_id: str | None = None) -> Path:
    """Write `report/iter-NNNNNN` in a run directory for one of its finished models, and return it.

    `repo_id` is where the card says that the model can be loaded from; without it, from this machine. Raises
    `InputError` for a folder that is no run, and KeyError for a budget that was not finished.
    """
    recipe, records = read_run(run)
    end = finished(run)[budget]
    folder = run / "report" / folder_name(budget)
    folder.mkdir(parents=True, exist_ok=True)
    draw([run], folder / CURVE)
    atomic_write(folder / RECIPE, yaml.safe_dump(shown(recipe), sort_keys=False))
    path_there = [r for r in records if r["iteration"] <= budget and r.get("cooldown", budget) == budget]
    atomic_write(folder / METRICS, "".join(json.dumps(record) + "\n" for record in path_there))
    scored = run / "evaluation" / folder_name(budget)
    if (scored / "results.json").is_file():
        (folder / "evaluation").mkdir(exist_ok=True)
        for path in [scored / "results.json", scored / "comparison.md", *scored.glob("against-*.png")]:
            shutil.copyfile(path, folder / "evaluation" / path.name)
    atomic_write(folder / CARD, card(run, recipe, records, end, repo_id))
    return folder


def reported(run: Path) -> list[int]:
    """The budgets that a run has finished; `InputError` while there is none."""
    budgets = [*finished(run)]
    if not budgets:
        raise InputError(f"{run} has no finished model yet; its first is written when a budget ends")
    return budgets


def unfinished_card(recipe: Recipe, iteration: int, repo_id: str) -> str:
    """The README.md of weights that were not annealed."""
    data = ModelCardData(license=recipe.hub.license, library_name="transformers", pipeline_tag="text-generation")
    return (
        f"---\n{data.to_yaml()}\n---\n\n# {text(repo_id)}: a run on its way, {iteration:,} iterations\n\n"
        "**Not annealed, and not a finished model.** These weights are from the trunk of a run that goes on, at its"
        " full learning rate; a finished model of as many iterations has a clearly lower loss. Finished models are on"
        " the branches `iter-...` and, the best of them, on `main`, as soon as there are any.\n"
    )


def shown(recipe: Recipe) -> dict[str, Any]:
    """A recipe for others: without what is of this machine alone."""
    whole = recipe.model_dump()
    whole["data"]["path"] = paths_of(recipe)
    for section in ("data", "evaluation"):
        for key in ("dir", "tasks_dir"):
            if Path(whole[section].get(key) or "").is_absolute():
                whole[section][key] = Path(whole[section][key]).name
    return whole


def paths_of(recipe: Recipe) -> str | list[str] | None:
    """`data.path` without the folders of this machine."""
    if recipe.data.source != "files" or recipe.data.path is None:
        return recipe.data.path
    several = [recipe.data.path] if isinstance(recipe.data.path, str) else recipe.data.path
    return [path if "://" in path else Path(path).name for path in several]


def corpus(recipe: Recipe) -> str:
    """The data in words."""
    if recipe.data.source == "embedded":
        return "the documentation of Python, NumPy and PyTorch"
    paths = paths_of(recipe)
    return paths if isinstance(paths, str) else ", ".join(paths or [])


def card(run: Path, recipe: Recipe, records: list[Record], end: Record, repo_id: str | None) -> str:
    """The whole README.md."""
    budget = end["iteration"]
    facts = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    results = run / "evaluation" / folder_name(budget) / "results.json"
    scores = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else None
    parts = [
        f"---\n{metadata(recipe, end, scores).to_yaml()}\n---",
        f"# {text(repo_id or recipe.name)}, {budget:,} iterations",
        summary(recipe, end, facts),
        "## How to use it\n\n" + usage(run, recipe, budget, repo_id),
        "## Training\n\n![losses and forecasts](curve.png)\n\n" + budgets(recipe, records, facts),
        "## Evaluation\n\n" + evaluation(scores),
        "## Data\n\n" + data(recipe, facts),
        "## How it was made\n\n" + making(recipe, end, facts),
        "## Limits\n\n" + limits(recipe),
    ]
    return "\n\n".join(parts) + "\n"


def metadata(recipe: Recipe, end: Record, scores: dict[str, Any] | None) -> ModelCardData:
    """What the Hub reads: license, data set, results."""
    of_hub = recipe.data.source == "datasets"
    results = [result("validation set of the run", corpus(recipe), "loss", end["val_loss"])]
    for name, found in (scores["models"][0]["tasks"] if scores else {}).items():
        if found["metric"] in found["metrics"]:
            results.append(result(name, name, found["metric"], found["metrics"][found["metric"]]))
    return ModelCardData(
        license=recipe.hub.license,
        language="en" if str(recipe.data.path) in ENGLISH else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gpt2", "overnight"],
        datasets=[recipe.data.path] if of_hub and isinstance(recipe.data.path, str) else None,
        model_name=recipe.name,
        eval_results=results,
    )


def result(name: str, dataset: str, metric: str, value: float) -> EvalResult:
    """One measurement, as the Hub shows it."""
    return EvalResult(
        task_type="text-generation", dataset_name=name, dataset_type=dataset, metric_type=metric, metric_value=value
    )


def summary(recipe: Recipe, end: Record, facts: dict[str, Any]) -> str:
    """What it is, in a paragraph."""
    model = recipe.model
    return (
        f"A GPT-2 of {facts['parameters']:,} parameters ({model.n_layer} layers, width {model.n_embd}, {model.n_head}"
        f" heads, context {model.n_positions:,}, vocabulary {model.vocab_size:,}), trained from nothing for"
        f" {end['iteration']:,} iterations of {recipe.batch.tokens_per_iter:,} tokens, {count(end['tokens'])} in all,"
        f" on {text(corpus(recipe))}. Its loss on the held-out validation set of that data is"
        f" **{end['val_loss']:.4f}** nats a token, which compares with no loss of another vocabulary or data set."
    )


def usage(run: Path, recipe: Recipe, budget: int, repo_id: str | None) -> str:
    """Code that runs as it stands."""
    context = recipe.model.n_positions
    prompt = next((each for each in recipe.validation.prompts if len(each) <= context // 2), "The")
    name = repo_id or str(run / "models" / folder_name(budget))
    revision = f', revision="{folder_name(budget)}"' if repo_id else ""
    code = f"""from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({json.dumps(name)}{revision})
tokenizer = AutoTokenizer.from_pretrained({json.dumps(name)}{revision})
ids = tokenizer({json.dumps(prompt)}, return_tensors="pt").input_ids
sampling = {{"do_sample": True, "top_k": 50, "pad_token_id": tokenizer.eos_token_id}}
out = model.generate(ids, max_new_tokens={min(40, context // 2)}, **sampling)
print(tokenizer.decode(out[0]))
"""
    return fenced(code, "python") + "\n\nIt continues text; it was not taught to answer or to follow instructions."


def budgets(recipe: Recipe, records: list[Record], facts: dict[str, Any]) -> str:
    """Every budget of the run: predicted before it, forecast on the way, reached."""
    ends = finished_in(records)
    claimed = claims(recipe)
    columns = ["iterations", "tokens", *(["claimed by what circulates"] if claimed else [])]
    columns += ["predicted before the run, 90 %", "forecast in the run, 90 %", "reached"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for budget in sorted(ends):
        tokens = count(budget * recipe.batch.tokens_per_iter)
        before = (
            interval(*scaling_law.expected(recipe, budget, facts["unique_tokens"]).interval())
            if scaling_law.in_fit_range(recipe)
            else "-"
        )
        on_the_way, reached = forecast(recipe, records, budget), f"{ends[budget]['val_loss']:.3f}"
        cells = [f"{budget:,}", tokens, *([claimed.get(budget, "-")] if claimed else []), before, on_the_way, reached]
        lines.append("| " + " | ".join(cells) + " |")
    why = (
        "Predicted by a scaling law of public runs."
        if scaling_law.in_fit_range(recipe)
        else "Nothing is predicted before the run: it is outside of the data of the scaling law."
    )
    return "\n".join(lines) + (
        f"\n\n{why} Forecasts are from the run's own curve, and were recorded while it ran: for each budget the one"
        " made nearest to half of the iterations before its decay."
    )


def claims(recipe: Recipe) -> dict[int, str]:
    """What circulates about the budgets of the night's model (facts/claims.csv); nothing of any other."""
    shape = (recipe.model.n_layer, recipe.model.n_embd, recipe.batch.tokens_per_iter)
    if shape != (12, 384, 524_288) or str(recipe.data.path) != "HuggingFaceFW/fineweb-edu":
        return {}
    return {int(row["max_iters"]): row["claim"] for row in facts_of("claims.csv")}


def forecast(recipe: Recipe, records: list[Record], budget: int) -> str:
    """What was said of a budget at half of its trunk, and when."""
    said = {
        record["iteration"]: row
        for record in records
        if record["kind"] == "forecast" and record.get("cooldown", budget) == budget
        for row in record["budgets"]
        if row["max_iters"] == budget
    }
    if not said:
        return "-"
    half = branch_point(towards(recipe.schedule, budget)) / 2
    made = min(said, key=lambda iteration: abs(iteration - half))
    return f"{interval(said[made]['loss_low'], said[made]['loss_high'])} at iteration {made:,}"


def interval(low: float, high: float) -> str:
    """`3.121 to 3.303`"""
    return f"{low:.3f} to {high:.3f}"


def evaluation(scores: dict[str, Any] | None) -> str:
    """The verdicts, or that nothing was measured."""
    if scores is None:
        return "Not measured yet beyond the loss."
    lines = ["[comparison.md](evaluation/comparison.md) has losses, methods and figures."]
    for each in scores["comparisons"]:
        words = [task["verdict"] for task in each["tasks"]]
        lines.append(
            f"**Against {text(each['opponent'])}**: better on {words.count('better')} of {len(words)} tasks, worse on"
            f" {words.count('worse')}, no difference shown on {words.count('no difference shown')}."
        )
        table = ["| task (metric) | ours | theirs | difference, 95 % | verdict |", "|---|---|---|---|---|"]
        for task in each["tasks"]:
            difference = f"{100 * task['difference']:+.1f} ({100 * task['low']:+.1f} to {100 * task['high']:+.1f})"
            name = f"{text(task['task'])} ({text(task['metric'])})"
            scores_of = f"{task['ours']:.1%} | {task['theirs']:.1%}"
            table.append(f"| {name} | {scores_of} | {difference} points | {text(task['verdict'])} |")
        lines.append("\n".join(table))
    if scores["settings"]["limit"]:
        lines.append(f"Only the first {scores['settings']['limit']} items of each task: a look, and no result.")
    return "\n\n".join(lines)


def data(recipe: Recipe, facts: dict[str, Any]) -> str:
    """Where the text came from, and under which license."""
    chosen = recipe.data
    lines = [f"- source: {text(corpus(recipe))} {text(chosen.files or '')}".rstrip()]
    lines += [f"- revision: {text(chosen.revision)}"] if chosen.revision else []
    lines += [f"- {text(facts['text'])}"] if "text" in facts else []
    lines.append(f"- {facts['unique_tokens']:,} training tokens and {facts['validation_tokens']:,} held out by text")
    license = f"- license: {text(chosen.license)}" if chosen.license else "- license: not stated in the recipe"
    lines.append(f"{license}. {ATTRIBUTION.get(chosen.license or '', '')}".rstrip())
    return "\n".join(lines)


def making(recipe: Recipe, end: Record, facts: dict[str, Any]) -> str:
    """Machine, energy, recipe, and the command that does it again."""
    rate, kwh, watts = end["tokens_per_second"], end["kwh"], end["mean_watts"]
    packages = ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
    hours = f"{duration(end['tokens'] / rate)} at that speed" if rate else "not measured"
    rows = [
        ("device", facts["device"]),
        ("precision", facts["precision"]),
        ("attention", facts["attention"]),
        ("speed", f"{count(rate)} tokens a second" if rate else "not measured"),
        ("time", hours),
        ("energy", f"{kwh:.2f} kWh, {watts:.0f} W in the mean" if kwh is not None else "not measured"),
        ("software", f"Python {facts['python']}, {packages}"),
    ]
    table = "\n".join(["| | |", "|---|---|", *(f"| {name} | {text(value)} |" for name, value in rows)])
    commit = facts["commit"] or "unknown"
    prepare = "" if recipe.data.source == "embedded" else "python recipes/prepare.py recipe.yaml\n"
    again = f"git checkout {commit}\n{prepare}python recipes/train.py recipe.yaml"
    return (
        f"{table}\n\nThe same again, with Overnight and the [recipe.yaml](recipe.yaml) of this repository:\n\n"
        f"{fenced(again, 'sh')}\n\n{fenced(yaml.safe_dump(shown(recipe), sort_keys=False), 'yaml')}"
    )


def limits(recipe: Recipe) -> str:
    """What not to expect."""
    lines = [
        "- A small model: it writes fluently and knows little. What it says is often false.",
        "- It has the biases of its text, and no filter of its own.",
        "- One run on one seed; another seed ends with a slightly different loss.",
    ]
    if str(recipe.data.path) in scaling_law.DATASETS:
        dataset = scaling_law.dataset_of(recipe)
        lines.append(
            f"- GPT-2 124M's published {gpt2_loss(dataset):.4f} on {dataset} is of another validation split; only a"
            " loss that was measured beside it on the same tokens compares."
        )
    return "\n".join(lines)


def text(value: object) -> str:
    """Foreign text as Markdown that shows it: no HTML, no links, no tables, no control characters, one line."""
    line = " ".join(plain(str(value)).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = line.replace("://", "&#58;//").replace("www.", "www&#46;").replace("@", "&#64;")  # they would become links
    return re.sub(r"([\\`*_{}\[\]|~$!])", r"\\\1", line)


def fenced(code: str, language: str) -> str:
    """A block of code that its content cannot end."""
    longest = max((len(run) for run in re.findall(r"`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{plain(code).rstrip()}\n{fence}"
