"""Validation on the way: the loss of the whole validation set, samples, what they forecast, and whether to end."""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from overnight.data.batches import validation_batches
from overnight.device.faults import until_memory_runs_out
from overnight.model.generate import Writer
from overnight.model.gpt2 import published
from overnight.training import micro_batch
from overnight.training.log import informs, log_not_finite, log_validation
from overnight.training.state import Run
from overnight.training.stopping import target_of_flat_curve


def validation_due(run: Run) -> bool:
    """Whether the model as it stands is one to validate, and was not yet."""
    last = run.history.last_val
    due = run.iteration % run.recipe.validation.every == 0 or run.iteration == run.target_iters
    return due and (last is None or last[0] < run.iteration)


def validation_step(run: Run) -> int | None:
    """Validate, remember the loss, tell it and what it forecasts; nothing of these when a signal came first.

    Returns the target to end with where the curve is flat and the recipe wants that, otherwise None. A loss that is not
    finite is told, and is no validation: a run does not end with it.
    """
    started = time.monotonic()
    loss = validate(run)  # read by the host, so that the clock waits for it
    if loss is None:
        return None
    if not math.isfinite(loss):
        log_not_finite(run, loss)
        return None
    run.history.validations.append((run.iteration, loss))
    seconds = time.monotonic() - started
    texts = samples(run) if run.accelerator.is_main_process else None
    log_validation(run, loss, texts or [], seconds)
    target = target_of_flat_curve(run)
    run.throughput.add_validation(time.monotonic() - started)
    return target


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


@informs("samples")
def samples(run: Run) -> list[str]:
    """What the model as it stands writes after each of the recipe's prompts."""
    validation = run.recipe.validation
    writer = Writer(published(run.model, run.recipe.model), run.tokenizer)
    how: dict[str, Any] = {"tokens": validation.sample_tokens, "temperature": 0.8, "top_k": 50, "seed": run.recipe.seed}
    return [writer.after(prompt, **how) for prompt in validation.prompts]
