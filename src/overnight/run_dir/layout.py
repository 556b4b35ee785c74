"""Where things lie in a run directory, for those who read it: names, and a run's recipe and records. Without torch."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from overnight.core.files import entries, refuse_dangling, sha256
from overnight.core.sums import SUMS, damage
from overnight.errors import DamagedData, InputError, first_line, nearest_first, script_command
from overnight.recipe.identity import stored_recipe
from overnight.recipe.schema import Recipe
from overnight.recipe.text import is_path
from overnight.run_dir.metrics import Metrics, Record

RUNS, MODELS, REPORT = Path("runs"), "models", "report"
LOG = "log.txt"  # what the session printed; of those before it log-1.txt and so on
CHECKPOINTS, RECIPE, ENVIRONMENT, RESULTS = "checkpoints", "recipe.yaml", "environment.json", "results.json"
REWRITTEN = "move it away, and the run's own training command writes it anew and continues from its checkpoints"
LISTED = 5  # runs in a message
T = TypeVar("T")
_NAME, _COOLDOWN = re.compile(r"iter-(\d{6,})"), re.compile(r"cooldown-(\d{6,})")


def folder_name(iteration: int) -> str:
    """`iter-004800`"""
    return f"iter-{iteration:06d}"


def iteration_of(path: Path) -> int:
    """4800 of `.../iter-004800`."""
    return int(path.name.removeprefix("iter-"))


def saved_iterations(folder: Path) -> dict[int, Path]:
    """The checkpoints (or models) in `folder` by iteration, ascending; other files there are left alone.

    `Unreachable` where one is a link to what is not there.
    """
    return _numbered(folder, _NAME)


def cooldowns(checkpoints: Path) -> dict[int, Path]:
    """The folders of decays by the milestone that they end with, ascending."""
    return _numbered(checkpoints, _COOLDOWN)


def _numbered(folder: Path, name: re.Pattern[str]) -> dict[int, Path]:
    found = [(int(match[1]), path) for path in entries(folder) if (match := name.fullmatch(path.name))]
    for _, path in found:
        try:
            path.stat()
        except FileNotFoundError:  # or pruned by now
            refuse_dangling(path)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
    return dict(sorted((number, path) for number, path in found if path.is_dir()))


def cooldown_name(milestone: int) -> str:
    """`cooldown-006000`"""
    return f"cooldown-{milestone:06d}"


def refuse_misplaced(checkpoint: Path, state: dict[str, Any]) -> None:
    """Raise `InputError` for a checkpoint whose state is of another iteration, or another branch, than its place says.

    A state that an older version wrote does not name its branch.
    """
    milestone = state.get("cooldown")
    branch = checkpoint.parent.name
    if "cooldown" in state:
        branch = CHECKPOINTS if milestone is None else cooldown_name(milestone)
    says = f"{branch}/{folder_name(state['iteration'])}"
    if says != f"{checkpoint.parent.name}/{checkpoint.name}":
        raise InputError(f"{checkpoint} holds what belongs to {says}: put it there, or move it away")


def read_file(path: Path, make: Callable[[Any], T], otherwise: str) -> T:
    """What `make` makes of a small JSON or YAML file of a run directory.

    Raises FileNotFoundError where it is not there, and `DamagedData`, which says what to do `otherwise`, where it is
    not what it was written as: unreadable, or without what `make` takes from it.
    """
    try:
        text = path.read_text(encoding="utf-8")
        return make(yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text))
    except (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedData(f"{path} is damaged ({type(error).__name__}: {first_line(error)}): {otherwise}") from error


def finished(run: Path) -> dict[int, Record]:
    """The milestones that a run has finished, ascending: the last record of each whose verified model is there."""
    ends = finished_in(Metrics(run / "metrics.jsonl").records())
    there = saved_iterations(run / MODELS)
    return {target: ends[target] for target in sorted(ends) if target in there}


def finished_in(records: list[Record]) -> dict[int, Record]:
    """What records alone say of that, in the order in which the milestones first were finished."""
    return {record["iteration"]: record for record in records if record.get("event") == "finished"}


def refuse_damaged_model(folder: Path) -> None:
    """Raise `DamagedData` for a model folder that is not as it was written, by its SHA256SUMS and its run's record.

    One that has neither comes from elsewhere, or was fetched by an older version.
    """
    folder = Path(os.path.abspath(folder))
    match, metrics = _NAME.fullmatch(folder.name), Metrics(folder.parent.parent / "metrics.jsonl")
    record = finished_in(metrics.records()).get(int(match[1])) if match and folder.parent.name == MODELS else None
    recorded = record.get("sums") if record else None
    if recorded is None and not (folder / SUMS).exists():
        return
    reason = damage(folder, ("config.json", "model.safetensors"))
    if reason is None and recorded not in (None, sha256(folder / SUMS)):
        reason = "it is not the model that its run has recorded there"
    if reason is not None:
        way_on = "; remove it, and the run's own training command writes it again" if match else ""
        raise DamagedData(f"{folder} is damaged: {reason}{way_on}")


def is_run(folder: Path) -> bool:
    """Whether a folder is a run directory; a report and a model that was fetched have a recipe.yaml too."""
    elsewhere = folder.absolute().parent.name == REPORT or (folder / "config.json").is_file()
    return (folder / RECIPE).is_file() and not elsewhere


def run_around(path: Path) -> Path | None:
    """The run directory in which a path lies, whether anything is there or not."""
    return next((place for place in path.parents[:3] if is_run(place)), None)


def existing_runs(path: Path) -> str:
    """The runs that there are, beside a mistyped path and in runs/, in words; those with the nearest names first."""
    folders = [each.parent for place in (path.parent, RUNS) for each in place.glob(f"*/{RECIPE}")]
    found = nearest_first(str(path), {os.path.abspath(run): run for run in folders if is_run(run)}.values())
    if not found:
        return f"there are no runs here; `{script_command('train.py', 'RECIPE')}` begins one"
    more = f" and {len(found) - LISTED} more" if len(found) > LISTED else ""
    return f"the runs here are {', '.join(found[:LISTED])}{more}"


def what_is_at(path: Path) -> str:
    """What was found at a path where something else was expected."""
    for file, kind in (("config.json", "a model"), ("state.json", "a checkpoint")):
        if (path / file).exists():
            return f"that is {kind}"
    kind = "a folder without one" if path.is_dir() else "a file"
    return f"that is {kind}" if path.exists() else "nothing is there"


def recipe_of(run: Path) -> Recipe:
    """The recipe of a run directory; `InputError` where it is none."""
    if not is_run(run):
        around = run_around(run)
        way_on = f"it belongs to the run {around}, which would work" if around else existing_runs(run)
        raise InputError(f"{run} is no run directory, {what_is_at(run)}; {way_on}")
    return read_file(run / RECIPE, lambda found: stored_recipe(found["recipe"]), REWRITTEN)


def continuing(run: Path) -> str:
    """The command that began a run, or continued it last, and continues it."""
    try:
        words = read_file(run / ENVIRONMENT, lambda found: found["command"][1:], REWRITTEN)
    except FileNotFoundError:
        words = ["RECIPE"]
    return f"`{script_command('train.py', *words)}` continues it"


def unfinished(run: Path) -> str:
    """How far a run is, and what continues it; nothing where it is at its end."""
    last = recipe_of(run).schedule.max_iters
    at = max((record["iteration"] for record in Metrics(run / "metrics.jsonl").records()), default=0)
    return "" if last in finished(run) else f"; it is at iteration {at:,} of {last:,}, and {continuing(run)}"


def reported(run: Path) -> dict[int, Record]:
    """What a run has `finished`; `InputError` while that is nothing."""
    if ends := finished(run):
        return ends
    raise InputError(f"{run} has no finished model yet{unfinished(run)}; sample.py takes its checkpoints too")


def model_at(name: str) -> str:
    """The model folder, checkpoint or Hub name that is meant: of a run its newest finished model.

    Raises `InputError` for a path where none is, before anybody asks the Hub for a repository of that name.
    """
    path = Path(name)
    if is_run(path):
        return str(path / MODELS / folder_name(max(reported(path))))
    there = any((path / file).is_file() for file in ("config.json", "state.json"))
    if there or not (path.exists() or is_path(name) or is_run(RUNS / name)):
        return name
    if around := run_around(path):
        way_on = f"{around / MODELS / folder_name(max(reported(around)))} would work{unfinished(around)}"
    else:
        way_on = f"{existing_runs(path)}; a folder with a model, or a name on the Hub, would work too"
    raise InputError(f"{name} is no model, {what_is_at(path)}; {way_on}")


MEASURED = {"against", "tasks", "texts", "limit"}
"""The keys of a recipe's evaluation that decide what is measured, and stand in the settings of results.json."""


