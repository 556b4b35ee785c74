"""One training step, validation, and the loop around them.

One step is read in five files: this one, batches.py, gpt2.py, loss.py, optim.py. Accelerate gives device, precision,
processes, gradient synchronisation and trackers; the global batch and the learning rate are functions of the iteration
alone (docs/design.md says why).
"""

from __future__ import annotations

import contextlib
import gc
import sys
import time
from collections.abc import Callable, Collection
from functools import partial

import numpy as np
import torch
from torch import nn

from overnight.core.files import disk_full_error
from overnight.core.scripts import no_command
from overnight.data.manifest import as_prepared
from overnight.device.faults import out_of_memory
from overnight.device.launch import launch, on_main
from overnight.doctor.unusable_gpu import mind_unusable_gpu
from overnight.hub.background import Uploader
from overnight.hub.download import fetch_state
from overnight.model import optim
from overnight.recipe.schedule import goals, lr_at
from overnight.recipe.schema import Recipe
from overnight.report.status import print_finished
from overnight.run_dir.directory import RunDirectory
from overnight.run_dir.layout import LOG, finished, folder_name, refuse_damaged_model
from overnight.training import finish, micro_batch
from overnight.training.log import (
    log_baselines,
    log_quick_evals,
    log_saved,
    log_skip,
    log_spike,
    log_step,
)
from overnight.training.resume import finish_saving, resume, save, save_due
from overnight.training.setup import found_identity, open_data, print_plan, set_up
from overnight.training.state import Run, Throughput, TimeLimit
from overnight.training.time_limit import begin, target_in_time, tonight
from overnight.training.validation import validation_due, validation_step


def train(
    recipe: Recipe,
    *,
    dry_run: bool = False,
    allowed: Collection[str] = (),
    cooldown: int | None = None,
    until: str | None = None,
    resume_from: str | None = None,
) -> int:
    """Train what `recipe` says, from where its run directory stands; returns the exit code.

    0 done, or done before; 4 diverged; 75 interrupted by a signal or a fault of the device, and resumable. `allowed`
    are the keys that may mean something else than when the run began; `cooldown` is a milestone to finish from the
    trunk as it is, and nothing else; `until` is a time of day, HH:MM, in place of `schedule.hours`; `resume_from` is
    hub:OWNER/NAME, whose state is continued.
    Raises `InputError` before anything is written when recipe, data and device do not fit.
    """
    accelerator, console = launch(recipe)
    if dry_run:
        print_plan(recipe, accelerator, console)
        return 0
    mind_unusable_gpu(recipe, accelerator, console)
    shards = open_data(recipe, accelerator, console)
    recipe = as_prepared(recipe, shards.manifest)
    directory = RunDirectory(recipe)
    if resume_from:
        on_main(accelerator, lambda: fetch_state(resume_from, directory))
    directory.refuse_another_run(found_identity(accelerator, shards), allowed)
    time_limit = None if cooldown else tonight(recipe, directory, until)
    targets = targets_of(directory, time_limit) if cooldown is None else [cooldown]
    done = finished(directory.path)
    unfinished = [target for target in targets if target not in done]
    for target in unfinished:
        directory.refuse_unreachable(target, now=cooldown is not None)
    on_main(accelerator, directory.lock)
    for target in done.keys() & set(targets):
        on_main(accelerator, partial(refuse_damaged_model, directory.models / folder_name(target)))
    run = set_up(recipe, accelerator, console, directory, shards, unfinished, time_limit) if unfinished else None
    with contextlib.closing(Uploader(directory, console, active=accelerator.is_main_process)) as uploader:
        if run is None:
            print_finished(directory, console, targets[-1])
            code = 0
        else:
            uploader.first_word()
            code = fit(run, uploader)
        uploader.over = code == 0
    return code


def targets_of(directory: RunDirectory, time_limit: TimeLimit | None) -> list[int]:
    """What the run is to finish, ascending: the milestones of its recipe, or what an earlier session chose."""
    whole = goals(directory.recipe.schedule)
    last = directory.flat_end() or (time_limit and time_limit.target_iters) or whole[-1]
    return [*(milestone for milestone in whole if milestone < last), last]


def fit(run: Run, uploader: Uploader) -> int:
    """Train to each target, ascending; between two, go back to the trunk. Returns the exit code."""
    try:
        with finish.stop_on_signal(run):
            for target in run.targets:
                run.target_iters, run.throughput = target, Throughput(run.throughput.validation_seconds)
                with disk_full_error(run.directory.path, "name"):
                    resume(run)
                run.console.keep(run.directory.path / LOG)
                code = loop(run, uploader)
                uploader.news = code == 0
                if code or run.target_iters != target:  # flat, or out of time: it ended with another target
                    break
            if code == 0:
                log_quick_evals(run, wait=True)
            return code
    except RuntimeError as error:
        return finish.end_without_device(run, error)
    finally:
        finish.close(run)


