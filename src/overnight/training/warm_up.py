"""The first micro-batches, before the first iteration: what the device can do with the recipe, and how fast."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from overnight.device.faults import until_memory_runs_out
from overnight.model.attention import AttentionReport, attention_report, kernel_of_device, refuse_another
from overnight.planning.model_size import logit_bytes, loss_chunk, padded_vocabulary
from overnight.training import micro_batch

if TYPE_CHECKING:
    from overnight.training.setup import Run


def device_facts(run: Run) -> tuple[dict[str, str], float]:
    """What was found out about the device, for the screen and for environment.json; the seconds of a micro-batch.

    Raises `InputError` where the device cannot run the recipe: if it can be known, before anything is compiled.
    """
    bf16 = run.accelerator.mixed_precision == "bf16"
    of_device = kernel_of_device(run.recipe, run.device.torch, torch.bfloat16 if bf16 else torch.float32)
    chosen = micro_batch.measure(run)
    kernel, seconds = check_attention(run, of_device)
    precision = "bf16 autocast" if bf16 else "float32"
    how = "compiled" if run.compiled else "eager"
    chunk = loss_chunk(run.accelerator.device.type, compiled=run.compiled)
    logits = min(chunk, run.micro_batch * run.recipe.batch.sequence_length)
    logits *= padded_vocabulary(run.recipe.model.vocab_size)
    facts = {
        "device": run.device.name,
        "precision": f"{precision}, {how}, {torch.get_num_threads()} threads",
        "micro-batch": chosen,
        "attention": kernel,
        "loss memory": f"{logits * logit_bytes(bf16=bf16, compiled=run.compiled) / 2**20:.0f} MiB of logits at once",
    }
    return facts, seconds


def check_attention(run: Run, of_device: AttentionReport) -> tuple[str, float]:
    """Run micro-batches as training will: which SDPA kernel was dispatched, and the seconds of one, once warm.

    Raises `InputError` when that is no fused kernel, or one with a mask, and the device by itself can do better.
    """
    while (found := first_steps(run)) is None:
        micro_batch.halve(run)
    report, seconds = found
    refuse_another(report, of_device)
    return str(report), seconds


def first_steps(run: Run) -> tuple[AttentionReport, float] | None:
    """What SDPA ran in a micro-batch, and the seconds of one; None when the memory of a process ran out.

    A size that was taken from an earlier session has not been tried in this one.
    """
    found = None
    with until_memory_runs_out():
        ids, targets = next(run.batches.micro_batches(0, run.micro_batch, run.device.torch))
        run.prepared.train()
        with run.accelerator.no_sync(run.prepared):  # no process waits for another here
            run.prepared(ids, targets).backward()  # compiles, if there is anything to compile
            report = attention_report(lambda: run.prepared(ids, targets))
            run.device.synchronize()
            started = time.monotonic()
            run.prepared(ids, targets).backward()
            run.device.synchronize()
        found = report, time.monotonic() - started
    run.model.zero_grad(set_to_none=True)
    return None if micro_batch.ran_out_anywhere(run, found is None) else found
