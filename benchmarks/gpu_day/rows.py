"""Iterations of a recipe with 8, 16, 32 and 64 rows at once: peak memory, seconds, compilations and graph breaks.

One process trains random tokens through the trainer's own step, and changes the micro-batch between; every size begins
with the card's memory given back.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters

from overnight.cli import recipe_command
from overnight.core.files import atomic_write
from overnight.device.device import GIB
from overnight.device.launch import launch
from overnight.recipe.schema import Recipe
from overnight.training.probe import probe_run
from overnight.training.state import Run
from overnight.training.train import train_step

ITERATIONS = 4  # of each size; the first compiles


def measured(run: Run, rows: int) -> dict[str, Any]:
    """What iterations with so many rows at once take; the trainer takes fewer where these do not fit."""
    counters.clear()
    run.device.release()
    run.micro_batch = rows
    seconds = [seconds_of_iteration(run) for _ in range(ITERATIONS)]
    tokens = run.recipe.batch.tokens_per_iter
    return {
        "rows": rows,
        "fits": run.micro_batch == rows,
        "first_seconds": seconds[0],
        "tokens_per_second": tokens / statistics.median(seconds[1:]),
        "peak_gib": run.device.used_gib(),
        "beside_gib": beside_gib(run),
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(counters["graph_break"].values()),
    }


def seconds_of_iteration(run: Run) -> float:
    started = time.monotonic()
    train_step(run)
    run.device.synchronize()
    run.iteration += 1
    return time.monotonic() - started


def beside_gib(run: Run) -> float | None:
    """Memory of the card that the allocator does not hold: context, kernels, other programs; None on a CPU."""
    if not run.device.cuda:
        return None
    free, total = torch.cuda.mem_get_info()
    return (total - free - torch.cuda.memory_reserved()) / GIB


def run(recipe: Recipe, chosen: argparse.Namespace) -> int:
    """Measure every size and write each as soon as it is known."""
    sizes = [int(size) for size in chosen.rows.split(",")]
    tokens = 2 * max(sizes) * recipe.batch.sequence_length
    batch = recipe.batch.model_copy(update={"tokens_per_iter": tokens, "micro_batch": max(sizes)})
    accelerator, console = launch(recipe)
    found: list[dict[str, Any]] = []
    with probe_run(recipe.model_copy(update={"batch": batch}), accelerator, console) as trained:
        for rows in sizes:
            found.append(measured(trained, rows))
            console.log(str(found[-1]))
            atomic_write(chosen.json, json.dumps(found, indent=1))
    return 0


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", default="8,16,32,64", metavar="N,N", help="micro-batches, ascending")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")


if __name__ == "__main__":
    sys.exit(recipe_command(__doc__ or "", run, options=add_options))
