"""A run that is given hours: the budget that fits is chosen by its own pace, and its model is there in time.

`night.json` in the run directory keeps the hour and the choice, so that a run that was interrupted still ends in time.
Up to its branch point a budget has the iterations of any longer one, so the choice may wait until the pace is known,
and may be changed as long as nothing has been decayed.
"""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from datetime import datetime, timedelta
from typing import Any

import psutil
from accelerate.utils import broadcast_object_list

from overnight.core.console import duration
from overnight.core.files import atomic_write, strict_json
from overnight.errors import InputError
from overnight.recipe.schedule import branch_point, ending_now, towards
from overnight.recipe.schema import Recipe
from overnight.run_dir.directory import RunDirectory
from overnight.run_dir.layout import finished, read_file, saved_iterations
from overnight.training.state import KeptLimit, Run, TimeLimit

FILE = "night.json"
PROBE = 10  # iterations from which the pace is known
RECENT = 0.1  # of the night: over which the pace is measured
ROUND = 10  # iterations: a budget is a multiple of it
LATE, EARLY = 0.02, 0.05  # of the night: by how much a budget may miss its end before another one is chosen
EXPORT_SECONDS = 30.0  # of writing a finished model and loading it in a fresh process, until one was measured


def tonight(recipe: Recipe, directory: RunDirectory, until: str | None) -> TimeLimit | None:
    """The night that is not over where this session continues one, a new one otherwise; None without hours.

    Raises `InputError` for a time of day that is none, and when both it and `schedule.hours` are given.
    """
    hours = recipe.schedule.hours
    if until is None and hours is None:
        return None
    if until is not None and hours is not None:
        raise InputError(f"`--until {until}` and `schedule.hours` {hours:g} are both given; one of them would work")
    if recipe.schedule.kind != "wsd" or recipe.schedule.milestones:
        raise InputError(
            "`--until` needs `schedule.kind: wsd`, and no `schedule.milestones`: it finds the one that fits"
        )
    now = datetime.now().astimezone()
    began = datetime.fromtimestamp(psutil.Process().create_time()).astimezone()
    asked = f"until {until}" if until else f"{hours:g} hours"
    kept = going_on(directory, asked, now)
    if kept is None:
        end = next_time(until, now) if until else began + timedelta(hours=hours or 0)
        kept = KeptLimit(asked, end.isoformat(timespec="seconds"), (end - began).total_seconds())
    left = (datetime.fromisoformat(kept.until) - now).total_seconds()
    ends = [*finished(directory.path).values()]
    return TimeLimit(
        kept,
        ends=time.clock_gettime(time.CLOCK_BOOTTIME) + left,
        export_seconds=ends[-1]["export_seconds"] if ends else EXPORT_SECONDS,
    )


def going_on(directory: RunDirectory, asked: str, now: datetime) -> KeptLimit | None:
    """The night of an earlier session that asked for the same and is not over.

    It is over when its budget is finished, or when its time is, unless the decay has begun.
    """
    path = directory.path / FILE
    if not path.exists():
        return None
    kept = read_file(path, kept_limit, "remove it, and the same command chooses what fits by the pace of the run again")
    if kept.asked != asked or (kept.budget and kept.budget in finished(directory.path)):
        return None
    decaying = kept.budget is not None and bool(saved_iterations(directory.cooldown_of(kept.budget)))
    return kept if decaying or now < datetime.fromisoformat(kept.until) else None


def kept_limit(found: dict[str, Any]) -> KeptLimit:
    """What `night.json` says."""
    kept = KeptLimit(**found)
    if datetime.fromisoformat(kept.until).tzinfo is None or not isinstance(kept.budget, int | None):
        raise ValueError("no time with a zone, or no number of iterations")
    return replace(kept, seconds=float(kept.seconds))


def next_time(clock: str, now: datetime) -> datetime:
    """The next time that a clock on the wall shows `clock`, HH:MM."""
    try:
        hour, minute = map(int, clock.split(":"))
        wall = now.replace(tzinfo=None)  # the night may begin in one time and end in another: in summer's
        then = wall.replace(hour=hour, minute=minute, second=0, microsecond=0)
    except ValueError:
        raise InputError(f"`--until {clock}`: a time of day such as 07:30 would work") from None
    return (then if then > wall else then + timedelta(days=1)).astimezone()


def begin(run: Run) -> None:
    """Keep the time limit for the session after an interruption, and say when it ends."""
    if run.time_limit is not None and run.accelerator.is_main_process:
        limit = run.time_limit
        keep(run, limit)
        chosen = (
            f", {limit.target_iters:,} iterations"
            if limit.target_iters
            else "; the first iterations decide how many fit"
        )
        run.console.log(f"the night ends {limit.when()}{chosen}")


def keep(run: Run, limit: TimeLimit) -> None:
    """Write `night.json`."""
    atomic_write(run.directory.path / FILE, strict_json(asdict(limit.kept), indent=1))


def target_in_time(run: Run) -> int | None:
    """The target that fits, where one is to be chosen: once the pace is known, and when the old one no longer fits."""
    limit = run.time_limit
    if limit is None or run.iteration % run.recipe.logging.every or run.decaying:
        return None
    chosen = [longest_in_time(run, limit) if run.accelerator.is_main_process else None]
    (target,) = broadcast_object_list(chosen)
    if target is None:
        return None
    before, limit.kept = limit.target_iters, replace(limit.kept, budget=target)
    if run.accelerator.is_main_process:
        keep(run, limit)
        tell_target(run, limit, before)
    return target


def longest_in_time(run: Run, limit: TimeLimit) -> int | None:
    """The longest target that is finished in time; None where the pace is not known, or the one chosen fits."""
    now = time.monotonic() - run.throughput.all_validations
    limit.marks.append((now, run.iteration))
    while len(limit.marks) > 2 and now - limit.marks[1][0] > RECENT * limit.kept.seconds:
        del limit.marks[0]
    began, first = limit.marks[0]
    if run.iteration == first:
        return None
    seconds = (now - began) / (run.iteration - first)
    validation = run.throughput.validation_seconds
    seconds += validation / run.recipe.validation.every
    left = limit.left() - validation - limit.export_seconds
    shortest = ending_now(run.recipe.schedule, max(run.iteration, run.recipe.schedule.warmup_iters))
    assert shortest is not None
    fits = run.iteration + int(left / seconds) // ROUND * ROUND
    fits = min(max(fits, shortest), run.recipe.schedule.max_iters)
    if limit.target_iters is None:
        return fits if run.iteration - first >= PROBE or fits == shortest else None
    spare = left - (limit.target_iters - run.iteration) * seconds
    holds = -LATE * limit.kept.seconds <= spare <= EARLY * limit.kept.seconds
    return None if holds or fits == limit.target_iters else fits


def tell_target(run: Run, limit: TimeLimit, before: int | None) -> None:
    """Say and record what was chosen, in place of what."""
    target, until = limit.target_iters, limit.kept.until
    assert target is not None
    run.record("event", event="night", budget=target, before=before, until=until)
    instead = f" in place of {before:,}" if before else ""
    run.console.log(
        f"{target:,} iterations fit into the {duration(limit.left())} that are left{instead}: the learning rate falls"
        f" from iteration {branch_point(towards(run.schedule, target)):,} on"
    )
