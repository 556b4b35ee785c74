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
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from overnight.core.console import count, duration, plain
from overnight.core.files import atomic_write, strict_json
from overnight.errors import InputError
from overnight.planning import scaling_law
from overnight.planning.gpus import facts as facts_of
from overnight.planning.table import gpt2_loss
from overnight.recipe.schedule import branch_point, towards
from overnight.recipe.schema import Recipe
from overnight.report.curve import draw_curve
from overnight.run_dir.layout import finished, finished_in, folder_name, read_run
from overnight.run_dir.metrics import Record

CARD, RECIPE, METRICS, CURVE = "README.md", "recipe.yaml", "metrics.jsonl", "curve.png"
TEMPLATE, UNFINISHED = (Path(__file__).with_name(name) for name in ("model_card.md", "unfinished_card.md"))
ENGLISH = ("HuggingFaceFW/fineweb-edu", "HuggingFaceFW/fineweb", "None")  # None: the embedded corpus


def report(run: Path, budget: int, repo_id: str | None = None) -> Path:
    """Write `report/iter-NNNNNN` in a run directory for one of its finished models, and return it.

    `repo_id` is where the card says that the model can be loaded from; without it, from this machine. Raises
    `InputError` for a folder that is no run, and KeyError for a budget that was not finished.
    """
    recipe, records = read_run(run)
    end = finished(run)[budget]
    folder = run / "report" / folder_name(budget)
    folder.mkdir(parents=True, exist_ok=True)
    draw_curve([run], folder / CURVE)
    atomic_write(folder / RECIPE, yaml.safe_dump(shown(recipe), sort_keys=False))
    path_there = [r for r in records if r["iteration"] <= budget and r.get("cooldown", budget) == budget]
    atomic_write(folder / METRICS, "".join(strict_json(record) + "\n" for record in path_there))
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
    values = {"repo_id": text(repo_id), "iterations": f"{iteration:,}"}
    return str(ModelCard.from_template(data, str(UNFINISHED), **values)) + "\n"


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
    """The whole README.md: the template with the values of the run."""
    model, context = folder_name(end["iteration"]), recipe.model.n_positions
    facts = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    results = run / "evaluation" / model / "results.json"
    scores = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else None
    dataset = scaling_law.DATASETS.get(str(recipe.data.path))
    here = json.dumps(str(run / "models" / model))
    values: dict[str, Any] = {
        "recipe": recipe,
        "end": end,
        "facts": facts,
        "scores": scores,
        "repo_id": repo_id,
        "corpus": corpus(recipe),
        "from_where": f'{json.dumps(repo_id)}, revision="{model}"' if repo_id else here,
        "prompt": json.dumps(next((each for each in recipe.validation.prompts if len(each) <= context // 2), "The")),
        "new_tokens": min(40, context // 2),
        "claimed": bool(claims(recipe)),
        "budgets": budgets(recipe, records, facts["unique_tokens"]),
        "in_fit_range": scaling_law.in_fit_range(recipe),
        "recipe_yaml": yaml.safe_dump(shown(recipe), sort_keys=False),
        "dataset": dataset,
        "gpt2": gpt2_loss(dataset) if dataset else None,
    }
    values |= {"text": text, "fenced": fenced, "count": count, "duration": duration, "thousands": "{:,}".format}
    return str(ModelCard.from_template(metadata(recipe, end, scores), str(TEMPLATE), **values)) + "\n"


def metadata(recipe: Recipe, end: Record, scores: dict[str, Any] | None) -> ModelCardData:
    """What the Hub reads: license, data set, results."""
    measured = [("validation set of the run", corpus(recipe), "loss", end["val_loss"])]
    for name, found in (scores["models"][0]["tasks"] if scores else {}).items():
        if found["metric"] in found["metrics"]:
            measured.append((name, name, found["metric"], found["metrics"][found["metric"]]))
    return ModelCardData(
        license=recipe.hub.license,
        language="en" if str(recipe.data.path) in ENGLISH else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gpt2", "overnight"],
        datasets=[recipe.data.path] if recipe.data.source == "datasets" and isinstance(recipe.data.path, str) else None,
        model_name=recipe.name,
        eval_results=[
            EvalResult("text-generation", dataset, name, metric, value) for name, dataset, metric, value in measured
        ],
    )


def budgets(recipe: Recipe, records: list[Record], unique_tokens: int) -> list[list[str]]:
    """A row for each budget of the run: its length, what was claimed, predicted and forecast of it, what it reached."""
    claimed, rows = claims(recipe), []
    for budget, end in sorted(finished_in(records).items()):
        before = "-"
        if scaling_law.in_fit_range(recipe):
            before = interval(*scaling_law.expected(recipe, budget, unique_tokens).interval())
        length = [f"{budget:,}", count(budget * recipe.batch.tokens_per_iter)]
        claim = [claimed.get(budget, "-")] if claimed else []
        rows.append([*length, *claim, before, forecast_of(recipe, records, budget), f"{end['val_loss']:.3f}"])
    return rows


def claims(recipe: Recipe) -> dict[int, str]:
    """What circulates about the budgets of the night's model (facts/claims.csv); nothing of any other."""
    shape = (recipe.model.n_layer, recipe.model.n_embd, recipe.batch.tokens_per_iter)
    if shape != (12, 384, 524_288) or str(recipe.data.path) != "HuggingFaceFW/fineweb-edu":
        return {}
    return {int(row["max_iters"]): row["claim"] for row in facts_of("claims.csv")}


def forecast_of(recipe: Recipe, records: list[Record], budget: int) -> str:
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
