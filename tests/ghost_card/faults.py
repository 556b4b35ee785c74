"""Faults of the card, armed where a phase of a run begins: `arm("lost@validation:2")` is the second validation."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import torch
from operators import ghost


def take_memory() -> None:
    """Another process takes everything that is free; what torch has kept for itself goes back first."""
    torch.cuda.empty_cache()
    ghost().ghost_take_memory()


def run_out() -> None:
    """The next request for memory fails; torch asks again after it has given back what it kept."""
    torch.cuda.empty_cache()
    ghost().ghost_refuse_allocations(3)


FAULTS: dict[str, Callable[[], None]] = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "signalled": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "lost": lambda: ghost().ghost_lose_device(),
    "lost-at-launch": lambda: ghost().ghost_lose_device_at_launch(),
    "full": run_out,
    "taken": take_memory,
    "no-host-memory": lambda: ghost().ghost_refuse_host_memory(),
}

# Where each phase begins: a module, and a function in it or a class and its method.
PHASES = {
    "trial": ("overnight.training.micro_batch", "seconds_per_step"),
    "iteration": ("overnight.training.train", "accumulate"),
    "forward": ("overnight.model.gpt2", "LanguageModel.forward"),
    "backward": ("accelerate", "Accelerator.backward"),
    "optimizer": ("overnight.model.optim", "prepared"),
    "change": ("overnight.model.optim", "Muon._change"),
    "validation": ("overnight.training.validation", "validate"),
    "samples": ("overnight.model.generate", "Writer.after"),
    "checkpoint": ("overnight.model.checkpoint", "state_tensors"),
    "export": ("overnight.training.finish", "export"),
    "evaluation": ("overnight.evaluation.scoring", "Scorer.score"),
}


def arm(fault: str) -> None:
    """Wrap the beginning of a phase, so that the fault is there when it begins for the Nth time."""
    kind, _, when = fault.partition("@")
    phase, _, number = when.partition(":")
    module, name = PHASES[phase]
    owner: Any = importlib.import_module(module)
    *outer, last = name.split(".")
    for part in outer:
        owner = getattr(owner, part)
    begin, seen = getattr(owner, last), [0]

    def begins(*arguments, **options):
        seen[0] += 1
        if seen[0] == int(number or 1):
            print(f"ghost card: {kind} in {phase}", file=sys.stderr, flush=True)
            FAULTS[kind]()
        return begin(*arguments, **options)

    setattr(owner, last, begins)
