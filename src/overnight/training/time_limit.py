"""A run that is given hours: the budget that fits is chosen by its own pace, and its model is there in time.

`night.json` in the run directory keeps the hour and the choice, so that a run that was interrupted still ends in time.
Up to its branch point a budget has the iterations of any longer one, so the choice may wait until the pace is known,
and may be changed as long as nothing has been decayed.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import psutil
from accelerate.utils import broadcast_object_list

from overnight.core.console import duration
from overnight.core.files import write_whole
from overnight.errors import InputError
from overnight.recipe.schedule import branch_point, ending_now, towards
from overnight.recipe.schema import Recipe
from overnight.run_dir.directory import RunDirectory
from overnight.run_dir.layout import saved_iterations

if TYPE_CHECKING:
    from overnight.training.log import Pace
    from overnight.training.setup import Run

FILE = "night.json"
PROBE = 10  # iterations from which the pace is known
RECENT = 0.1  # of the night: over which the pace is measured
ROUND = 10  # iterations: a budget is a multiple of it
LATE, EARLY = 0.02, 0.05  # of the night: by how much a budget may miss its end before another one is chosen
EXPORT_SECONDS = 30.0  # of writing a finished model and loading it in a fresh process, until one was measured


@dataclass(frozen=True)
class Kept:
    """A night as `night.json` has it."""

    asked: str  # as the user said it
    until: str  # in local time, ISO 8601
    seconds: float  # from the start of the process that began it
    budget: int | None = None  # iterations, once chosen


@dataclass
class Night:
    """A night in the session that goes through it."""

    kept: Kept
    ends: float  # on the monotonic clock, which no one sets
    validation_seconds: float  # of an earlier session, until this one has had its own
    export_seconds: float
    marks: list[tuple[float, int]] = field(default_factory=list)  # (seconds without validations, iteration), recent

    @property
    def budget(self) -> int | None:
        """The iterations that were chosen."""
        return self.kept.budget

    def left(self) -> float:
        """Seconds."""
        return self.ends - time.monotonic()


def tonight(recipe: Recipe, directory: RunDirectory, until: str | None) -> Night | None:
    """The night that is still going on where this session continues one, a new one otherwise; None without hours.

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
        kept = Kept(asked, end.isoformat(timespec="seconds"), (end - began).total_seconds())
    left = (datetime.fromisoformat(kept.until) - now).total_seconds()
    validations, ends = directory.records("val"), [*directory.ends().values()]
    return Night(
        kept,
        ends=time.monotonic() + left,
        validation_seconds=validations[-1]["seconds"] if validations else 0.0,
        export_seconds=ends[-1]["export_seconds"] if ends else EXPORT_SECONDS,
    )


def going_on(directory: RunDirectory, asked: str, now: datetime) -> Kept | None:
    """The night of an earlier session that asked for the same and is not over.

    It is over when its budget is finished, or when its time is, unless the decay has begun.
    """
    path = directory.path / FILE
    if not path.exists():
        return None
    kept = Kept(**json.loads(path.read_text(encoding="utf-8")))
    if kept.asked != asked or (kept.budget and directory.finished(kept.budget)):
        return None
    decaying = kept.budget is not None and bool(saved_iterations(directory.cooldown_of(kept.budget)))
    return kept if decaying or now < datetime.fromisoformat(kept.until) else None


def next_time(clock: str, now: datetime) -> datetime:
    """The next time that a clock on the wall shows `clock`, HH:MM."""
    try:
        hour, minute = map(int, clock.split(":"))
        then = now.replace(hour=hour, minute=minute, second=0, microsecond=0)
    except ValueError:
        raise InputError(f"`--until {clock}`: a time of day such as 07:30 would work") from None
    return then if then > now else then + timedelta(days=1)


def begin(run: Run) -> None:
    """Keep the night for the session after an interruption, and say when it ends."""
    if run.night is not None and run.accelerator.is_main_process:
        keep(run, run.night)
        chosen = f", {run.night.budget:,} iterations" if run.night.budget else "; what fits is chosen by the first ones"
        run.console.say(f"the night ends at {run.night.kept.until}, in {duration(run.night.left())}{chosen}")


def keep(run: Run, night: Night) -> None:
    """Write `night.json`."""
    write_whole(run.directory.path / FILE, json.dumps(asdict(night.kept), indent=1))


def keep_to_time(run: Run, pace: Pace) -> None:
    """Choose the budget that fits once the pace is known, and another one when it no longer does."""
    night = run.night
    if night is None or run.iteration % run.recipe.logging.every or run.directory.cooling(run.iteration):
        return
    chosen = [fitting(run, night, pace) if run.accelerator.is_main_process else None]
    (budget,) = broadcast_object_list(chosen)
    if budget is None:
        return
    if run.accelerator.is_main_process:
        tell(run, night, budget)
    night.kept = replace(night.kept, budget=budget)
    if run.accelerator.is_main_process:
        keep(run, night)
    run.directory.aim(budget)


def fitting(run: Run, night: Night, pace: Pace) -> int | None:
    """The longest budget that is finished in time; None where the pace is not known, or the one chosen fits."""
    now = time.monotonic() - pace.all_validations
    night.marks.append((now, run.iteration))
    while len(night.marks) > 2 and now - night.marks[1][0] > RECENT * night.kept.seconds:
        del night.marks[0]
    began, first = night.marks[0]
    if run.iteration == first:
        return None
    seconds = (now - began) / (run.iteration - first)
    validation = pace.validation_seconds or night.validation_seconds
    seconds += validation / run.recipe.validation.every
    left = night.left() - validation - night.export_seconds
    shortest = ending_now(run.recipe.schedule, max(run.iteration, run.recipe.schedule.warmup_iters))
    assert shortest is not None
    fits = run.iteration + int(left / seconds) // ROUND * ROUND
    fits = min(max(fits, shortest), run.recipe.schedule.max_iters)
    if night.budget is None:
        return fits if run.iteration - first >= PROBE or fits == shortest else None
    spare = left - (night.budget - run.iteration) * seconds
    holds = -LATE * night.kept.seconds <= spare <= EARLY * night.kept.seconds
    return None if holds or fits == night.budget else fits


def tell(run: Run, night: Night, budget: int) -> None:
    """Say and record what was chosen."""
    before, point = night.budget, branch_point(towards(run.schedule, budget))
    run.directory.append("event", run.iteration, event="night", budget=budget, before=before, until=night.kept.until)
    instead = f" in place of {before:,}" if before else ""
    run.console.say(
        f"{budget:,} iterations fit into the {duration(night.left())} that are left{instead}: the learning rate falls"
        f" from iteration {point:,} on"
    )
