"""`recipes/train.py` with one fault, for tests alone: FAULT="kill model.safetensors 20" is SIGKILL at that stage.

FAULT is `KIND ARGUMENT ITERATION`; the fault happens in the save of that iteration:

kill STAGE   SIGKILL before the stage, one of STAGES
slow SECONDS a pause before model.safetensors is written
full BYTES   a disk that takes no file larger than that (RLIMIT_FSIZE), for this save alone; `export` for ITERATION: for
             the finished model; `always`: from the start
"""

from __future__ import annotations

import os
import resource
import runpy
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from overnight.model import checkpoint
from overnight.run_dir import layout
from overnight.training import finish

TRAIN = Path(__file__).resolve().parents[2] / "recipes" / "train.py"

# A stage begins with the first of these that the interpreter audits: an event, and what its first argument ends with.
# `{}` is the folder of the checkpoint.
STAGES = {
    "the-folder": ("os.mkdir", ".{}.partial"),
    "model.safetensors": ("save_file", ".{}.partial/model.safetensors"),
    "optimizer.safetensors": ("save_file", ".{}.partial/optimizer.safetensors"),
    "state.json": ("open", ".{}.partial/state.json"),
    "SHA256SUMS": ("open", ".{}.partial/SHA256SUMS"),
    "the-name": ("os.rename", ".{}.partial"),
    "the-verification": ("open", "/{}/SHA256SUMS"),
    "pruning": ("os.rename", "iter-000010"),
    "the-end-of-pruning": ("shutil.rmtree", ".iter-000010.discarded"),
}


def kill_at(stage: str, iteration: str) -> None:
    """Have this process killed when that stage of a save begins."""
    event, ending = STAGES[stage]
    saved = layout.folder_name(int(iteration))
    ending = ending.format(saved)

    def hook(name: str, arguments: tuple) -> None:
        if name != event or not str(arguments[0]).endswith(ending):
            return
        if "pruning" in stage and not list(Path().glob(f"runs/*/checkpoints/{saved}")):
            return
        os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    real = checkpoint.save_file

    def audited(tensors: dict, path: Path) -> None:
        sys.audit("save_file", str(path))  # safetensors writes without the interpreter's knowledge
        real(tensors, path)

    checkpoint.save_file = audited


def slow(seconds: str, iteration: str) -> None:
    """Have the writer of one checkpoint wait."""
    real = checkpoint.write_checkpoint

    def write(final: Path, *rest) -> str | None:
        if final.name == layout.folder_name(int(iteration)):
            time.sleep(float(seconds))
        return real(final, *rest)

    checkpoint.write_checkpoint = write


@contextmanager
def limited(size: int) -> Iterator[None]:
    """No file may become larger than `size` bytes while this lasts."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def full(size: str, when: str) -> None:
    """Have the disk full for one save, for the export, or always."""
    if when == "always":
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return
    module, name = (finish, "export") if when == "export" else (checkpoint, "write_checkpoint")
    real = getattr(module, name)

    def refused(*arguments):
        if when == "export" or arguments[0].name == layout.folder_name(int(when)):
            with limited(int(size)):
                return real(*arguments)
        return real(*arguments)

    setattr(module, name, refused)


if __name__ == "__main__":
    kind, argument, when = os.environ.pop("FAULT").split()
    {"kill": kill_at, "slow": slow, "full": full}[kind](argument, when)
    sys.argv[0] = str(TRAIN)
    runpy.run_path(str(TRAIN), run_name="__main__")
