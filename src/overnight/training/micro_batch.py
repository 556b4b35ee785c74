"""How many rows go through the model at once: measured before the first iteration, halved when memory runs out.

It decides speed and memory, never the result. Only divisors of a process's rows are taken, the same on all processes.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from overnight.core.console import count, duration
from overnight.device.faults import until_memory_runs_out
from overnight.device.launch import on_main
from overnight.errors import EXIT_INTERRUPTED, InputError
from overnight.planning.memory import largest_fitting
from overnight.planning.model_size import memory_gib, next_divisor
from overnight.run_dir.layout import ENVIRONMENT, read_file
from overnight.training.state import Run

WARM_STEPS, TIMED_STEPS = 2, 5  # the first compiles, the second is the first that has gradients to add to
TRIALS = 3  # sizes that fit and are compared: compiling one takes longer than timing it
FORMULA_ERROR = 0.15  # by which the formula may say more than a size really takes
AS_MUCH_MEMORY = 0.05  # by which the memory may differ from an earlier session's, whose size is then taken


class Trial(NamedTuple):
    """What one size was measured to take."""

    rows: int
    seconds: float  # of one forward and backward
    gib: float  # peak

    @property
    def rows_per_second(self) -> float:
        return self.rows / self.seconds


def search(first: int, rows: int, limit_gib: float, attempt: Callable[[int], Trial | None], trials: int) -> list[Trial]:
    """Try sizes from `first` down, each a divisor of `rows` and at most half of the one before; those that fit.

    It ends when `trials` sizes fit, or when a smaller one was slower per token: still smaller ones would be too.
    `attempt` returns None for a size that ran out of memory.
    """
    fitting: list[Trial] = []
    size = first
    while size and len(fitting) < trials:
        trial = attempt(size)
        if trial is not None and trial.gib <= limit_gib:
            fitting.append(trial)
        if len(fitting) > 1 and fitting[-1].rows_per_second < fitting[-2].rows_per_second:
            break
        size = next_divisor(rows, size // 2)
    return fitting


def choose(trials: list[Trial]) -> int:
    """The size with the most tokens per second, which need not be the largest; 0 when none fits."""
    return max(trials, key=lambda trial: trial.rows_per_second).rows if trials else 0


def measure(run: Run) -> str:
    """Give a CUDA run the fastest micro-batch that fits, and say in words what was found; a CPU keeps what it has.

    A size that the recipe names is tried alone, and smaller ones only when it does not fit. Raises `InputError` on
    every process when on one of them not even a single row fits.
    """
    if not run.device.cuda:
        return f"{run.micro_batch} rows"
    limit = run.device.cap_memory()
    remembered = smallest_of_all(run, earlier(run, limit))
    if remembered:
        run.micro_batch = remembered
        return f"{remembered} rows, as an earlier session measured on the same device with as much memory"
    run.console.log(f"measuring which micro-batch is the fastest in {limit:.1f} GiB; each size is compiled once")
    trials = search(
        largest_to_try(run, limit),
        run.derived.rows_per_process,
        limit,
        lambda rows: attempt(run, rows),
        TRIALS if run.derived.measured else 1,
    )
    run.micro_batch = smallest_of_all(run, choose(trials))
    if not run.micro_batch:
        raise too_small(run)
    return f"{run.micro_batch} rows; measured in {limit:.1f} GiB: " + ", ".join(describe(run, t) for t in trials)


def smallest_of_all(run: Run, rows: int) -> int:
    """The smallest `rows` that one of the processes says: all take the same size."""
    return int(run.accelerator.gather(torch.tensor([rows], device=run.device.torch)).min())


def circumstances(run: Run) -> dict[str, Any]:
    """What decides, beside the memory that is free, which size is the fastest, as environment.json keeps it."""
    return {
        "device": run.device.name,
        "torch": torch.__version__,
        "compiled": run.compiled,
        "precision": run.accelerator.mixed_precision,
        "num_processes": run.accelerator.num_processes,
        "model": run.recipe.model.model_dump(),
        "batch": run.recipe.batch.model_dump(),
    }


def measured(run: Run) -> dict[str, Any] | None:
    """The size of this session for the next one, as environment.json keeps it; None on a CPU."""
    if not run.device.cuda:
        return None
    return {"micro_batch": run.micro_batch, "limit_gib": run.device.limit_gib, "circumstances": circumstances(run)}


def earlier(run: Run, limit_gib: float) -> int:
    """The size of the run's last session, where it was measured under what would be measured now; otherwise 0."""
    environment = run.directory.path / ENVIRONMENT

    def size(found: dict[str, Any]) -> int:
        measured = found.get("measured")
        if measured is None or measured["circumstances"] != circumstances(run):
            return 0
        same = abs(limit_gib - measured["limit_gib"]) <= AS_MUCH_MEMORY * measured["limit_gib"]
        return int(measured["micro_batch"]) if same else 0

    def read() -> int:
        return read_file(environment, size, "remove it: the same command writes it anew") if environment.exists() else 0

    return on_main(run.accelerator, read)


