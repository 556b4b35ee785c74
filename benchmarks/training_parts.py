"""What training_step.py says beside its comparison: the limit of the matrix products, and where our time goes."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from training_sides import VOCABULARY, OurStep, model_shape, now, shape_of  # the script beside this one

Figures = dict[str, float]


def muon(args: argparse.Namespace) -> Figures:
    """Seconds of an update with Muon, once its state is there."""
    step = OurStep(args, "muon")
    step()
    step.gradients()
    before = now(args.device == "cuda")
    step.update()
    cpu, wall = (then - first for first, then in zip(before, now(args.device == "cuda"), strict=True))
    return {"update_cpu_seconds": cpu, "update_seconds": wall}


def gemm(args: argparse.Namespace) -> Figures:
    """CPU-seconds that this machine's GEMM needs for the matrix products of one step, attention's own left out.

    Each weight takes part in three products: forward, and the gradients of its input and of itself.
    """
    rows, length = shape_of(args.shape[0])
    n, width = rows * length, args.width
    block = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
    weights = [(side, args.layers) for side in block] + [((width, VOCABULARY // 64 * 64 + 64), 1)]
    total = flops = 0.0
    for (fan_in, fan_out), count in weights:
        x, w, y = torch.randn(n, fan_in), torch.randn(fan_in, fan_out), torch.randn(n, fan_out)
        out_x, out_w = torch.empty_like(x), torch.empty_like(w)
        if fan_out > 50_000:  # the head's weight lies the other way round
            w, out_w = torch.randn(fan_out, fan_in).T, torch.empty(fan_out, fan_in).T
        products = [(x, w, torch.empty_like(y)), (y, w.T, out_x), (x.T, y, out_w)]
        for left, right, out in products:
            torch.mm(left, right, out=out)
            seconds = []
            for _ in range(5):
                started = time.process_time()
                torch.mm(left, right, out=out)
                seconds.append(time.process_time() - started)
            total += min(seconds) * count
            flops += 2 * n * fan_in * fan_out * count
    return {"cpu_seconds": total, "gflop": flops / 1e9}


GROUPS = {  # the first whose words occur in an operator's name
    "attention": ("scaled_dot_product",),
    "GEMM": ("aten::mm", "aten::addmm"),
    "softmax and loss": ("softmax", "aten::max", "scatter", "gather", "aten::log", "aten::sum", "fill_"),
    "AdamW": ("adam",),
    "gelu": ("gelu",),
    "layer norm": ("layer_norm",),
    "embedding": ("embedding",),
    "clipping": ("norm", "foreach"),
    "copies, additions": ("copy", "add", "mul", "cat", "zero"),
}


def profile(args: argparse.Namespace) -> Figures:
    """Share of each group of operators in the CPU time of one step of ours."""
    step = OurStep(args, "adamw")
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step()
    spent: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        group = next((name for name, words in GROUPS.items() if any(w in event.key for w in words)), "the rest")
        spent[group] += event.self_cpu_time_total
    return {name: time / sum(spent.values()) for name, time in sorted(spent.items(), key=lambda item: -item[1])}


def iteration(args: argparse.Namespace) -> Figures:
    """One whole iteration of the product with Muon, four micro-batches, and the share of each part of it."""
    from overnight.device.launch import launch
    from overnight.recipe.schema import Batch, Recipe, Schedule
    from overnight.run_dir.directory import RunDirectory
    from overnight.training.probe import random_shards
    from overnight.training.setup import assemble
    from overnight.training.train import train_step

    rows, length = shape_of(args.shape[0])
    recipe = Recipe(
        model=model_shape(args),
        batch=Batch(tokens_per_iter=4 * rows * length, sequence_length=length, micro_batch=rows),
        schedule=Schedule(max_iters=100, warmup_iters=10),
        threads=args.threads,
    )
    spent: dict[str, float] = defaultdict(float)

    def timed(part: str, function: Callable) -> Callable:
        def call(*given, **named):
            started = time.monotonic()
            result = function(*given, **named)
            spent[part] += time.monotonic() - started
            return result

        return call

    with tempfile.TemporaryDirectory() as folder:
        accelerator, console = launch(recipe)
        shards = random_shards(Path(folder), recipe)
        run = assemble(recipe, accelerator, console, RunDirectory(recipe, Path(folder)), shards)
        run.model.forward = timed("forward", run.model.forward)  # type: ignore[method-assign]
        accelerator.backward = timed("backward", accelerator.backward)  # type: ignore[method-assign]
        for optimizer in run.optimizers:
            optimizer.step = timed("optimizer", optimizer.step)  # type: ignore[method-assign]
        train_step(run)
        spent.clear()
        started = time.monotonic()
        for _ in range(args.steps):
            train_step(run)
        total = time.monotonic() - started
    return {"seconds": total / args.steps} | {part: seconds / total for part, seconds in spent.items()}


PARTS: dict[str, Callable[[argparse.Namespace], Figures]] = {
    each.__name__: each for each in (muon, gemm, profile, iteration)
}
