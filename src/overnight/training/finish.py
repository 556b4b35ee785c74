"""How a run ends: asked by a signal, diverged, interrupted, or finished with a model."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import time
from pathlib import Path

import numpy as np
import torch

from overnight.core.files import errno_of, no_room, sha256
from overnight.core.processes import ENDING, ORPHANED, handled
from overnight.core.scripts import typed_again
from overnight.core.sums import SUMS
from overnight.device.faults import end, told, with_room
from overnight.errors import EXIT_DIVERGED, EXIT_INTERRUPTED
from overnight.model.export import export
from overnight.model.gpt2 import published
from overnight.recipe.schedule import branch_point
from overnight.run_dir.layout import folder_name
from overnight.training.log import (
    informs,
    log_baselines,
    log_lost,
    log_results,
    log_saved,
    tell,
)
from overnight.training.resume import energy_used, finish_saving, time_used
from overnight.training.state import QuickEval, Run

SKIPS_BEFORE_GIVING_UP = 10
PROBE_TOKENS = 64  # at most, of the validation set, by which an export is compared with the model


def stop_on_signal(run: Run) -> contextlib.AbstractContextManager[None]:
    """SIGTERM, SIGINT, SIGHUP and the launcher's end let the iteration finish, and then save.

    A second signal ends the process at once.
    """

    def ask(number: int, frame: object) -> None:
        for each in ENDING:
            signal.signal(each, signal.SIG_DFL)
        if run.accelerator.is_main_process and not run.signalled:
            why = "the launcher is gone" if number == ORPHANED else signal.Signals(number).name
            with contextlib.suppress(OSError):  # not through the console: it may be in the middle of a line of its own
                os.write(2, f"{why}: finishing what is underway, then saving\n".encode())
        run.signalled = True

    return handled(ask)


def unfit(run: Run) -> str | None:
    """Why the model at the end of a budget is not one to finish with; None when it was updated, and validated."""
    last = run.history.last_val
    if last is None or last[0] < run.iteration:
        return "the validation loss at the end is not finite"
    if run.history.skipped_in_a_row == run.iteration:
        return f"all {run.iteration} updates were not finite"
    return None


def abort_diverged(run: Run, problem: str) -> int:
    """End a run that does not come back from what is not finite, without a model; the last checkpoint stays."""
    finish_saving(run)
    saved = run.directory.resumable(run.schedule)
    where = f"the last checkpoint is {saved[0]}" if saved else "there is no checkpoint yet"
    run.console.log(
        f"{problem}: the run has diverged; {where}."
        f" A lower `--optim.lr` (now {run.recipe.optim.lr:g}) under another `--name` is the usual cure"
    )
    if run.accelerator.is_main_process:
        run.record("event", event="diverged", problem=problem)
    return EXIT_DIVERGED


def end_without_device(run: Run, error: RuntimeError) -> int:
    """End a run whose device was lost, or has no memory left for what cannot be done in smaller pieces.

    What is on the device is not saved: it may be gone, or half of an update. A save that is underway has its copies in
    the host's memory, and ends. Raises `error` again where it is of another kind.
    """
    problem = told(error)
    log_saved(run, run.saver.outcome(wait=True))
    if run.accelerator.is_main_process:
        run.record("event", event="device failed", problem=problem)
    run.console.stop()
    return end(error, f"stopped after iteration {run.iteration} {where_it_goes_on(run)}{command(run)}")


def close(run: Run) -> None:
    """End what runs beside a run that has ended, the trackers too; nothing that fails here changes how it ended."""
    try:
        run.console.stop()
        for quick_eval in run.quick_evals:
            quick_eval.helper.stop()
        run.accelerator.end_training()
    except Exception as error:
        tell(run, "the trackers' end", error)


def interrupted(run: Run) -> int:
    """Record that the run stopped early, and say how it continues."""
    if run.accelerator.is_main_process:
        run.record("event", event="interrupted")
        log_lost(run)
    run.console.log(f"interrupted after iteration {run.iteration} {where_it_goes_on(run)}{command(run)}")
    return EXIT_INTERRUPTED


def where_it_goes_on(run: Run) -> str:
    """Whether the iteration at hand was saved, and where the same command continues."""
    saved = run.directory.resumable(run.schedule)
    if saved and saved[0].name == folder_name(run.iteration):
        return "and saved; the same command continues from there"
    if saved:
        return f"and not saved; the same command continues from {saved[0]}"
    return "with nothing saved; the same command starts from the beginning"


def command(run: Run) -> str:
    """The command of this process under a line, where it is the whole run."""
    return f":\n  {shlex.join(typed_again())}" if run.accelerator.num_processes == 1 else ""


def finish(run: Run) -> int:
    """Export the finished model, verified by a fresh process, and close with the results; returns the exit code."""
    code = 0
    if run.accelerator.is_main_process:
        folder, started = run.directory.models / folder_name(run.iteration), time.monotonic()
        length = min(PROBE_TOKENS, run.recipe.model.n_positions, run.shards.val.files[0].tokens)
        probe = torch.from_numpy(run.shards.val.read(0, 0, length).astype(np.int64))[None]
        run.console.log(f"exporting {folder} and loading it in a fresh process")
        try:
            model = published(run.model, run.recipe.model)
            with_room(run.device, lambda: export(model, run.tokenizer, folder, probe, lambda: run.signalled))
        except InterruptedError:  # the last checkpoint is there, and from it the same command writes the model
            code = interrupted(run)
        except Exception as error:  # tokenizers' own for what the system refuses is a bare Exception
            if errno_of(error) is None:
                raise
            mend = "make room" if no_room(error) else "mend that"
            run.console.log(f"{folder} is not written: {error}; {mend}, and the same command writes it")
            code = EXIT_INTERRUPTED
        else:
            finalize(run, folder, time.monotonic() - started)
    run.accelerator.wait_for_everyone()
    return code


def finalize(run: Run, folder: Path, export_seconds: float) -> None:
    """Record the end of the way to this target, print its results, and begin to score the model if that is asked."""
    joules, took, seconds = energy_used(run), time_used(run), run.throughput.per_iteration()
    run.record(
        "event",
        event="finished",
        model=f"{folder.parent.name}/{folder.name}",
        sums=sha256(folder / SUMS),
        val_loss=run.history.validations[-1][1],
        best_val_loss=run.history.best_val,
        tokens_per_second=run.recipe.batch.tokens_per_iter / seconds if seconds else None,
        seconds=took,
        resumed_at=run.resumed_at,
        kwh=None if joules is None else joules / 3.6e6,
        mean_watts=None if joules is None else joules / took,
        export_seconds=export_seconds,
    )
    log_baselines(run)  # of a budget that was chosen on the way
    log_results(run)
    if run.recipe.evaluation.at_milestones:
        begin_quick_eval(run, folder)
    if run.time_limit and run.iteration < run.recipe.schedule.max_iters:
        point = branch_point(run.schedule)
        run.console.log(f"      the same command, another night: continues from the trunk at iteration {point:,}")
    log_lost(run)


@informs("benchmarks of a milestone")
def begin_quick_eval(run: Run, folder: Path) -> None:
    """Start scoring a finished model; the run continues meanwhile."""
    run.quick_evals.append(QuickEval(folder, run.recipe.evaluation.at_milestones))
