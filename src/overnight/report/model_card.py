"""A finished model's report: a folder with its card, figures, recipe and measurements, from the run directory alone.

The card is the `README.md` of a model repository on the Hub (docs.huggingface.co/docs/hub/model-cards). What is said in
it stands in a file of the run; text that came from a recipe, a data set or a model is escaped.
"""

from __future__ import annotations

import functools
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from overnight.core.console import count, duration, plain
from overnight.core.files import atomic_write, strict_json
from overnight.core.published import allowed_files, copy_for_others, fenced, for_others, redacted, text, yaml_text
from overnight.core.sums import SUMS, damage
from overnight.errors import DamagedData, listed, script_command
from overnight.planning import scaling_law
from overnight.planning.gpus import facts as facts_of
from overnight.planning.table import Prices, gpt2_loss
from overnight.recipe.identity import stored_recipe
from overnight.recipe.schedule import branch_point, towards
from overnight.recipe.schema import Recipe
from overnight.report.curve import draw_curve
from overnight.report.status import standing
from overnight.run_dir.layout import (
    ENVIRONMENT,
    RESULTS,
    evaluation_of,
    finished,
    finished_in,
    folder_name,
    read_file,
    read_run,
)
from overnight.run_dir.metrics import Record

CARD, RECIPE, METRICS, CURVE = "README.md", "recipe.yaml", "metrics.jsonl", "curve.png"
REPORT_FILES = re.compile("|".join(map(re.escape, (CARD, RECIPE, METRICS, CURVE))))
EVALUATION_FILES = re.compile(r"results\.json|comparison\.md|against-[A-Za-z0-9._-]+\.png")
TEMPLATE, UNFINISHED = (Path(__file__).with_name(name) for name in ("model_card.md", "unfinished_card.md"))
FUNCTIONS: dict[str, Any] = {  # of the template
    "text": text,
    "fenced": fenced,
    "count": count,
    "duration": duration,
    "thousands": "{:,}".format,
    "yaml": yaml_text,
}
ENGLISH = ("HuggingFaceFW/fineweb-edu", "HuggingFaceFW/fineweb")


def report(run: Path, budget: int, repo_id: str | None = None) -> Path:
    """Write `report/iter-NNNNNN` in a run directory for one of its finished models, and return it.

    `repo_id` is where the card says that the model can be loaded from; without it, from this machine. Raises
    `InputError` for a folder that is no run, and KeyError for a budget that was not finished.
    """
    recipe, records = read_run(run)
    end = finished(run)[budget]
    recipe = as_trained(recipe, records, end)
    folder = run / "report" / folder_name(budget)
    folder.mkdir(parents=True, exist_ok=True)
    draw_curve([run], folder / CURVE)
    atomic_write(folder / RECIPE, yaml_text(shown(recipe)))
    path_there = [r for r in records if r["iteration"] <= budget and r.get("cooldown", budget) == budget]
    atomic_write(folder / METRICS, "".join(strict_json(for_others(record)) + "\n" for record in path_there))
    copy_evaluation(run, budget)
    atomic_write(folder / CARD, card(run, recipe, records, end, repo_id))
    return folder


def copy_evaluation(run: Path, budget: int) -> dict[str, Path]:
    """Copy what others may see of a finished model's evaluation into its report; the copies by their names there."""
    name, folder = folder_name(budget), run / "report" / folder_name(budget) / "evaluation"
    shutil.rmtree(folder, ignore_errors=True)  # of an evaluation that there was before
    scored = allowed_files(evaluation_of(run / "models" / name), EVALUATION_FILES)
    return {f"evaluation/{file}": copy_for_others(path, folder / file) for file, path in scored.items()}


def unfinished_card(recipe: Recipe, iteration: int, repo_id: str) -> str:
    """The README.md of weights that were not annealed."""
    data = ModelCardData(license=license_of(recipe), library_name="transformers", pipeline_tag="text-generation")
    values = {"repo_id": text(repo_id), "iterations": f"{iteration:,}"}
    return str(ModelCard.from_template(data, str(UNFINISHED), **values)) + "\n"


def shown(recipe: Recipe) -> dict[str, Any]:
    """A recipe for others: without what is of this machine alone."""
    whole = for_others(recipe.model_dump())
    whole["data"]["path"] = paths_of(recipe)
    return whole


def paths_of(recipe: Recipe) -> str | list[str] | None:
    """`data.path` without the folders of this machine."""
    if recipe.data.source != "files" or recipe.data.path is None:
        return for_others(recipe.data.path)
    several = [recipe.data.path] if isinstance(recipe.data.path, str) else recipe.data.path
    return [redacted(path) if "://" in path else Path(path).name for path in several]


def license_of(recipe: Recipe) -> str | None:
    """The license of the model, which is not claimed while that of its text is not known."""
    return recipe.hub.license if recipe.data.license else None


def corpus(recipe: Recipe) -> str:
    """The data in words."""
    if recipe.data.source == "embedded":
        return "the documentation of Python, NumPy and PyTorch"
    if recipe.data.source == "adopted":
        origin = f", said to be of {listed(recipe.data.path)}" if recipe.data.path else ""
        return f"token files that were adopted{origin}"
    return listed(paths_of(recipe))


