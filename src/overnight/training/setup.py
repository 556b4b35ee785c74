"""Everything before the first step: the data, the model on its device, what the device can do, the directory."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from overnight.core.console import Console, estimated_end
from overnight.core.files import disk_full_error
from overnight.core.published import redacted, yaml_text
from overnight.data.batches import TrainingBatches
from overnight.data.manifest import Manifest, is_prepared, require_same_request, with_prepared_data
from overnight.data.shards import Shards, open_shards
from overnight.device.device import Device, allow_tf32
from overnight.device.faults import until_memory_runs_out
from overnight.device.launch import on_main
from overnight.doctor.machine import environment
from overnight.errors import InputError, first_line
from overnight.model import optim
from overnight.model.attention import AttentionReport, attention_report, kernel_of_device, refuse_another
from overnight.model.checkpoint import Saver
from overnight.model.gpt2 import LanguageModel
from overnight.planning.model_size import (
    LOSS_CHUNK,
    derive,
    derived_rows,
    logit_bytes,
    padded_vocabulary,
)
from overnight.planning.scaling_law import MANY_EPOCHS, REPEATED
from overnight.prepare.cost import require_data, require_same_text
from overnight.recipe.schedule import iterations_left
from overnight.recipe.schema import Recipe
from overnight.run_dir.directory import RunDirectory
from overnight.run_dir.layout import iteration_of
from overnight.training import micro_batch
from overnight.training.log import begin_tracking
from overnight.training.state import Run, Throughput, TimeLimit


def print_plan(recipe: Recipe, accelerator: Accelerator, console: Console) -> None:
    """`--dry-run`: everything that follows from the recipe, and then all of it; nothing is built or written."""
    recipe, unique_tokens = with_prepared_data(recipe)
    derived = derive(recipe, accelerator.device.type, accelerator.num_processes, unique_tokens)
    console.table("derived", derived_rows(recipe, derived))
    console.log("\n" + yaml_text(redacted(recipe.model_dump())))


def open_data(recipe: Recipe, accelerator: Accelerator, console: Console) -> Shards:
    """The verified shards of the recipe; text that lies here is prepared on the way, any other must have been."""
    folder = Path(recipe.data.dir)
    on_main(accelerator, lambda: prepare_local(recipe, console))
    manifest = require_same_request(folder, recipe.data, recipe.model.vocab_size)  # each process may have another disk
    on_main(accelerator, lambda: compare_text(recipe, manifest, console))
    shards = open_shards(folder, verify=accelerator.is_local_main_process, manifest=manifest)
    if not any(file.tokens > 1 for file in shards.val.files):
        raise InputError(f"`data.dir`: the validation set in {folder} has no token after another: prepare more of it")
    return shards


def prepare_local(recipe: Recipe, console: Console) -> None:
    """Make the shards where they are not made yet; only then are the packages needed that do it."""
    require_data(recipe)
    if is_prepared(Path(recipe.data.dir)):
        return
    from overnight.prepare.prepare import prepare

    prepare(recipe.data, recipe.model.vocab_size, report=console.log)


def compare_text(recipe: Recipe, manifest: Manifest, console: Console) -> None:
    """Refuse a new run on shards whose text has changed since; one that has begun says so, and continues with them."""
    folder = Path(recipe.data.dir)
    try:
        require_same_text(recipe.data, manifest.inputs)
    except (InputError, OSError) as error:
        if not RunDirectory(recipe).resumable(recipe.schedule):
            raise
        console.log(f"{first_line(error)}; this run continues with {folder} as it is")


def found_identity(accelerator: Accelerator, shards: Shards) -> dict[str, str]:
    """What decides a run beside its recipe: another of these, and it is another run."""
    return {"data fingerprint": shards.manifest.fingerprint, "precision": accelerator.mixed_precision}


def set_up(
    recipe: Recipe,
    accelerator: Accelerator,
    console: Console,
    directory: RunDirectory,
    shards: Shards,
    targets: list[int],
    time_limit: TimeLimit | None = None,
) -> Run:
    """Model, optimizers and data on the device, the facts on the screen, and the run directory ours."""
    run = assemble(recipe, accelerator, console, directory, shards)
    run.targets, run.target_iters, run.time_limit = targets, targets[0], time_limit
    if validations := directory.records("val"):
        run.throughput = Throughput(validations[-1].get("seconds", 0.0))
    console.table(f"{directory.path} on {run.device.name}", derived_rows(recipe, run.derived))
    if (run.derived.epochs or 0) >= MANY_EPOCHS:
        console.log(f"WARNING: {run.derived.epochs:.1f} epochs: {REPEATED}")
    facts, seconds = device_facts(run)
    end = estimated_end(seconds_left(run, seconds))
    facts |= {
        "data": f"{shards.folder}, {shards.train.tokens:,} training + {shards.val.tokens:,} validation tokens",
        **text_facts(shards.manifest),
        "free disk": f"{free_gib(Path()):.0f} GiB",
        "estimated end": (
            time_limit.when() if time_limit else f"{end}, from the time of one micro-batch; the lines below measure it"
        ),
    }
    console.table("this machine", list(facts.items()))
    on_main(accelerator, lambda: claim(run, facts))
    if recipe.logging.trackers:
        begin_tracking(run)
    return run


def seconds_left(run: Run, micro_batch_seconds: float) -> float:
    """Of all that this command has to do. A validation that was not measured takes a third of training: no backward."""
    saved = run.directory.resumable(run.schedule)
    left = iterations_left(run.recipe.schedule, iteration_of(saved[0]) if saved else 0, run.targets)
    rows = run.shards.val.tokens / run.recipe.batch.sequence_length / run.accelerator.num_processes
    validation = run.throughput.validation_seconds or micro_batch_seconds * rows / run.micro_batch / 3
    return left * (micro_batch_seconds * run.grad_accum + validation / run.recipe.validation.every)


def claim(run: Run, facts: dict[str, str]) -> None:
    """Make the run directory ours, and write what runs here and on what."""
    found = {
        **environment(),
        **facts,
        "unique_tokens": run.shards.train.tokens,
        "validation_tokens": run.shards.val.tokens,
        "parameters": run.derived.parameters,
        "measured": micro_batch.measured(run),
    }
    with disk_full_error(run.directory.path, "name"):
        run.directory.claim(found_identity(run.accelerator, run.shards), found)


def text_facts(manifest: Manifest) -> dict[str, str]:
    """The text behind the tokens: how much of it, and what identifies it."""
    if manifest.split.leakage == "not checked":
        return {"text": "token files that were adopted; whether a text stands on both sides was not checked"}
    documents = sum(record.documents for record in manifest.inputs)
    files = Path(manifest.inputs[0].name).name if len(manifest.inputs) == 1 else f"{len(manifest.inputs)} files"
    return {"text": f"{documents:,} documents of {files}", "text SHA-256": manifest.text_sha256}


def assemble(
    recipe: Recipe, accelerator: Accelerator, console: Console, directory: RunDirectory, shards: Shards
) -> Run:
    """Model, optimizers and data on the device, as they are before the first iteration; nothing is written."""
    device = Device(accelerator.device)
    derived = derive(recipe, accelerator.device.type, accelerator.num_processes, shards.train.tokens)
    batches = TrainingBatches(
        shards.train, recipe.batch, recipe.seed, rank=accelerator.process_index, num_processes=accelerator.num_processes
    )
    if device.cuda:
        allow_tf32()
    set_seed(recipe.seed)
    compiled = device.cuda if recipe.compile == "auto" else recipe.compile
    model = LanguageModel(recipe.model, shards.manifest.eos_id, compile=compiled)
    return Run(
        recipe=recipe,
        derived=derived,
        accelerator=accelerator,
        device=device,
        console=console,
        directory=directory,
        shards=shards,
        batches=batches,
        prepared=accelerator.prepare(model),
        model=model,
        compiled=compiled,
        optimizers=optim.build(model, recipe.optim),
        micro_batch=derived.first_micro_batch,
        saver=Saver(recipe.checkpoint.keep),
        target_iters=recipe.schedule.max_iters,
    )


def free_gib(path: Path) -> float:
    """Free space of the file system of `path`, in GiB."""
    stats = os.statvfs(path)
    return stats.f_bavail * stats.f_frsize / 2**30


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
    chunk = LOSS_CHUNK[run.device.torch.type, run.compiled]
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
