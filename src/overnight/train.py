"""One training step, validation, and the loop around them.

One step is read in four files: this one, batches.py, model.py, optim.py. Accelerate gives device, precision, processes,
gradient synchronisation and trackers; the global batch and the learning rate are functions of the iteration alone
(docs/design.md says why).
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import time

import numpy as np
import torch
from torch import nn

from overnight import checkpoint, micro_batch, optim
from overnight.baselines import ngram_losses, seen_tokens
from overnight.batches import validation_batches
from overnight.cli import EXIT_DIVERGED, EXIT_INTERRUPTED
from overnight.evaluation.milestone import Look
from overnight.export import export
from overnight.model import published
from overnight.progress import Pace, baseline_line, log_look, log_skip, log_step, log_validation, print_finished
from overnight.recipe import Recipe, decay_iters
from overnight.rundir import RunDirectory
from overnight.signals import ENDING, handled
from overnight.startup import Run, identity, launch, open_data, print_plan, set_up

SKIPS_BEFORE_GIVING_UP = 10


def train(recipe: Recipe, *, dry_run: bool = False) -> int:
    """Train what `recipe` says, from where its run directory stands; returns the exit code.

    0 done, or done before; 4 diverged; 75 interrupted and resumable. Raises `InputError` before anything is written
    when recipe, data and device do not fit.
    """
    accelerator, console = launch(recipe)
    if dry_run:
        print_plan(recipe, accelerator, console)
        return 0
    shards = open_data(recipe, accelerator, console)
    directory = RunDirectory(recipe)
    directory.refuse_another_run(identity(accelerator, shards))
    if directory.finished():
        print_finished(directory, console)
        return 0
    run = set_up(recipe, accelerator, console, directory, shards)
    try:
        return loop(run)
    finally:
        console.stop()
        accelerator.end_training()


def train_step(run: Run) -> tuple[float, float, bool]:
    """One update on exactly `tokens_per_iter` tokens: (loss in nats a token, gradient norm, was the weight updated)."""
    optim.set_lr(run.optimizers, optim.lr_at(run.iteration, run.recipe.schedule))
    loss = accumulate(run)
    while loss is None:  # out of memory: the same tokens again, fewer of them at once
        micro_batch.halve(run)
        loss = accumulate(run)
    grad_norm = nn.utils.clip_grad_norm_(run.model.parameters(), run.recipe.optim.grad_clip)
    flags = torch.stack([loss, grad_norm, loss.new_tensor(float(run.signalled))])
    loss_value, norm_value, signalled = run.accelerator.reduce(flags, "mean").tolist()  # the one synchronisation
    run.stopping = signalled > 0  # all processes agree, whichever got the signal
    finite = abs(loss_value) < float("inf") and norm_value < float("inf")  # both false for NaN
    if finite:
        for optimizer in run.optimizers:
            optimizer.step()
    run.model.zero_grad(set_to_none=True)
    return loss_value, norm_value, finite


def accumulate(run: Run) -> torch.Tensor | None:
    """The gradients of one iteration, left in the model, and its loss here; None when a process ran out of memory.

    The loss of a micro-batch is its sum over tokens times processes / tokens_per_iter: accumulating adds these up, DDP
    averages over processes, and what remains is the mean over every token of the iteration.
    """
    share = run.accelerator.num_processes / run.recipe.batch.tokens_per_iter
    torch.manual_seed(dropout_seed(run.recipe.seed, run.iteration, run.accelerator.process_index))
    loss, last = torch.zeros((), device=run.device.torch), False
    batches = run.batches.micro_batches(run.iteration, run.micro_batch, run.device.torch)
    try:
        for number, (ids, targets) in enumerate(batches, start=1):
            last = number == run.grad_accum
            if last and micro_batch.another_ran_out(run):
                return None
            with contextlib.nullcontext() if last else run.accelerator.no_sync(run.prepared):
                micro_loss = run.prepared(ids, targets) * share
                run.accelerator.backward(micro_loss)
            loss += micro_loss.detach()
    except torch.cuda.OutOfMemoryError:
        micro_batch.tell_the_others(run, synchronising=last)
        return None
    return loss


def dropout_seed(seed: int, iteration: int, rank: int) -> int:
    """Dropout's random stream is a function of these three, so that a resumed run has no random state to restore."""
    return int(np.random.SeedSequence([seed, iteration, rank]).generate_state(1, np.uint64)[0] >> 1)


@torch.no_grad()
def validate(run: Run) -> float:
    """Mean cross-entropy in nats per token over the whole validation set, the same tokens every time."""
    run.prepared.eval()
    total, tokens = torch.zeros((), dtype=torch.float64, device=run.device.torch), 0
    for ids, targets in validation_batches(
        run.shards.val,
        run.recipe.batch.sequence_length,
        run.micro_batch,
        run.device.torch,
        rank=run.accelerator.process_index,
        num_processes=run.accelerator.num_processes,
    ):
        total += run.prepared(ids, targets)
        tokens += targets.numel()
    run.prepared.train()
    counts = torch.stack([total, torch.tensor(float(tokens), dtype=torch.float64, device=run.device.torch)])
    total_loss, count = run.accelerator.reduce(counts, "sum").tolist()
    return total_loss / count