def card(run: Path, recipe: Recipe, records: list[Record], end: Record, repo_id: str | None) -> str:
    """The whole README.md: the template with the values of the run."""
    model, context = folder_name(end["iteration"]), recipe.model.n_positions
    facts = for_others(
        read_file(run / ENVIRONMENT, checked_facts, "remove it, and the run's training command writes it anew")
    )
    scores = scores_of(run, model)
    dataset = scaling_law.gpt2_dataset(recipe)
    folder = str(run / "models" / model)
    values: dict[str, Any] = {
        "recipe": recipe,
        "end": end,
        "facts": facts,
        "scores": scores,
        "repo_id": repo_id,
        "corpus": corpus(recipe),
        "from_where": f'{json.dumps(repo_id)}, revision="{model}"' if repo_id else json.dumps(folder),
        "revision": model,
        "folder": shlex.quote(folder),
        "samples": last_samples(recipe, records, end),
        "price": Prices().per_kwh,
        "prompt": json.dumps(next((each for each in recipe.validation.prompts if len(each) <= context // 2), "The")),
        "new_tokens": min(40, context // 2),
        "claimed": bool(claims(recipe)),
        "changes": [r for r in records if on_the_way(r, recipe, records, end)],
        "standing": standing(recipe, records, end),
        "budgets": budgets(recipe, records, facts["unique_tokens"]),
        "unknown": scaling_law.unknown(stored_recipe(shown(recipe))),
        "shown": shown(recipe),
        "dataset": dataset,
        "gpt2": gpt2_loss(dataset) if dataset else None,
    }
    return str(ModelCard.from_template(metadata(recipe, end, scores), str(TEMPLATE), **values, **FUNCTIONS)) + "\n"


def last_samples(recipe: Recipe, records: list[Record], end: Record) -> list[tuple[str, str]]:
    """The recipe's prompts, and what the finished model wrote after each."""
    at = end["iteration"]
    last = [r for r in records if r["kind"] == "val" and r["iteration"] == at and r.get("cooldown", at) == at]
    return list(zip(recipe.validation.prompts, last[-1].get("samples", []), strict=False)) if last else []


def checked_facts(found: dict[str, Any]) -> dict[str, Any]:
    """What environment.json says of the machine and the data, with all that a card shows of it."""
    numbers = {key: int(found[key]) for key in ("parameters", "unique_tokens", "validation_tokens")}
    words = {key: str(found[key]) for key in ("device", "precision", "attention", "python")}
    return found | numbers | words | {"packages": dict(found["packages"])}


def scores_of(run: Path, model: str) -> dict[str, Any] | None:
    """The results.json of a finished model's evaluation; None without one. `DamagedData` where a file of it differs."""
    folder = evaluation_of(run / "models" / model)
    if not (folder / RESULTS).is_file():
        return None
    again = f"`{script_command('eval.py', run / 'models' / model)}` measures it again"
    if (folder / SUMS).exists() and (reason := damage(folder, [RESULTS])):  # an older version wrote none
        raise DamagedData(f"{folder} is damaged: {reason}; {again}")
    return for_others(read_file(folder / RESULTS, dict, again))


def metadata(recipe: Recipe, end: Record, scores: dict[str, Any] | None) -> ModelCardData:
    """What the Hub reads: license, data set, results."""
    origin = recipe.data.path if recipe.data.source in ("datasets", "adopted") else None
    measured = [("validation set of the run", for_others(origin or "custom"), "loss", round(end["val_loss"], 4))]
    for name, found in (scores["models"][0]["tasks"] if scores else {}).items():
        if found["metric"] in found["metrics"]:
            measured.append((name, name, found["metric"], found["metrics"][found["metric"]]))
    return ModelCardData(
        license=license_of(recipe),
        language="en" if recipe.data.source == "embedded" or recipe.data.path in ENGLISH else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gpt2", "overnight"],
        datasets=[for_others(recipe.data.path)]
        if recipe.data.source != "files" and isinstance(recipe.data.path, str)
        else None,
        model_name=recipe.name,
        widget=[{"text": " ".join(plain(prompt).split())} for prompt in recipe.validation.prompts] or None,
        eval_results=[
            EvalResult("text-generation", dataset, name, metric, value) for name, dataset, metric, value in measured
        ],
    )


def on_the_way(record: Record, recipe: Recipe, records: list[Record], end: Record) -> bool:
    """Whether a record is of a change that a finished model saw: made before it ended, in its decay or before that."""
    changed = record.get("event") == "changed" and records.index(record) < records.index(end)
    leaves = branch_point(towards(recipe.schedule, end["iteration"]))
    return changed and (record.get("cooldown") == end["iteration"] or record["iteration"] <= leaves)


def as_trained(recipe: Recipe, records: list[Record], end: Record) -> Recipe:
    """The recipe of a finished model: changes that it did not see are taken back."""
    found = recipe.model_dump()
    for record in reversed([r for r in records if r.get("event") == "changed"]):
        *sections, key = record["key"].split(".")
        place = functools.reduce(lambda section, name: section.get(name, {}), sections, found)
        if key in place and not on_the_way(record, recipe, records, end):
            place[key] = record["before"]
    return stored_recipe(found)


def budgets(recipe: Recipe, records: list[Record], unique_tokens: int) -> list[list[str]]:
    """A row for each budget of the run: its length, what was claimed, predicted and forecast of it, what it reached."""
    claimed, rows = claims(recipe), []
    for budget, end in sorted(finished_in(records).items()):
        row = [f"`{folder_name(budget)}`", f"{budget:,}", count(budget * recipe.batch.tokens_per_iter)]
        row += [claimed.get(budget, "-")] if claimed else []
        within = scaling_law.in_fit_range(recipe)
        row += [interval(*scaling_law.expected(recipe, budget, unique_tokens).interval()) if within else "-"]
        rows.append([*row, forecast_of(recipe, records, budget), f"{end['val_loss']:.3f}"])
    return rows


def claims(recipe: Recipe) -> dict[int, str]:
    """What others claim of the budgets of the default recipe's model (facts/claims.csv); nothing of any other."""
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
