"""Where things lie in a run directory, for those who read it: names, and a run's recipe and records. Without torch."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from overnight.errors import InputError
from overnight.recipe.identity import stored_recipe
from overnight.recipe.schema import Recipe
from overnight.run_dir.metrics import Metrics, Record

LOG = "log.txt"  # what the session printed; of those before it log-1.txt and so on
_NAME = re.compile(r"iter-(\d{6,})")


def folder_name(iteration: int) -> str:
    """`iter-004800`"""
    return f"iter-{iteration:06d}"


def iteration_of(path: Path) -> int:
    """4800 of `.../iter-004800`."""
    return int(path.name.removeprefix("iter-"))


def saved_iterations(folder: Path) -> dict[int, Path]:
    """The checkpoints (or models) in `folder` by iteration, ascending; other files there are left alone."""
    found = ((_NAME.fullmatch(path.name), path) for path in folder.glob("iter-*"))
    return dict(sorted((int(match[1]), path) for match, path in found if match and path.is_dir()))


def finished(run: Path) -> dict[int, Record]:
    """The milestones that a run has finished, ascending: the last record of each whose verified model is there."""
    ends = finished_in(Metrics(run / "metrics.jsonl").records())
    return {target: ends[target] for target in sorted(ends) if (run / "models" / folder_name(target)).is_dir()}


def finished_in(records: list[Record]) -> dict[int, Record]:
    """What records alone say of that, in the order in which the milestones first were finished."""
    return {record["iteration"]: record for record in records if record.get("event") == "finished"}


def recipe_of(run: Path) -> Recipe:
    """The recipe of a run directory; `InputError` where it is none."""
    try:
        return stored_recipe(yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))["recipe"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{run} is no run directory ({type(error).__name__}); runs/NAME would work") from None


def read_run(run: Path) -> tuple[Recipe, list[Record]]:
    """A run directory's recipe and its records; `InputError` where it is none, or nothing was validated yet."""
    recipe = recipe_of(run)
    records = Metrics(run / "metrics.jsonl").records()
    if not any(record["kind"] == "val" for record in records):
        raise InputError(f"{run} has no validation yet; its first comes before the first iteration")
    return recipe, records
