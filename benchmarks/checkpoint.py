"""Times a checkpoint of ours against `accelerator.save_state` on the same disk, alternating in one process.

Both save a GPT-2 of the night's shape with Muon and AdamW between two iterations. Ours copies, and continues while a
thread writes, checksums, syncs, and reads it all again; save_state writes, without a sync, before it returns.

stall       seconds for which the next iteration could not begin
beside      seconds that the next iteration took longer than one without a save: here it computes on the cores that the
            writer needs for checksums, with a GPU it would not
total       seconds until the checkpoint is there
"""

from __future__ import annotations

import argparse
import logging
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator

from overnight.doctor.machine import filesystem_of
from overnight.model import checkpoint, optim
from overnight.model.gpt2 import LanguageModel
from overnight.recipe.schema import Model, Optim

SIDES = ("ours", "save_state")
KEYS = ("stall", "beside", "total")


class Training:
    """A model that trains on random rows, as the trainer does."""

    def __init__(self, rows: int, length: int):
        torch.manual_seed(0)
        self.accelerator = Accelerator(cpu=True)
        self.model = LanguageModel(Model(), 0, compile=False)
        self.optimizers = optim.build(self.model, Optim())
        self.prepared = self.accelerator.prepare(self.model)
        self.accelerator.prepare(*self.optimizers)  # save_state saves what was prepared
        self.ids = torch.randint(0, 50_257, (rows, length))

    def iteration(self) -> float:
        """Seconds of one update."""
        started = time.monotonic()
        self.accelerator.backward(self.prepared(self.ids, self.ids) / self.ids.numel())
        for optimizer in self.optimizers:
            optimizer.step()
        self.model.zero_grad(set_to_none=True)
        return time.monotonic() - started


def ours(training: Training, saver: checkpoint.Saver, folder: Path) -> Callable[[], float]:
    """Begin a checkpoint; returns what waits for its end and gives its whole time."""
    tensors = checkpoint.state_tensors(training.model, training.optimizers)
    saver.start(folder / "iter-000001", tensors, {"iteration": 1}, kept_for_ever=set())

    def end() -> float:
        saved = saver.outcome(wait=True)
        assert saved is not None and saved.problem is None, saved
        return saved.seconds

    return end


def save_state(training: Training, folder: Path) -> Callable[[], float]:
    """Save as accelerate does; nothing is left to wait for."""
    started = time.monotonic()
    training.accelerator.save_state(str(folder / "state"))
    seconds = time.monotonic() - started
    return lambda: seconds


def one_round(training: Training, saver: checkpoint.Saver, side: str, folder: Path) -> dict[str, float]:
    """A save of one side, with an iteration beside it, and an iteration without."""
    alone = training.iteration()
    started = time.monotonic()
    end = ours(training, saver, folder) if side == "ours" else save_state(training, folder)
    stall = time.monotonic() - started
    beside = training.iteration()
    total = end()
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    for path in folder.iterdir():
        shutil.rmtree(path)
    return {"stall": stall, "beside": beside - alone, "total": total, "alone": alone, "MiB": size / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11, help="saves of each side, after one that is not counted")
    parser.add_argument("--shape", default="1x512", metavar="ROWSxTOKENS", help="rows of an iteration")
    parser.add_argument("--dir", type=Path, help="a folder on the disk that is meant (default: the system's scratch)")
    args = parser.parse_args()
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # a tied weight is left out, as it should be
    rows, length = map(int, args.shape.split("x"))
    training, saver = Training(rows, length), checkpoint.Saver(keep=2)
    training.iteration()
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory(dir=args.dir) as name:
        folder = Path(name)
        disk = filesystem_of(folder.resolve(), Path("/proc/mounts").read_text(encoding="utf-8"))
        for number in range(args.rounds + 1):
            for side in SIDES if number % 2 else SIDES[::-1]:
                result = one_round(training, saver, side, folder)
                if number:
                    found[side].append(result)
    size, alone = (statistics.median(r[key] for rs in found.values() for r in rs) for key in ("MiB", "alone"))
    print(f"{size:.0f} MiB of state on {disk}, {args.rounds} saves of each side, iterations of {alone:.2f} s")
    print(f"{'median seconds':<16}" + "".join(f"{key:>10}" for key in KEYS))
    medians = {side: {key: statistics.median(r[key] for r in found[side]) for key in found[side][0]} for side in SIDES}
    for side in SIDES:
        print(f"{side:<16}" + "".join(f"{medians[side][key]:>10.3f}" for key in KEYS))
    print(f"the stall of ours is {medians['ours']['stall'] / medians['save_state']['stall']:.2f} of save_state's")


if __name__ == "__main__":
    main()