def evaluated(model: Path) -> bool:
    """Whether a finished model was evaluated as its run's recipe says, and not in another way, such as a look."""
    folder = evaluation_of(model)
    if not (folder / "comparison.md").exists() or not (folder / RESULTS).exists():
        return False
    settings = read_file(folder / RESULTS, lambda found: dict(found["settings"]), "remove it, and evaluate again")
    wanted = recipe_of(model.parents[1]).evaluation.model_dump(include=MEASURED)
    return all(settings.get(key) == value for key, value in wanted.items())


def evaluation_of(model: Path) -> Path:
    """Where the evaluation of a run's model lies that its recipe asks for; those of other settings lie beside it."""
    return model.parents[1] / "evaluation" / model.name


def read_run(run: Path) -> tuple[Recipe, list[Record]]:
    """A run directory's recipe and its records; `InputError` where it is none, or nothing was validated yet."""
    recipe = recipe_of(run)
    records = Metrics(run / "metrics.jsonl").records()
    if not any(record["kind"] == "val" for record in records):
        raise InputError(f"{run} has no validation yet; its first comes before the first iteration")
    return recipe, records


@dataclass
class Origin:
    """The run that a model folder belongs to: its recipe, and the data that it trained on."""

    folder: Path
    recipe: Recipe
    data_fingerprint: str
    iterations: int  # that the model was trained for, by its name; of any other name, the recipe's


def origin_of(model: str) -> Origin | None:
    """The run of the model folder `runs/<name>/models/<model>`, or None for any other place.

    Raises `DamagedData` when the run's recipe is none.
    """
    folder = Path(os.path.abspath(model)).parent.parent
    if not Path(model).is_dir() or not (folder / RECIPE).is_file():
        return None
    fingerprint = read_file(folder / RECIPE, lambda found: found["meaning"]["data fingerprint"], REWRITTEN)
    recipe, name = recipe_of(folder), _NAME.fullmatch(Path(model).resolve().name)
    return Origin(folder, recipe, fingerprint, int(name[1]) if name else recipe.schedule.max_iters)
