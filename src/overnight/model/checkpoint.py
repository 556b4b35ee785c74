"""The exact training state on disk: safetensors and JSON with checksums, written aside, synced, renamed, read again.

A checkpoint is a folder `iter-NNNNNN/`, the state after that many iterations: `model.safetensors`,
`optimizer.safetensors` (keyed by parameter name), `state.json`, `SHA256SUMS`. There is no random state to keep: the
order of the data and the dropout of an iteration are functions of (seed, iteration).
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from overnight.core.files import forget_cached, sha256, sync
from overnight.run_dir.layout import saved_iterations

MODEL, OPTIMIZER, STATE_FILE, SUMS = "model.safetensors", "optimizer.safetensors", "state.json", "SHA256SUMS"

Tensors = dict[str, dict[str, Tensor]]  # by file, by name in the file


@dataclass
class Saved:
    """How a save went."""

    path: Path
    held: float  # seconds that it held up the training
    seconds: float  # from its start to its end
    problem: str | None = None  # why there is no such checkpoint; nothing of it is left


class Saver:
    """Saves in the background: training waits for a copy into host memory, which the next save uses again."""

    def __init__(self, keep: int):
        self.keep = keep
        self._buffers: Tensors = {}
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._underway: Future[Saved] | None = None

    def start(self, final: Path, tensors: Tensors, state: dict[str, Any], kept_for_ever: set[int]) -> None:
        """Begin to write the checkpoint `final`; the tensors may change as soon as this returns.

        Waits for a save that is still underway. When the new one is whole the oldest of its folder go, but for `keep`
        and for the iterations of `kept_for_ever`.
        """
        if self._underway:
            self._underway.exception()  # wait; its outcome has still to be asked for
        started = time.monotonic()
        text = json.dumps(state, indent=1)
        copies = self._copied(tensors)
        held = time.monotonic() - started

        def work() -> Saved:
            problem = write_checkpoint(final, copies, text)
            if problem is None:
                prune(final.parent, self.keep, kept_for_ever)
            return Saved(final, held, time.monotonic() - started, problem)

        self._underway = self._thread.submit(work)

    def outcome(self, *, wait: bool) -> Saved | None:
        """How the last save went, told once; None while it is underway, unless asked to `wait`, or without one."""
        if self._underway is None or not (wait or self._underway.done()):
            return None
        underway, self._underway = self._underway, None
        return underway.result()

    def _copied(self, tensors: Tensors) -> Tensors:
        """`tensors` in buffers of our own. `.cpu()` would not do: on a CPU that is the live weight itself."""
        for file, named in tensors.items():
            buffers = self._buffers.setdefault(file, {})
            for name, tensor in named.items():
                if name not in buffers:
                    buffers[name] = host_memory_like(tensor)
                buffers[name].copy_(tensor, non_blocking=True)
        if any(tensor.is_cuda for named in tensors.values() for tensor in named.values()):
            torch.cuda.synchronize()
        return self._buffers


def host_memory_like(tensor: Tensor) -> Tensor:
    """Memory of the host for a copy of `tensor`, page-locked where it is copied from a GPU and the system gives it."""
    try:
        return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    except RuntimeError:
        return torch.empty_like(tensor, device="cpu")


def write_checkpoint(final: Path, tensors: Tensors, state: str) -> str | None:
    """Write a checkpoint, aside first; it gets its name when it is whole, and keeps it when the disk gives it back.

    Returns None, or why there is none: then nothing of it is left, and older ones are as they were.
    """
    aside = final.with_name(f".{final.name}.partial")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        for name, named in tensors.items():
            save_file(named, aside / name)
        (aside / STATE_FILE).write_text(state, encoding="utf-8")
        put_in_place(aside, final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        return str(error)
    reason = damage(final)
    if reason is not None:
        quarantine(final)
    return reason


def write_sums(folder: Path) -> None:
    """Write the checksum of every other file of a folder into its SHA256SUMS."""
    names = sorted(path.name for path in folder.iterdir() if path.name != SUMS)
    (folder / SUMS).write_text("".join(f"{sha256(folder / name)}  {name}\n" for name in names), encoding="utf-8")


def put_in_place(aside: Path, final: Path) -> None:
    """Checksum and sync what is in `aside`, then give it its `final` name; an older folder of that name is replaced."""
    write_sums(aside)
    for path in aside.iterdir():
        sync(path)
        forget_cached(path)
    sync(aside)
    if final.exists():
        discard(final)
    aside.rename(final)
    sync(final.parent)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None: every file is there and has the checksum it was written with."""
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
        sums = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    except (OSError, ValueError) as error:
        return f"{SUMS}: {error}"
    if missing := {MODEL, OPTIMIZER, STATE_FILE} - sums.keys():
        return f"{SUMS} does not list {', '.join(sorted(missing))}"
    for name, digest in sums.items():
        try:
            if sha256(folder / name) != digest:
                return f"{name} differs from its checksum"
        except OSError as error:
            return f"{name}: {error.strerror}"
    return None


def discard(path: Path) -> None:
    """Delete a whole checkpoint, never leaving half of one under its name."""
    aside = path.with_name(f".{path.name}.discarded")
    shutil.rmtree(aside, ignore_errors=True)
    shutil.rmtree(path.rename(aside))


def quarantine(path: Path) -> Path:
    """Give a damaged checkpoint a name under which nobody takes it for one."""
    aside = path.with_name(f"damaged-{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    return path.rename(aside)


def newest_whole(candidates: Iterable[Path]) -> tuple[Path | None, list[str]]:
    """The first undamaged of `candidates`, which come newest first, and what was said about the damaged before it."""
    said: list[str] = []
    for path in candidates:
        reason = damage(path)
        if reason is None:
            return path, said
        said.append(f"{path}: {reason}; set aside as {quarantine(path).name}, going back to the one before")
    return None, said


def read_state(path: Path) -> dict[str, Any]:
    """The `state.json` of a verified checkpoint."""
    return json.loads((path / STATE_FILE).read_text(encoding="utf-8"))


def load_checkpoint(path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    """Put the tensors of a verified checkpoint into `model` and `optimizers`; KeyError on misfits, changing nothing."""
    weights, moments = load_file(path / MODEL), load_file(path / OPTIMIZER)
    parameters = dict(model.named_parameters())
    if misfits := weights.keys() ^ parameters.keys() | {name.split("|")[0] for name in moments} - parameters.keys():
        raise KeyError(f"{path}: holds other parameters than the model: {sorted(misfits)}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    for optimizer in optimizers:
        _load_optimizer(optimizer, parameters, moments)


def state_tensors(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> Tensors:
    """The live tensors of a checkpoint; in the optimizer's file they are named `parameter name|state key`.

    Muon's and AdamW's states are tensors alone.
    """
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    moments = {
        f"{names[parameter]}|{key}": tensor
        for optimizer in optimizers
        for parameter, values in optimizer.state.items()
        for key, tensor in values.items()
    }
    return {MODEL: parameters, OPTIMIZER: moments}


def _load_optimizer(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], moments: dict) -> None:
    mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for key, tensor in moments.items():
        name, _, entry = key.partition("|")
        parameter = parameters[name]
        if id(parameter) in mine:
            optimizer.state[parameter][entry].copy_(tensor)


def prune(folder: Path, keep: int, kept_for_ever: set[int]) -> None:
    """Delete the oldest checkpoints beyond `keep`, but none of `kept_for_ever` (the branch points of the trunk)."""
    plain = [path for iteration, path in saved_iterations(folder).items() if iteration not in kept_for_ever]
    for path in plain[:-keep]:
        discard(path)