def loop(run: Run) -> int:
    """Train to the end, or until a signal asks to stop; returns the exit code."""
    schedule, pace, skips = run.recipe.schedule, Pace(), 0
    branch_point = schedule.max_iters - decay_iters(schedule)
    gc.collect()
    gc.freeze()  # what set-up made stays: collecting it again and again only stalls the device
    with stop_on_signal(run):
        if run.iteration == 0:
            first_look(run, pace)
        while run.iteration < schedule.max_iters and not run.stopping:
            started = time.monotonic()
            loss, grad_norm, finite = train_step(run)
            pace.add(time.monotonic() - started)
            run.iteration += 1
            skips = 0 if finite else skips + 1
            if not finite:
                log_skip(run, loss, grad_norm)
            if skips == SKIPS_BEFORE_GIVING_UP:
                return give_up(run)
            if run.iteration % run.recipe.logging.every == 0 or run.iteration == schedule.max_iters:
                log_step(run, loss, grad_norm, pace)
            if run.iteration % run.recipe.validation.every == 0 or run.iteration == schedule.max_iters:
                measure(run, pace)
            due = run.iteration % run.recipe.checkpoint.every == 0 or run.iteration in (
                branch_point,
                schedule.max_iters,
            )
            if due or run.stopping:
                save(run, branch_point)
        if run.iteration < schedule.max_iters:
            return interrupted(run)
        finish(run, pace)
    return 0


def stop_on_signal(run: Run) -> contextlib.AbstractContextManager[None]:
    """SIGTERM, SIGINT and SIGHUP let the iteration finish, and then save; a second signal ends the process at once."""

    def ask(number: int, frame: object) -> None:
        run.signalled = True
        for each in ENDING:
            signal.signal(each, signal.SIG_DFL)
        if run.accelerator.is_main_process:  # not through the console: it may be in the middle of a line of its own
            os.write(
                2, f"{signal.Signals(number).name}: finishing iteration {run.iteration + 1}, then saving\n".encode()
            )

    return handled(ask)


def first_look(run: Run, pace: Pace) -> None:
    """Validate the untrained model and, where asked for, n-gram models: it proves the path and sets the scale."""
    measure(run, pace)
    if run.recipe.validation.ngram_baselines and run.accelerator.is_main_process:
        losses = ngram_losses(seen_tokens(run.batches, run.recipe.schedule.max_iters), run.shards.val.read_all())
        run.directory.append("event", 0, event="ngram baselines", **losses)
        run.console.say(f"for scale, models of the same training tokens: {baseline_line(losses)} nats per token")


def measure(run: Run, pace: Pace) -> None:
    """Validate, remember the loss, and tell it."""
    started = time.monotonic()
    loss = validate(run)
    pace.validation_seconds = time.monotonic() - started
    run.best_val = loss if run.best_val is None else min(loss, run.best_val)
    run.last_val = {"val_loss": loss, "val_iteration": run.iteration}
    log_validation(run, loss, pace.validation_seconds)


def give_up(run: Run) -> int:
    """End a run that does not come back from non-finite updates; the last checkpoint stays."""
    saved = checkpoint.saved_iterations(run.directory.checkpoints)
    where = f"the last checkpoint is {list(saved.values())[-1]}" if saved else "there is no checkpoint yet"
    run.console.say(
        f"{SKIPS_BEFORE_GIVING_UP} updates in a row were not finite: the run has diverged; {where}."
        f" A lower `--optim.lr` (now {run.recipe.optim.lr:g}) under another `--name` is the usual cure"
    )
    if run.accelerator.is_main_process:
        run.directory.append("event", run.iteration, event="diverged")
    return EXIT_DIVERGED


def save(run: Run, branch_point: int) -> None:
    """Write a checkpoint on the main process; older ones go when it is whole."""
    joules = energy_used(run)
    if run.accelerator.is_main_process:
        state = {"best_val": run.best_val, "last_val": run.last_val, "joules": joules}
        started = time.monotonic()
        path = checkpoint.save(run.directory.checkpoints, run.iteration, run.model, run.optimizers, state)
        checkpoint.prune(run.directory.checkpoints, run.recipe.checkpoint.keep, {branch_point})
        run.console.say(f"saved {path} in {time.monotonic() - started:.1f}s")
    run.accelerator.wait_for_everyone()


def energy_used(run: Run) -> float | None:
    """Joules of the device over all sessions of the run, or None where it does not measure them."""
    session = run.device.joules()
    return None if session is None else session + (run.joules or 0.0)


def interrupted(run: Run) -> int:
    """Record that the run stopped early, and say how it goes on."""
    if run.accelerator.is_main_process:
        run.directory.append("event", run.iteration, event="interrupted")
    run.console.say(f"interrupted after iteration {run.iteration} and saved; the same command again goes on from there")
    return EXIT_INTERRUPTED


def finish(run: Run, pace: Pace) -> None:
    """Export the finished model, verified by a fresh process, and close with the results."""
    if run.accelerator.is_main_process:
        folder = run.directory.models / checkpoint.folder_name(run.iteration)
        probe = torch.from_numpy(run.shards.val.read(0, 0, 64).astype(np.int64))[None]
        run.console.say(f"exporting {folder} and loading it in a fresh process")
        export(published(run.model, run.recipe.model), run.tokenizer, folder, probe)
        if run.recipe.evaluation.at_milestones:
            run.device.release()
            log_look(run, Look(folder, run.recipe.evaluation.at_milestones))
        joules, seconds = energy_used(run), pace.per_iteration()
        run.directory.append(
            "event",
            run.iteration,
            event="finished",
            model=str(folder),
            val_loss=run.last_val["val_loss"],
            best_val_loss=run.best_val,
            tokens_per_second=run.recipe.batch.tokens_per_iter / seconds if seconds else None,
            kwh=None if joules is None else joules / 3.6e6,
        )
        print_finished(run.directory, run.console)
    run.accelerator.wait_for_everyone()