def largest_to_try(run: Run, limit_gib: float) -> int:
    """Where trying begins: at the size that the recipe names, or the largest that the formula lets fit, or nearly.

    0 where by the formula not even a single row does: nothing is compiled then.
    """
    if not run.derived.measured:
        return run.derived.first_micro_batch
    return largest_fitting(run.derived, (1 + FORMULA_ERROR) * limit_gib, partial(formula_gib, run))


def formula_gib(run: Run, rows: int) -> float:
    """What the plan says that `rows` rows at once take of this run's card."""
    return memory_gib(run.recipe, rows, compiled=run.compiled, bf16=run.accelerator.mixed_precision == "bf16")


def describe(run: Run, trial: Trial) -> str:
    """A trial in words."""
    tokens = trial.rows_per_second * run.recipe.batch.sequence_length
    return f"{trial.rows} rows {count(tokens)} tok/s {trial.gib:.1f} GiB"


def attempt(run: Run, rows: int) -> Trial | None:
    """Run micro-batches of `rows` rows as training will, and time them; None when they do not fit."""
    started, trial = time.monotonic(), None
    run.device.release()
    with until_memory_runs_out():
        trial = Trial(rows, seconds_per_step(run, rows), run.device.used_gib())
    run.model.zero_grad(set_to_none=True)
    run.device.release()
    found = f"{rows} rows do not fit" if trial is None else describe(run, trial)
    run.console.log(f"  {found} (tried in {duration(time.monotonic() - started)})")
    return trial


def seconds_per_step(run: Run, rows: int) -> float:
    """Seconds of one forward and backward of `rows` rows, once warm. No process waits for another here."""
    ids, targets = next(run.batches.micro_batches(0, rows, run.device.torch))
    run.prepared.train()
    started = 0.0
    with run.accelerator.no_sync(run.prepared):
        for step in range(WARM_STEPS + TIMED_STEPS):
            if step == WARM_STEPS:
                run.device.synchronize()
                started = time.monotonic()
            run.accelerator.backward(run.prepared(ids, targets))
        run.device.synchronize()
    return (time.monotonic() - started) / TIMED_STEPS


def another_ran_out(run: Run) -> bool:
    """Asked before the micro-batch in which processes wait for each other: whether memory ran out on one of them."""
    return ran_out_anywhere(run, False)


def tell_the_others(run: Run, *, synchronising: bool) -> None:
    """Answer the others' question after memory ran out here.

    Once gradients are being exchanged the others wait for this process's, and nothing but its end releases them.
    """
    if synchronising:
        print(
            f"process {run.accelerator.process_index} ran out of memory while the processes exchanged gradients;"
            f" `--batch.micro_batch {max(1, next_size(run))}` would work, and continues from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(EXIT_INTERRUPTED)
    ran_out_anywhere(run, True)


def ran_out_anywhere(run: Run, here: bool) -> bool:
    """Whether one of the processes says yes; all of them must ask."""
    return bool(run.accelerator.reduce(torch.tensor(float(here), device=run.device.torch), "sum") > 0)


def next_size(run: Run) -> int:
    """The largest divisor up to half of the present micro-batch; 0 when that is a single row."""
    return next_divisor(run.derived.rows_per_process, run.micro_batch // 2)


def halve(run: Run, *, validating: bool = False) -> None:
    """Make the micro-batch smaller for what ran out of memory, an iteration or a validation, and is done again.

    An iteration's gradients are dropped. Raises `InputError` when the micro-batch is a single row.
    """
    run.model.zero_grad(set_to_none=True)
    run.device.release()
    iteration, before, after = run.iteration + (not validating), run.micro_batch, next_size(run)
    if run.accelerator.is_main_process:
        run.record_at(iteration, "event", event="out of memory", micro_batch=before, next_micro_batch=after)
    if not after:
        raise too_small(run)
    run.micro_batch = after
    run.console.log(
        f"{'validation at ' if validating else ''}iteration {iteration}: out of memory with {before} rows at once; its"
        f" tokens again with {after} rows at once"
    )


def too_small(run: Run) -> InputError:
    """That there is no smaller micro-batch, and what can be done."""
    return InputError(
        f"out of memory with a single row of `batch.sequence_length` {run.recipe.batch.sequence_length} tokens on"
        f" {run.device.name}: `nvidia-smi` shows what else holds its memory. When that is gone, the same command"
        " continues from the last checkpoint, if there is one; a smaller model or a shorter row is another run"
    )