def train_step(run: Run) -> tuple[float, float, bool]:
    """One update on exactly `tokens_per_iter` tokens: (loss in nats per token, gradient norm, were weights updated)."""
    while (prepared := prepare_update(run)) is None:  # out of memory: the same tokens again, fewer of them at once
        micro_batch.halve(run)
    loss, grad_norm, changes = prepared
    finite = abs(loss) < float("inf") and grad_norm < float("inf")  # both false for NaN
    if finite:
        for change in changes:
            change()
    run.model.zero_grad(set_to_none=True)
    return loss, grad_norm, finite


def prepare_update(run: Run) -> tuple[float, float, list[Callable[[], None]]] | None:
    """All of an update that takes memory: its loss, gradient norm, and what changes weights and state, which does not.

    None when a process ran out of memory, on all of them: nothing was changed then, and it can be done again.
    """
    loss = accumulate(run)
    if loss is None:
        return None
    overdue = time.monotonic() - run.saved_at > 60 * run.recipe.checkpoint.every_minutes
    asked, values = [float(run.signalled), float(overdue)], None
    try:
        grad_norm = nn.utils.clip_grad_norm_(run.model.parameters(), run.recipe.optim.grad_clip)
        changes = optim.prepared(run.optimizers)
        values = torch.cat([torch.stack([loss, grad_norm]), loss.new_tensor([*asked, False])])
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
    if values is None:
        run.model.zero_grad(set_to_none=True)  # so that there is room to tell the others
        values = loss.new_tensor([0.0, 0.0, *asked, True])
    # The one synchronisation of a step, of its clock too: the host waits for all that the device was given before.
    loss_value, norm_value, signalled, overdue, ran_out = run.accelerator.reduce(values, "mean").tolist()
    run.stopping, run.overdue = signalled > 0, overdue > 0  # all processes agree, whichever got the signal
    return None if ran_out else (loss_value, norm_value, changes)


def accumulate(run: Run) -> torch.Tensor | None:
    """The gradients of one iteration, left in the model, and its loss here; None when a process ran out of memory.

    The loss of a micro-batch is its sum over tokens times processes / tokens_per_iter: accumulating adds these up, DDP
    averages over processes, and what remains is the mean over every token of the iteration.
    """
    processes = run.accelerator.num_processes
    share = processes / run.recipe.batch.tokens_per_iter
    torch.manual_seed(dropout_seed(run.recipe.seed, run.iteration, run.accelerator.process_index))
    last = False
    try:
        loss = torch.zeros((), device=run.device.torch)
        batches = run.batches.micro_batches(run.iteration, run.micro_batch, run.device.torch)
        for number, (ids, targets) in enumerate(batches, start=1):
            last = number * run.micro_batch == run.derived.rows_per_process
            if last and processes > 1 and micro_batch.another_ran_out(run):
                return None
            with contextlib.nullcontext() if last else run.accelerator.no_sync(run.prepared):
                micro_loss = run.prepared(ids, targets) * share
                run.accelerator.backward(micro_loss)
            loss += micro_loss.detach()
        return loss
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
    if processes > 1:
        micro_batch.tell_the_others(run, synchronising=last)
    return None


def dropout_seed(seed: int, iteration: int, rank: int) -> int:
    """Dropout's random stream is a function of these three, so that a resumed run has no random state to restore."""
    return int(np.random.SeedSequence([seed, iteration, rank]).generate_state(1, np.uint64)[0] >> 1)


def loop(run: Run, uploader: Uploader) -> int:
    """Train to the target, or until a signal asks to stop; returns the exit code."""
    begin(run)
    gc.collect()
    gc.freeze()  # what set-up made stays: collecting it again and again only stalls the device
    if validation_due(run):  # before the first iteration, or the session before was asked to stop in the middle of it
        run.target_iters = validation_step(run) or run.target_iters
    log_baselines(run)
    while run.iteration < run.target_iters and not run.stopping:
        started = time.monotonic()
        optim.set_lr(run.optimizers, lr_at(run.iteration, run.schedule))
        loss, grad_norm, finite = train_step(run)
        run.throughput.add(time.monotonic() - started)
        run.iteration += 1
        watch(run, loss, grad_norm, finite=finite)
        if run.history.skipped_in_a_row == finish.SKIPS_BEFORE_GIVING_UP:
            return finish.abort_diverged(run, f"{finish.SKIPS_BEFORE_GIVING_UP} updates in a row were not finite")
        if run.iteration % run.recipe.logging.every == 0 or run.iteration == run.target_iters:
            log_step(run, loss, grad_norm)
        if validation_due(run):
            run.target_iters = validation_step(run) or run.target_iters
        run.target_iters = target_in_time(run) or run.target_iters
        if save_due(run) or run.stopping:
            save(run)
        log_saved(run, run.saver.outcome(wait=False))
        uploader.poll()
    finish_saving(run)
    if run.stopping:
        return finish.interrupted(run)
    problem = finish.unfit(run)
    return finish.finish(run) if problem is None else finish.abort_diverged(run, problem)


def watch(run: Run, loss: float, grad_norm: float, *, finite: bool) -> None:
    """Add an iteration to the run's history, and tell what is unusual about it."""
    rise = run.history.add(loss, finite=finite)
    if not finite:
        log_skip(run, loss, grad_norm)
    if rise is not None:
        log_spike(run, loss, rise)


if __name__ == "__main__":
    sys.exit(no_command("train"))
