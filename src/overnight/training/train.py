"""One training step, validation, and the loop around them.

One step is read in five files: this one, batches.py, model.py, loss.py, optim.py. Accelerate gives device, precision,
processes, gradient synchronisation and trackers; the global batch and the learning rate are functions of the iteration
alone (docs/design.md says why).
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Collection

import numpy as np
import torch
from torch import nn

from overnight.core.files import room_in
from overnight.data.batches import validation_batches
from overnight.device.faults import until_memory_runs_out
from overnight.doctor.unusable_gpu import mind_unusable_gpu
from overnight.hub.background import fetch_state, sending
from overnight.model import optim
from overnight.recipe.schedule import goals, lr_at
from overnight.recipe.schema import Recipe
from overnight.run_dir.directory import RunDirectory
from overnight.training import finish, micro_batch
from overnight.training.log import (
    Pace,
    log_baselines,
    log_not_finite,
    log_saved,
    log_skip,
    log_spike,
    log_step,
    log_validation,
    print_finished,
)
from overnight.training.resume import finish_saving, resume, save, save_due, save_overdue
from overnight.training.setup import Run, identity, launch, lock, on_main, open_data, print_plan, set_up
from overnight.training.stopping import look_ahead
from overnight.training.time_limit import Night, begin, keep_to_time, tonight


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
    are the keys that may mean something else than when the run began; `cooldown` is a budget to finish from the trunk
    as it is, and nothing else; `until` is a time of day, HH:MM, in place of `schedule.hours`; `resume_from` is
    hub:OWNER/NAME, whose state is gone on with.
    Raises `InputError` before anything is written when recipe, data and device do not fit.
    """
    accelerator, console = launch(recipe)
    if dry_run:
        print_plan(recipe, accelerator, console)
        return 0
    mind_unusable_gpu(recipe, accelerator, console)
    shards = open_data(recipe, accelerator, console)
    directory = RunDirectory(recipe)
    if resume_from:
        on_main(accelerator, lambda: fetch_state(resume_from, directory))
    directory.refuse_another_run(identity(accelerator, shards), allowed)
    night = None if cooldown else tonight(recipe, directory, until)
    wanted = budgets(directory, night) if cooldown is None else [cooldown]
    unfinished = [goal for goal in wanted if not directory.finished(goal)]
    for goal in unfinished:
        directory.refuse_unreachable(goal, now=cooldown is not None)
    directory.aim((unfinished or wanted)[-1])
    if not unfinished:
        print_finished(directory, console)
        with sending(accelerator, directory, console) as sent:
            sent.over = True
        return 0
    lock(accelerator, directory, create=False)
    run = set_up(recipe, accelerator, console, directory, shards, night)
    try:
        with sending(accelerator, directory, console) as sent, finish.stop_on_signal(run):
            sent.first_word()
            code = finish_each(run, unfinished)
            sent.over = code == 0
        return code
    except RuntimeError as error:
        return finish.without_device(run, error)
    finally:
        finish.close(run)


def budgets(directory: RunDirectory, night: Night | None) -> list[int]:
    """What the run is to finish, ascending: the goals of its recipe, or what an earlier session chose to end with."""
    whole = goals(directory.recipe.schedule)
    last = directory.flat_end() or (night and night.budget) or whole[-1]
    return [*(goal for goal in whole if goal < last), last]


def finish_each(run: Run, unfinished: list[int]) -> int:
    """Train to the end of each budget, ascending; between two, go back to the trunk. Returns the exit code."""
    for goal in unfinished:
        run.directory.aim(goal)
        with room_in(run.directory.path, "name"):
            resume(run)
        code = loop(run)
        if code or run.schedule.max_iters != goal:  # flat, or out of time: it ended with another budget
            return code
    return 0


def train_step(run: Run) -> tuple[float, float, bool]:
    """One update on exactly `tokens_per_iter` tokens: (loss in nats a token, gradient norm, was the weight updated)."""
    optim.set_lr(run.optimizers, lr_at(run.iteration, run.schedule))
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
    asked, values = [float(run.signalled), float(save_overdue(run))], None
    with until_memory_runs_out():
        grad_norm = nn.utils.clip_grad_norm_(run.model.parameters(), run.recipe.optim.grad_clip)
        changes = optim.prepared(run.optimizers)
        values = torch.cat([torch.stack([loss, grad_norm]), loss.new_tensor([*asked, False])])
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
    share = run.accelerator.num_processes / run.recipe.batch.tokens_per_iter
    torch.manual_seed(dropout_seed(run.recipe.seed, run.iteration, run.accelerator.process_index))
    last = False
    with until_memory_runs_out():
        loss = torch.zeros((), device=run.device.torch)
        batches = run.batches.micro_batches(run.iteration, run.micro_batch, run.device.torch)
        for number, (ids, targets) in enumerate(batches, start=1):
            last = number == run.grad_accum
            if last and micro_batch.another_ran_out(run):
                return None
            with contextlib.nullcontext() if last else run.accelerator.no_sync(run.prepared):
                micro_loss = run.prepared(ids, targets) * share
                run.accelerator.backward(micro_loss)
            loss += micro_loss.detach()
        return loss
    micro_batch.tell_the_others(run, synchronising=last)
    return None


