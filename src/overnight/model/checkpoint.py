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

from overnight.core.files import remove, strict_json
from overnight.core.sums import damage, discard, put_in_place
from overnight.errors import DamagedData, Unreachable
from overnight.run_dir.layout import saved_iterations

FILES = MODEL, OPTIMIZER, STATE_FILE = "model.safetensors", "optimizer.safetensors", "state.json"

Tensors = dict[str, dict[str, Tensor]]  # by file, by name in the file


@dataclass
class Saved:
    """How a save went."""

    path: Path
    held: float  # seconds that it held up the training
    seconds: float  # from its start to its end
    problem: str | None = None  # what it is not, and why


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
        text = strict_json(state, indent=1)
        copies = self._copied(tensors)
        held = time.monotonic() - started

        def work() -> Saved:
            problem = write_checkpoint(final, copies, text) or prune(final.parent, self.keep, kept_for_ever)
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

    Returns None, or what it is not and why. Older ones are as they were then, and nothing of it is left, unless the
    disk does not say whether it is whole.
    """
    aside = final.with_name(f".{final.name}.partial")
    try:
        remove(aside)
        aside.mkdir(parents=True)
        for name, named in tensors.items():
            save_file(named, aside / name)
        (aside / STATE_FILE).write_text(state, encoding="utf-8")
        put_in_place(aside, final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        return f"is not saved: {error}"
    try:
        if (reason := damage(final, FILES)) is None:
            return None
        quarantine(final)
    except OSError as error:
        return f"is saved, but not read again: {error}"
    return f"is not saved: {reason}"


def quarantine(path: Path) -> Path:
    """Give a damaged checkpoint a name under which nobody takes it for one."""
    aside = path.with_name(f"damaged-{path.name}")
    remove(aside)
    return path.rename(aside)


def newest_whole(candidates: Iterable[Path]) -> tuple[Path | None, list[str]]:
    """The first undamaged of `candidates`, which come newest first, and what was said about the damaged before it.

    Those are set aside once there is one to go back to. Raises `DamagedData` where all are damaged, and OSError where
    the disk does not tell; both leave every one as it was.
    """
    reasons: dict[Path, str] = {}
    for path in candidates:
        if (reason := damage(path, FILES)) is None:
            aside = {each: quarantine(each).name for each in reasons}
            return path, [f"{p}: {reasons[p]}; set aside as {aside[p]}, going back to the one before" for p in reasons]
        reasons[path] = reason
    if reasons:
        raise DamagedData([f"{path}: {reason}" for path, reason in reasons.items()])
    return None, []


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


def prune(folder: Path, keep: int, kept_for_ever: set[int]) -> str | None:
    """Delete the oldest checkpoints beyond `keep`, but none of `kept_for_ever` (the branch points of the trunk).

    Returns why it cannot be done, or None.
    """
    try:
        plain = [path for iteration, path in saved_iterations(folder).items() if iteration not in kept_for_ever]
        for path in plain[:-keep]:
            discard(path)
    except (OSError, Unreachable) as error:
        return f"is saved, but older ones cannot be removed: {error}"
    return None
