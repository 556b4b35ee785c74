"""The state of a training: all that the loop and its parts read and write."""

from __future__ import annotations

import itertools
import json
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase

from overnight.core.console import Console, estimated_end
from overnight.core.processes import Helper
from overnight.core.scripts import RECIPES
from overnight.data.batches import TrainingBatches
from overnight.data.shards import Shards
from overnight.data.tokenizer import load_tokenizer
from overnight.device.device import Device
from overnight.model.checkpoint import Saver
from overnight.model.gpt2 import LanguageModel
from overnight.planning.model_size import Derived
from overnight.recipe.schedule import decaying, towards
from overnight.recipe.schema import Recipe, Schedule
from overnight.run_dir.directory import RunDirectory

SPIKE_WINDOW = 64  # training losses that a new one is compared with
SPIKE_FEWEST = 16  # losses below which nothing is called a spike
SPIKE = 8.0  # standard deviations above the median, the deviation taken from the median of the distances to it
RISING = 3  # rises of the validation loss in a row that are worth a word
SPIKE_LEAST = 0.05  # nats; a smaller rise is never worth a word

QUICK_EVAL_SECONDS = 3600.0  # after which an evaluation at a milestone is stopped: it stands still, or is too long

COLD_ITERATIONS = 3  # compilation, allocator and caches: in no rate
RATE_WINDOW = 10  # iterations that a rate is compared over, so that one slow iteration says nothing
RATE_FALL = 0.3  # of the warm rate: a fall that is worth a word


@dataclass
class LossHistory:
    """The losses of a run so far. All of it is JSON, so that a resumed run sees what an undisturbed one would see."""

    losses: list[float] = field(default_factory=list)  # of the last SPIKE_WINDOW finite iterations, in nats per token
    validations: list[tuple[int, float]] = field(default_factory=list)  # (iteration, nats per token), all of them
    spiking: bool = False  # the last iteration was part of a spike
    skipped: int = 0  # updates left out because they were not finite
    skipped_in_a_row: int = 0

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> LossHistory:
        """What `as_json` gave."""
        return cls(**stored | {"validations": [(iteration, loss) for iteration, loss in stored["validations"]]})

    def as_json(self) -> dict[str, Any]:
        """Everything, for `state.json`."""
        return asdict(self)

    def add(self, loss: float, *, finite: bool) -> float | None:
        """Count an iteration; returns by how many nats it rose above the usual where a spike begins with it."""
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        self.skipped += not finite
        if not finite:
            return None
        rise = spike(self.losses, loss)
        begins, self.spiking = rise is not None and not self.spiking, rise is not None
        self.losses = [*self.losses[1 - SPIKE_WINDOW :], loss]
        return rise if begins else None

    @property
    def last_val(self) -> tuple[int, float] | None:
        """(iteration, nats per token) of the last validation."""
        return self.validations[-1] if self.validations else None

    def rising_since(self) -> int | None:
        """The iteration since which the validation loss has risen RISING times in a row, told once; otherwise None."""
        newest = self.validations[-RISING - 2 :]
        rises = [after > before for (_, before), (_, after) in itertools.pairwise(newest)]
        begins = len(rises) < RISING + 1 or not rises[0]
        return newest[-RISING - 1][0] if len(rises) >= RISING and all(rises[-RISING:]) and begins else None

    @property
    def best_val(self) -> float | None:
        """The lowest validation loss so far, nats per token."""
        return min((loss for _, loss in self.validations), default=None)


def spike(before: Sequence[float], loss: float) -> float | None:
    """The rise of `loss` above the median of the losses `before` it, in nats, where that is a spike; otherwise None.

    A spike is SPIKE robust standard deviations (1.4826 times the median absolute deviation) and SPIKE_LEAST nats.
    """
    if len(before) < SPIKE_FEWEST or not math.isfinite(loss):
        return None
    usual = statistics.median(before)
    deviation = 1.4826 * statistics.median(abs(each - usual) for each in before)
    rise = loss - usual
    return rise if rise > max(SPIKE * deviation, SPIKE_LEAST) else None


class Throughput:
    """Seconds of the iterations, without the cold ones at the start, and of the last validation."""

    def __init__(self, validation_seconds: float = 0.0) -> None:
        self.cold = COLD_ITERATIONS
        self.seconds = self.recent_seconds = self.all_validations = 0.0
        self.validation_seconds = validation_seconds  # of the last one with all that goes with it, an earlier one first
        self.iterations = self.recent_iterations = 0
        self.window: deque[float] = deque(maxlen=RATE_WINDOW)
        self.usual: float | None = None  # seconds of an iteration when the run had just become warm
        self.warned = False

    def add(self, seconds: float) -> None:
        """Count one iteration."""
        if self.cold:
            self.cold -= 1
            return
        self.seconds += seconds
        self.recent_seconds += seconds
        self.iterations += 1
        self.recent_iterations += 1
        self.window.append(seconds)
        if self.iterations == RATE_WINDOW:
            self.usual = statistics.median(self.window)

    def add_validation(self, seconds: float) -> None:
        """Count one validation, with samples and forecast."""
        self.validation_seconds = seconds
        self.all_validations += seconds

    def fell_by(self) -> float | None:
        """The share by which the rate has fallen below the warm one, told once, when it is 30 % or more."""
        if self.usual is None or self.warned:
            return None
        fall = 1 - self.usual / statistics.median(self.window)
        self.warned = fall >= RATE_FALL
        return fall if self.warned else None

    def per_iteration(self) -> float | None:
        """Mean seconds over all warm iterations; None before the first."""
        return self.seconds / self.iterations if self.iterations else None

    def since_last_line(self) -> float | None:
        """Mean seconds of the warm iterations since the last call; None when there was none."""
        mean = self.recent_seconds / self.recent_iterations if self.recent_iterations else None
        self.recent_seconds, self.recent_iterations = 0.0, 0
        return mean


