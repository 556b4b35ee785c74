"""Where the tasks of a preparation run: on the cores of this machine, on a Slurm or on a Ray cluster.

These are datatrove's executors; options for them go through as they are. Its marks of completed tasks carry
no identity of the input, so they are not used: a task is done when its staged file is there.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import multiprocess
from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.executor.base import PipelineExecutor
from datatrove.pipeline.base import PipelineStep
from loguru import logger

from overnight.core.files import atomic_write
from overnight.core.lock import kernel_lock
from overnight.core.processes import die_with_parent
from overnight.errors import DamagedData, InputError, Unreachable


class Task(PipelineStep):
    """A function of a job and of a task's number, as datatrove runs it."""

    type, name = "WRITER", "token shards"

    def __init__(self, function: Callable[[Any, int], object], job: Any):
        super().__init__()
        self.function, self.job = function, job

    def run(self, data: object = None, rank: int = 0, world_size: int = 1) -> None:
        """Call it for task number `rank`."""
        self.function(self.job, rank)


class Silent(LocalPipelineExecutor):
    """Tasks log into files; what the first worker's say, datatrove would print on the terminal as well."""

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1):
        try:
            return super()._run_for_rank(rank, local_rank + 1, node_rank)
        finally:
            logger.remove()  # which ending the task's log has added again


def run_local(task: Task, tasks: int, workers: int, logs: Path, options: dict) -> None:
    """Run the tasks on the cores of this machine, `workers` at once, each in a process that is single-threaded."""
    logger.remove()
    os.register_at_fork(after_in_child=die_with_parent)  # datatrove's manager would outlive a killed command
    preloaded = [__name__, "overnight.prepare.tokenize_files"]  # once for all workers
    multiprocess.get_context("forkserver").set_forkserver_preload(preloaded)
    os.environ["RAYON_NUM_THREADS"] = "1"  # of both tokenizers, in the workers: this process tokenises nothing
    try:
        _made(Silent, task, tasks=tasks, workers=workers, logging_dir=str(logs), **options).run()
    finally:
        del os.environ["RAYON_NUM_THREADS"]


def run_ray(task: Task, tasks: int, workers: int, logs: Path, options: dict) -> None:
    """Run the tasks on a Ray cluster whose nodes share the folder, and wait for them."""
    try:
        import ray
    except ImportError:
        raise InputError("`--executor ray` needs Ray: pip install ray") from None
    ray.init(ignore_reinit_error=True)
    _made(RayPipelineExecutor, task, tasks=tasks, workers=workers, logging_dir=str(logs), **options).run()


def submit_slurm(task: Task, tasks: int, finish: Task, logs: Path, options: dict) -> str:
    """Hand the tasks to Slurm, and behind them the one that puts their output together; returns that job's id."""
    first = _made(SlurmPipelineExecutor, task, tasks=tasks, logging_dir=str(logs / "stage"), **options)
    alone = {name: value for name, value in options.items() if name != "workers"}
    last = _made(SlurmPipelineExecutor, finish, tasks=1, depends=first, logging_dir=str(logs / "finish"), **alone)
    last.run()
    return str(last.job_id)


def leave(path: Path, error: InputError) -> None:
    """Write down the problem that ends a task, for `raise_left`."""
    path.parent.mkdir(exist_ok=True)
    atomic_write(path, json.dumps([type(error).__name__, error.problems]))


def raise_left(folder: Path) -> None:
    """Raise the problems that tasks left there, as one error of the gravest kind."""
    left = [json.loads(path.read_bytes()) for path in sorted(folder.glob("*.json"))]
    kinds = {kind.__name__: kind for kind in (Unreachable, InputError, DamagedData)}
    if left:
        gravest = max((kind for kind, _ in left), key=list(kinds).index)
        raise kinds[gravest]([problem for _, problems in left for problem in problems])


@contextmanager
def bound_to_parent(folder: Path, rank: int) -> Iterator[None]:
    """In a worker process: die with the one that started it, leave Ctrl-C to it, and hold the lock of this task."""
    if multiprocess.parent_process() is not None:
        die_with_parent()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    (folder / "workers").mkdir(exist_ok=True)
    with kernel_lock(folder / "workers" / f"{rank:05}"):
        yield


def _made(kind: type[PipelineExecutor], task: Task, **options: Any) -> PipelineExecutor:
    try:
        return kind([task], **({"skip_completed": False} | options))
    except TypeError as error:  # an option that the executor does not have, or one that it needs
        raise InputError(f"`--executor-options`: {kind.__name__} says: {error}") from error
