"""The state of a run on its way to a checkpoint and back: what is saved, when, and how a run continues from it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from overnight.device.faults import with_room
from overnight.device.launch import on_main
from overnight.errors import DamagedData, InputError
from overnight.model import checkpoint
from overnight.recipe.identity import difference_lines, differences, quoted, recipe_identity
from overnight.recipe.schedule import branch_point, branch_points
from overnight.run_dir.layout import refuse_misplaced
from overnight.training.log import informs, log_saved
from overnight.training.setup import found_identity
from overnight.training.state import LossHistory, Run


def save_due(run: Run) -> bool:
    """Whether this iteration is one to save: by its number, by the clock, or as a point that is needed later."""
    needed = branch_points(run.recipe.schedule) | {branch_point(run.schedule), run.schedule.max_iters}
    return run.overdue or run.iteration % run.recipe.checkpoint.every == 0 or run.iteration in needed


def save(run: Run) -> None:
    """Begin a checkpoint on the main process; it is written while training continues."""
    run.saved_at = time.monotonic()
    if run.accelerator.is_main_process:
        log_saved(run, run.saver.outcome(wait=True))
        tensors = checkpoint.state_tensors(run.model, run.optimizers)
        path = run.directory.checkpoint(run.iteration, run.schedule)
        state, kept = state_of(run), run.directory.kept_for_ever(run.schedule)
        with_room(run.device, lambda: run.saver.start(path, tensors, state, kept_for_ever=kept))


def finish_saving(run: Run) -> None:
    """Wait for the save that is underway; the other processes wait too, since a launcher ends all when one ends."""
    log_saved(run, run.saver.outcome(wait=True))
    run.accelerator.wait_for_everyone()


@informs("energy")
def energy_used(run: Run) -> float | None:
    """Joules of the device over all sessions of the run, or None where it does not measure them."""
    session = run.device.power.joules()
    return None if session is None else session + (run.joules or 0.0)


def time_used(run: Run) -> float:
    """Seconds that all sessions of the run took, validations and models included."""
    return run.seconds + time.monotonic() - run.began


def state_of(run: Run) -> dict[str, Any]:
    """What a checkpoint says beside its tensors."""
    return {
        "run": run.directory.run_id,
        "iteration": run.iteration,
        "cooldown": run.cooldown_at(run.iteration),
        "meaning": run_identity(run),
        "changes": run.directory.changes,
        "history": run.history.as_json(),
        "joules": energy_used(run),
        "seconds": time_used(run),
        "threads": torch.get_num_threads(),
    }


def resume(run: Run) -> None:
    """Load the newest whole checkpoint, if there is one; every process loads the one that the main process chose.

    Raises `InputError`, before anything of the run is changed, when that is a checkpoint of another run.
    """
    found, said = on_main(run.accelerator, lambda: chosen(run))
    for line in said:
        run.console.log(line)
    if found is None:
        forget_after(run, -1)
        return
    state = checkpoint.read_state(found)
    checkpoint.load_checkpoint(found, run.model, run.optimizers)
    back = run.iteration > 0  # it is this session that goes back to its own trunk
    if not back:
        run.joules, run.seconds, run.resumed_at = state["joules"], state.get("seconds", 0.0), state["iteration"]
    run.iteration = state["iteration"]
    run.history = LossHistory.from_json(state["history"])
    forget_after(run, run.iteration)
    if run.accelerator.is_main_process:
        run.record("event", event="returned" if back else "resumed", checkpoint=found.name)
        for change in run.directory.changes[len(state["changes"]) :]:
            run.record("event", event="changed", **change)
    for change in run.directory.changes[len(state["changes"]) :]:
        run.console.log(f"`{change['key']}` was {quoted(change['before'])} and is {quoted(change['now'])} from here on")
    if state["threads"] != (threads := torch.get_num_threads()):
        run.console.log(
            f"this session computes with {threads} threads, the one before with {state['threads']}: losses agree to"
            " rounding, not to the bit"
        )
    run.console.log(f"resumes at iteration {run.iteration} from {found}")


def forget_after(run: Run, iteration: int) -> None:
    """Drop the records that will be made again, and say how many lines of the log were none."""
    if not run.accelerator.is_main_process:
        return
    run.directory.forget_after(iteration, run.target_iters)
    if skipped := run.directory.metrics.skipped:
        run.console.log(f"{run.directory.metrics.path}: {skipped} lines were no whole records, and are left out")


def chosen(run: Run) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, None where there never was one, and what is said about damaged ones before it.

    Raises `InputError` when it is not this run's, or not what its place says, and `DamagedData` when none is whole: to
    begin anew is the user's word, not ours.
    """
    directory = run.directory
    directory.clear_leftovers()
    nothing = f"no checkpoint is left to continue from: `--name NEW`, or moving {directory.path} away, starts a new run"
    try:
        found, said = checkpoint.newest_whole(directory.resumable(run.schedule))
    except DamagedData as error:
        raise DamagedData([*error.problems, nothing]) from None
    if found is not None:
        state = checkpoint.read_state(found)
        refuse_foreign(run, found, state)
        refuse_misplaced(found, state)
        return found, said
    own = [each for each in directory.records("event") if each.get("cooldown") in (None, run.target_iters)]
    if run.iteration or any(each["event"] == "saved" for each in own):
        raise DamagedData([f"{directory.checkpoints} has none of the checkpoints that were saved there", nothing])
    return None, said


def refuse_foreign(run: Run, found: Path, state: dict[str, Any]) -> None:
    """Raise `InputError` for a checkpoint whose identity is not this run's, now or before a change that was allowed."""
    changed = {change["key"] for change in run.directory.changes}
    now = run_identity(run)
    foreign = [change for change in differences(state["meaning"], now) if change["key"] not in changed]
    if state.get("run", run.directory.run_id) != run.directory.run_id:  # an older version's state does not say
        foreign.append({"key": "run", "before": state["run"], "now": run.directory.run_id})
    if foreign:
        raise InputError(
            f"{found} is of another run:\n{difference_lines(foreign)}\nmove it away; the one before it would work"
        )


def run_identity(run: Run) -> dict[str, Any]:
    """All that makes this run this run."""
    return recipe_identity(run.recipe) | found_identity(run.accelerator, run.shards)