class QuickEval:
    """`recipes/eval.py` on the model in `folder`, at low priority and on the CPU: no step waits for it.

    The device's memory is the training's, and so is its time.
    """

    def __init__(self, folder: Path, items: int):
        self.folder, self.items = folder, items
        self.out = folder.parents[1] / "evaluation" / f"{folder.name}-first-{items}"
        script = str(RECIPES / "eval.py")
        options = ["--against", "none", "--texts", "none", "--shards", "none", "--limit", str(items)]
        command = [script, str(folder), "--out", str(self.out), *options]
        self.helper = Helper(*command, environment={"CUDA_VISIBLE_DEVICES": ""})
        self.ends = time.monotonic() + QUICK_EVAL_SECONDS

    @property
    def over(self) -> bool:
        """Whether the process has ended, or its time has."""
        return self.helper.code is not None or time.monotonic() > self.ends

    def scores(self, enough: Callable[[], bool]) -> tuple[dict[str, float], str]:
        """At the end of the process, of its time, or when there is `enough` of waiting: the deciding metric of each
        task, and what went wrong, or an empty text."""
        if not self.helper.wait(self.ends - time.monotonic(), enough):
            self.helper.stop()
            return {}, "it was stopped"
        if self.helper.code:
            return {}, (self.helper.said().strip().splitlines() or ["no word"])[-1]
        [model] = json.loads((self.out / "results.json").read_text(encoding="utf-8"))["models"]
        return {task: found["metrics"][found["metric"]] for task, found in model["tasks"].items()}, ""


@dataclass(frozen=True)
class KeptLimit:
    """A time limit as `night.json` has it, for the session after an interruption."""

    asked: str  # as the user said it
    until: str  # in local time, ISO 8601
    seconds: float  # from the start of the process that began it
    budget: int | None = None  # iterations, once chosen


@dataclass
class TimeLimit:
    """A time limit in the session that it is in force in."""

    kept: KeptLimit
    ends: float  # on the clock since the machine was started, which no one sets and which runs while it sleeps
    export_seconds: float
    marks: list[tuple[float, int]] = field(default_factory=list)  # (seconds without validations, iteration), recent

    @property
    def target_iters(self) -> int | None:
        """The iterations that were chosen."""
        return self.kept.budget

    def left(self) -> float:
        """Seconds."""
        return self.ends - time.clock_gettime(time.CLOCK_BOOTTIME)

    def when(self) -> str:
        """`in 9h58m, on Tue 07:30`"""
        return estimated_end(self.left(), datetime.fromisoformat(self.kept.until))


@dataclass
class Run:
    """What the loop touches."""

    recipe: Recipe
    derived: Derived
    accelerator: Accelerator
    device: Device
    console: Console
    directory: RunDirectory
    shards: Shards
    batches: TrainingBatches
    prepared: nn.Module  # what accelerate made of the model: autocast and DDP happen in its forward
    model: LanguageModel
    compiled: bool  # the model's body, in training
    optimizers: list[torch.optim.Optimizer]
    micro_batch: int  # rows at once, now: it changes when memory runs out
    saver: Saver
    target_iters: int  # the milestone that is being trained to: the schedule in force ends with it
    targets: list[int] = field(default_factory=list)  # that this command finishes, ascending
    resumed_at: int = 0  # the iteration that this session began with
    iteration: int = 0  # updates done
    history: LossHistory = field(default_factory=LossHistory)
    throughput: Throughput = field(default_factory=Throughput)  # of this session on the way to this target
    time_limit: TimeLimit | None = None  # what the run was given to end in
    quick_evals: list[QuickEval] = field(default_factory=list)  # of finished models, underway
    joules: float | None = None  # of the sessions before this one, where the device measures energy
    seconds: float = 0.0  # that these took
    began: float = field(default_factory=time.monotonic)  # this one
    saved_at: float = field(default_factory=time.monotonic)  # when the last save began, or the session
    signalled: bool = False  # this process was asked to stop
    stopping: bool = False  # all processes know of it
    overdue: bool = False  # all processes know that `checkpoint.every_minutes` are over
    cannot_log: bool = False  # metrics.jsonl refuses records, which the user knows
    failed: set[str] = field(default_factory=set)  # of what only informs: reported, and left out since

    @property
    def schedule(self) -> Schedule:
        """The schedule in force: the recipe's, ending with the target."""
        return towards(self.recipe.schedule, self.target_iters)

    @property
    def decaying(self) -> bool:
        """Whether the last update was made at a learning rate on its way to zero."""
        return decaying(self.schedule, self.iteration)

    @property
    def grad_accum(self) -> int:
        """Gradient accumulation: micro-batches of one iteration on each process."""
        return self.derived.rows_per_process // self.micro_batch

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The one that lies beside the shards."""
        return load_tokenizer(str(self.shards.folder / "tokenizer"))

    def record(self, kind: str, **values: Any) -> dict[str, Any]:
        """Append a record of the present iteration to metrics.jsonl, and return it."""
        return self.record_at(self.iteration, kind, **values)

    def record_at(self, iteration: int, kind: str, **values: Any) -> dict[str, Any]:
        """Append a record of an iteration on the way to this target to metrics.jsonl, and return it."""
        return self.directory.append(kind, iteration, cooldown=self.cooldown_at(iteration), **values)

    def cooldown_at(self, iteration: int) -> int | None:
        """The milestone of the decay that an iteration belongs to; None on the trunk."""
        return self.target_iters if decaying(self.schedule, iteration) else None
