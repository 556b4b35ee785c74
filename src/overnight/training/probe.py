"""A few real iterations on the device at hand, on random tokens: what it reaches before any data is prepared."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from accelerate import Accelerator

from overnight.core.console import Console, count, duration
from overnight.data.batches import Split
from overnight.data.manifest import Manifest, dtype_for
from overnight.data.shards import Shards, SplitWriter
from overnight.device.launch import launch
from overnight.doctor.machine import environment
from overnight.model import optim
from overnight.planning.model_size import derive
from overnight.recipe.schedule import lr_at
from overnight.recipe.schema import Recipe
from overnight.run_dir.directory import RunDirectory
from overnight.training.micro_batch import formula_gib
from overnight.training.setup import assemble, device_facts
from overnight.training.state import Run
from overnight.training.train import train_step

ITERATIONS = 20


@dataclass(frozen=True)
class Probe:
    """What a device was measured to reach with a recipe."""

    device: str
    attention: str  # the kernel that SDPA dispatched, and whether it was given a mask
    precision: str
    micro_batch: int  # rows at once
    tokens_per_iter: int
    iterations: int  # the cold ones at the start included, which are in no rate
    tokens_per_second: float
    mfu: float | None  # None where the device's peak is not known
    peak_gib: float  # on CUDA what PyTorch's allocator held
    formula_gib: float | None  # what the plan says of this micro-batch on a CUDA device, the context included
    hours: float  # of the whole recipe at this rate, validations left out
    watts: float | None

    def report(self) -> list[tuple[str, str]]:
        """The figures as (what, value)."""
        mfu = "unknown, no peak of this device in facts/gpus.csv" if self.mfu is None else f"{self.mfu:.1%}"
        formula = (
            ""
            if self.formula_gib is None
            else f" by the allocator; {self.formula_gib:.1f} by the formula, all included"
        )
        return [
            ("device", self.device),
            ("precision", self.precision),
            ("attention", self.attention),
            ("micro-batch", f"{self.micro_batch} rows"),
            ("tokens a second", f"{count(self.tokens_per_second)} over the warm of {self.iterations} iterations"),
            ("MFU", mfu),
            ("peak memory", f"{self.peak_gib:.1f} GiB{formula}"),
            ("power", "not measured" if self.watts is None else f"{self.watts:.0f} W at the end"),
            ("the recipe at this rate", f"{duration(self.hours * 3600)}, validations left out"),
        ]


def probe(recipe: Recipe, iterations: int = ITERATIONS) -> dict:
    """Train `iterations` iterations and print what they reached; returns the same as a dict, for JSON.

    On a CPU an iteration is one micro-batch of each process, or the 40M recipe's would take hours. Nothing
    is left behind. Raises `InputError` as the trainer does where recipe and device do not fit.
    """
    accelerator, console = launch(recipe)
    with probe_run(recipe, accelerator, console) as run:
        facts, seconds = device_facts(run)
        console.table("this machine", list(facts.items()))
        tokens = f"{run.recipe.batch.tokens_per_iter:,} random tokens"
        console.log(f"{iterations} iterations of {tokens}, {duration(seconds * run.grad_accum * iterations)}")
        for _ in range(iterations):
            started = time.monotonic()
            optim.set_lr(run.optimizers, lr_at(run.iteration, run.schedule))
            train_step(run)
            run.throughput.add(time.monotonic() - started)
            run.iteration += 1
            console.progress(run.iteration, iterations)
        console.stop()
        measured = probed(run, facts, recipe)
    console.table("probe", measured.report())
    return asdict(measured) | {"environment": environment()}


def probed(run: Run, facts: dict[str, str], recipe: Recipe) -> Probe:
    """The figures of a run that has just been timed; `recipe` is the whole one."""
    seconds, batch = run.throughput.per_iteration(), run.recipe.batch
    assert seconds is not None, "fewer iterations than are thrown away as cold"
    rate = batch.tokens_per_iter / seconds
    return Probe(
        device=run.device.name,
        attention=facts["attention"],
        precision=facts["precision"],
        micro_batch=run.micro_batch,
        tokens_per_iter=batch.tokens_per_iter,
        iterations=run.iteration,
        tokens_per_second=rate,
        mfu=run.derived.mfu(rate, run.device.peak_flops),
        peak_gib=run.device.used_gib(),
        formula_gib=formula_gib(run, run.micro_batch) if run.device.cuda else None,
        hours=recipe.schedule.max_iters * recipe.batch.tokens_per_iter / rate / 3600,
        watts=run.device.power.watts(),
    )


@contextmanager
def probe_run(recipe: Recipe, accelerator: Accelerator, console: Console) -> Iterator[Run]:
    """A run of `recipe` on random tokens in a folder that goes away; on a CPU its iterations are one micro-batch."""
    if accelerator.device.type == "cpu":
        derived = derive(recipe, "cpu", accelerator.num_processes, None)
        tokens = derived.first_micro_batch * recipe.batch.sequence_length * accelerator.num_processes
        recipe = recipe.model_copy(update={"batch": recipe.batch.model_copy(update={"tokens_per_iter": tokens})})
    with tempfile.TemporaryDirectory(prefix="overnight-probe-") as folder:
        data = random_shards(Path(folder), recipe)
        yield assemble(recipe, accelerator, console, RunDirectory(recipe, Path(folder)), data)


def random_shards(folder: Path, recipe: Recipe) -> Shards:
    """One iteration's worth of uniformly random tokens, training and validation alike, as shards in `folder`."""
    size, tokens = recipe.model.vocab_size, recipe.batch.tokens_per_iter + 1
    writer = SplitWriter(folder / "train", size, None)
    writer.write(np.random.default_rng(0).integers(0, size, tokens).tolist())
    writer.close()
    dtype = dtype_for(size)
    manifest = Manifest.model_construct(eos_id=size - 1, vocab_size=size, dtype=dtype, train=writer.records)
    split = Split(folder, writer.records, dtype)
    return Shards(folder, manifest, train=split, val=split)
