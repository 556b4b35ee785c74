"""The exact training state on disk: safetensors and JSON with checksums, written aside, synced, renamed.

A checkpoint is `checkpoints/iter-NNNNNN/`, the state after that many iterations: `model.safetensors`,
`optimizer.safetensors` (keyed by parameter name), `state.json`, `SHA256SUMS`. There is no random state to keep: the
order of the data and the dropout of an iteration are functions of (seed, iteration).
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from overnight.files import sha256, sync

SUMS = "SHA256SUMS"
_NAME = re.compile(r"iter-(\d{6,})")


def folder_name(iteration: int) -> str:
    """`iter-004800`"""
    return f"iter-{iteration:06d}"


def saved_iterations(folder: Path) -> dict[int, Path]:
    """The checkpoints (or models) in `folder` by iteration, ascending; other files there are left alone."""
    found = ((_NAME.fullmatch(path.name), path) for path in folder.glob("iter-*"))
    return dict(sorted((int(match[1]), path) for match, path in found if match and path.is_dir()))


def save(
    folder: Path, iteration: int, model: nn.Module, optimizers: list[torch.optim.Optimizer], state: dict[str, Any]
) -> Path:
    """Write the checkpoint of `iteration` under `folder`; it gets its final name when it is whole and on the disk."""
    final = folder / folder_name(iteration)
    aside = folder / f".{final.name}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    save_file({name: p.detach() for name, p in model.named_parameters()}, aside / "model.safetensors")
    save_file(optimizer_tensors(model, optimizers), aside / "optimizer.safetensors")
    (aside / "state.json").write_text(json.dumps({"iteration": iteration, **state}, indent=1), encoding="utf-8")
    publish(aside, final)
    return final


def publish(aside: Path, final: Path) -> None:
    """Checksum and sync what is in `aside`, then give it its `final` name; an older folder of that name is replaced."""
    names = sorted(path.name for path in aside.iterdir())
    (aside / SUMS).write_text("".join(f"{sha256(aside / name)}  {name}\n" for name in names), encoding="utf-8")
    for path in [*aside.iterdir(), aside]:
        sync(path)
    if final.exists():
        shutil.rmtree(final)
    aside.rename(final)
    sync(final.parent)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None: every file is there and has the checksum it was written with."""
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
        sums = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    except (OSError, ValueError) as error:
        return f"{SUMS}: {error}"
    needed = {"model.safetensors", "optimizer.safetensors", "state.json"}
    if missing := needed - sums.keys():
        return f"{SUMS} does not list {', '.join(sorted(missing))}"
    for name, digest in sums.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if sha256(folder / name) != digest:
            return f"{name} differs from its checksum"
    return None


def newest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest undamaged checkpoint, if any, and what was said about damaged ones, which are set aside."""
    said: list[str] = []
    for path in reversed(saved_iterations(folder).values()):
        reason = damage(path)
        if reason is None:
            return path, said
        aside = path.with_name(f"damaged-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        said.append(f"{path}: {reason}; set aside as {aside.name}, going back to the one before")
    return None, said


def load(path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Any]:
    """Put a verified checkpoint into `model` and `optimizers` and return its `state.json`; KeyError if it misfits."""
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    weights = load_file(path / "model.safetensors")
    parameters = dict(model.named_parameters())
    if weights.keys() != parameters.keys():
        raise KeyError(f"{path}: holds other parameters than the model: {sorted(weights.keys() ^ parameters.keys())}")
    moments = load_file(path / "optimizer.safetensors")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    for optimizer in optimizers:
        _load_optimizer(optimizer, parameters, moments)
    return state


def optimizer_tensors(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """`{"parameter name|state key": tensor}` over all optimizers; Muon's and AdamW's states are tensors alone."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}|{key}": tensor
        for optimizer in optimizers
        for parameter, values in optimizer.state.items()
        for key, tensor in values.items()
    }


def _load_optimizer(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], moments: dict) -> None:
    mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for key, tensor in moments.items():
        name, _, entry = key.partition("|")
        parameter = parameters[name]
        if id(parameter) in mine:
            optimizer.state[parameter][entry] = tensor.to(parameter.device)


def prune(folder: Path, keep: int, kept_for_ever: set[int]) -> None:
    """Delete the oldest checkpoints beyond `keep`, but none of `kept_for_ever` (the branch points of the trunk)."""
    plain = [path for iteration, path in saved_iterations(folder).items() if iteration not in kept_for_ever]
    for path in plain[:-keep]:
        shutil.rmtree(path)