def dropout_seed(seed: int, iteration: int, rank: int) -> int:
    """Dropout's random stream is a function of these three, so that a resumed run has no random state to restore."""
    return int(np.random.SeedSequence([seed, iteration, rank]).generate_state(1, np.uint64)[0] >> 1)


def validate(run: Run) -> float | None:
    """Mean cross-entropy in nats per token over the whole validation set, the same tokens every time.

    None when a process was asked to stop in the middle of it.
    """
    while True:
        total, tokens, signalled, ran_out = summed_losses(run)
        run.stopping = signalled > 0
        if run.stopping or not ran_out:
            return None if run.stopping else total / tokens
        micro_batch.halve(run, validating=True)


@torch.no_grad()
def summed_losses(run: Run) -> list[float]:
    """Over all processes: the validation set's loss in nats, its targets, how many were signalled or out of memory."""
    run.prepared.eval()
    total, tokens, ran_out = torch.zeros((), dtype=torch.float64, device=run.device.torch), 0, True
    with until_memory_runs_out():
        for ids, targets in validation_batches(
            run.shards.val,
            run.recipe.batch.sequence_length,
            run.micro_batch,
            run.device.torch,
            rank=run.accelerator.process_index,
            num_processes=run.accelerator.num_processes,
        ):
            if run.signalled:
                break
            total += run.prepared(ids, targets)
            tokens += targets.numel()
        ran_out = False
    run.prepared.train()
    counts = torch.stack([total, *(total.new_tensor(value) for value in (tokens, run.signalled, ran_out))])
    return run.accelerator.reduce(counts, "sum").tolist()


def loop(run: Run) -> int:
    """Train to the end of the budget, or until a signal asks to stop; returns the exit code."""
    pace = Pace()
    begin(run)
    gc.collect()
    gc.freeze()  # what set-up made stays: collecting it again and again only stalls the device
    if run.iteration == 0:
        first_look(run, pace)
    elif validation_due(run):  # and not done: the session before was asked to stop in the middle of it
        measure(run, pace)
    while run.iteration < run.schedule.max_iters and not run.stopping:
        started = time.monotonic()
        loss, grad_norm, finite = train_step(run)
        pace.add(time.monotonic() - started)
        run.iteration += 1
        watch(run, loss, grad_norm, finite=finite)
        if run.history.skipped_in_a_row == finish.SKIPS_BEFORE_GIVING_UP:
            return finish.give_up(run, f"{finish.SKIPS_BEFORE_GIVING_UP} updates in a row were not finite")
        if run.iteration % run.recipe.logging.every == 0 or run.iteration == run.schedule.max_iters:
            log_step(run, loss, grad_norm, pace)
        if validation_due(run):
            measure(run, pace)
        keep_to_time(run, pace)
        if save_due(run) or run.stopping:
            save(run)
        log_saved(run, run.saver.outcome(wait=False))
    finish_saving(run)
    if run.stopping:
        return finish.interrupted(run)
    problem = finish.unfit(run)
    return finish.finish(run, pace) if problem is None else finish.give_up(run, problem)


def first_look(run: Run, pace: Pace) -> None:
    """Validate the untrained model and, where asked for, n-gram models: it proves the path and sets the scale."""
    measure(run, pace)
    if run.recipe.validation.ngram_baselines and run.accelerator.is_main_process:
        log_baselines(run)


def watch(run: Run, loss: float, grad_norm: float, *, finite: bool) -> None:
    """Add an iteration to the run's history, and tell what is unusual about it."""
    rise = run.history.add(loss, finite=finite)
    if not finite:
        log_skip(run, loss, grad_norm)
    if rise is not None:
        log_spike(run, loss, rise)


def validation_due(run: Run) -> bool:
    """Whether the model as it stands is one to validate, and was not yet."""
    last = run.history.last_val
    due = run.iteration % run.recipe.validation.every == 0 or run.iteration == run.schedule.max_iters
    return due and (last is None or last[0] < run.iteration)


def measure(run: Run, pace: Pace) -> None:
    """Validate, remember the loss, tell it and what it forecasts; nothing of these when a signal came first.

    A loss that is not finite is told, and is no validation: a budget does not end with it.
    """
    started = time.monotonic()
    loss = validate(run)  # read by the host, so that the clock waits for it
    if loss is None:
        return
    if not math.isfinite(loss):
        log_not_finite(run, loss)
        return
    run.history.validations.append((run.iteration, loss))
    log_validation(run, loss, time.monotonic() - started)
    look_ahead(run, pace)
    pace.add_validation(time.monotonic() - started)
