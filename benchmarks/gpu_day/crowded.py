"""A training run on a card that another program fills: all the time, in one iteration, or in one validation.

python benchmarks/gpu_day/crowded.py RECIPE [--leave GIB] [--in-iteration N] [--in-validation N] [--key VALUE ...]

With --leave the run sees a card of that size. In the iteration or validation that is named (the N-th of the session)
the card has less left than that needs, and the trainer has to continue with fewer rows. A CPU's memory is not filled:
there the first forward says that it ran out.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from overnight.cli import recipe_command
from overnight.recipe.schema import Recipe
from overnight.training import train as trainer
from overnight.training import validation
from overnight.training.state import Run

HOLD = Path(__file__).with_name("hold.py")
SHARE = 0.7  # of what an iteration or validation needs: all of its rows do not fit, half of them do


@contextmanager
def another_program(leave_gib: float) -> Iterator[None]:
    """A process that holds the card's memory but `leave_gib`."""
    command = [sys.executable, str(HOLD), "--leave", str(leave_gib)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        print(process.stdout.readline() or "another program could not take the memory", end="", flush=True)
        yield  # then its standard input ends


@contextmanager
def out_of_memory_once(run: Run) -> Iterator[None]:
    """The next forward says that memory ran out."""
    forward = run.prepared.forward

    def fail(*given: Any) -> None:
        run.prepared.forward = forward
        raise torch.cuda.OutOfMemoryError("as if it had run out")

    run.prepared.forward = fail
    yield
    run.prepared.forward = forward


class Disturbed:
    """A phase of the trainer, `train_step` or `validate`, in whose N-th call memory is short."""

    def __init__(self, phase: Callable[..., Any], number: int | None):
        self.phase, self.number = phase, number
        self.calls, self.needed = 0, 0  # bytes beyond what stays, in the last call

    def __call__(self, run: Run, *given: Any) -> Any:
        self.calls += 1
        if self.calls != self.number:
            return self.measured(run, *given)
        if not run.device.cuda:
            with out_of_memory_once(run):
                return self.phase(run, *given)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        with another_program(SHARE * self.needed / 2**30):
            return self.phase(run, *given)

    def measured(self, run: Run, *given: Any) -> Any:
        """An undisturbed call, and what it needed."""
        if run.device.cuda:
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = self.phase(run, *given)
        self.needed = torch.cuda.max_memory_allocated() - before
        return result


def run(recipe: Recipe, chosen: argparse.Namespace) -> int:
    """Train under the disturbances that were asked for."""
    trainer.train_step = Disturbed(trainer.train_step, chosen.in_iteration)
    validation.validate = Disturbed(validation.validate, chosen.in_validation)
    small = chosen.leave is not None and torch.cuda.is_available()
    with another_program(chosen.leave) if small else nullcontext():
        return trainer.train(recipe)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--leave", type=float, metavar="GIB", help="free memory of the card for the whole run")
    parser.add_argument("--in-iteration", type=int, metavar="N", help="fill the card in the N-th iteration")
    parser.add_argument("--in-validation", type=int, metavar="N", help="fill the card in the N-th validation")


if __name__ == "__main__":
    sys.exit(recipe_command(__doc__ or "", run, options=add_options))
