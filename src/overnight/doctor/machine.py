"""What this machine is, as plain values for the doctor's checks: nothing is judged here, and nothing is changed."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import get_token

from overnight.core.lock import unsafe
from overnight.core.nvml import Driver, driver
from overnight.planning.model_size import data_bounded, data_bytes, run_bytes
from overnight.recipe.schema import Recipe

CONSTRAINTS = Path(__file__).resolve().parents[3] / "constraints.txt"  # beside the source of an editable install
RECORDED = ("torch", "transformers", "accelerate", "tokenizers", "safetensors", "numpy", "pydantic")
"""Packages whose versions decide what a run computes."""


@dataclass(frozen=True)
class Place:
    """A folder that the run writes to: free bytes, bytes it needs (0: unknown or none), and its file system's type."""

    name: str
    path: Path
    free: int
    needed: int
    filesystem: str
    writable: bool
    trouble: str | None = None  # with locks and syncing
    bounded: bool = True  # what it needs; otherwise text of unknown size comes on top


class TorchBuild(NamedTuple):
    """An installed PyTorch: its version, the CUDA that it was built for, None for CPUs, and the cards."""

    version: str
    cuda: str | None
    archs: tuple[str, ...] = ()


def torch_build() -> TorchBuild | None:
    """The PyTorch that is installed here."""
    try:
        import torch
    except ImportError:
        return None
    return TorchBuild(torch.__version__, torch.version.cuda, tuple(torch.cuda.get_arch_list()))


def pins() -> dict[str, str]:
    """The `name==version` lines of constraints.txt, with normalised names; nothing where that file is not at hand."""
    text = CONSTRAINTS.read_text(encoding="utf-8") if CONSTRAINTS.exists() else ""
    found = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;]+)", text, re.MULTILINE)
    return {canonical_name(name): version for name, version in found}


def canonical_name(name: str) -> str:
    """A distribution's name as the package index compares it: `PyYAML` and `pyyaml` are one."""
    return re.sub(r"[-_.]+", "-", name).lower()


def gpus_hidden() -> bool:
    """Whether the user keeps CUDA from every GPU, so that the CPU computes."""
    return os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")


@dataclass(frozen=True)
class Machine:
    """Everything that the checks look at: what a run needs, and what this machine has.

    No connection is opened for it, and no CUDA context made.
    """

    installed: dict[str, str | None]  # the versions of what is needed; None is missing
    compiles: bool  # whether the recipe admits torch.compile
    places: tuple[Place, ...]
    python: tuple[int, int] = sys.version_info[:2]
    pinned: dict[str, str] = field(default_factory=pins)
    torch: TorchBuild | None = field(default_factory=torch_build)
    driver: Driver | None = field(default_factory=driver)
    gpus_hidden: bool = field(default_factory=gpus_hidden)
    gcc: str | None = field(default_factory=lambda: next(filter(None, map(shutil.which, ("gcc", "cc", "clang"))), None))
    python_header: bool = field(default_factory=lambda: Path(sysconfig.get_path("include"), "Python.h").exists())
    kernel: str = field(default_factory=platform.release)
    hub_token: bool = field(default_factory=lambda: get_token() is not None)
    threads: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))


def survey(recipe: Recipe | None = None) -> Machine:
    """This machine, for a run of the recipe."""
    places = [_data_place(recipe)] if recipe else []
    places.append(_place_of("runs", Path("runs"), run_bytes(recipe) if recipe else 0))
    return Machine(_installed(recipe), recipe is None or recipe.compile is not False, tuple(places))


def _installed(recipe: Recipe | None) -> dict[str, str | None]:
    """The version of every direct dependency, None where it is missing; of what prepares data where that is to come."""
    extras = "gpu|prepare" if recipe and data_bytes(recipe) else "gpu"
    try:
        required = importlib.metadata.requires("overnight") or []
    except importlib.metadata.PackageNotFoundError:
        return {"overnight": None}
    asked = [line for line in required if "extra ==" not in line or re.search(rf"extra == .({extras})\b", line)]
    names = [re.split(r"[^A-Za-z0-9._-]", line)[0] for line in asked]
    return {canonical_name(name): _version(name) for name in names}


def _data_place(recipe: Recipe) -> Place:
    return replace(_place_of("data", Path(recipe.data.dir), data_bytes(recipe)), bounded=data_bounded(recipe))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _place_of(name: str, path: Path, needed: int) -> Place:
    existing = next(folder for folder in (path.resolve(), *path.resolve().parents) if folder.exists())
    writable = os.access(existing, os.W_OK)
    mounts = Path("/proc/mounts").read_text(encoding="utf-8", errors="replace")
    trouble = unsafe(existing) if writable else None
    free = shutil.disk_usage(existing).free
    return Place(name, path, free, needed, filesystem_of(existing, mounts), writable, trouble)


def filesystem_of(path: Path, mounts: str) -> str:
    """The file system type of the mount that holds `path`, from the text of /proc/mounts."""
    best, kind = "", "unknown"
    for line in mounts.splitlines():
        _, mount, found, *_ = line.split(" ")
        point = mount.replace("\\040", " ")
        if path.is_relative_to(point) and len(point) >= len(best):  # a later mount on the same point hides the earlier
            best, kind = point, found
    return kind


def environment() -> dict[str, Any]:
    """Versions, commit, command line and threads, for environment.json."""
    import torch

    return {
        "command": sys.argv,
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: importlib.metadata.version(name) for name in RECORDED},
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
    }


def _commit() -> str | None:
    """Of this source; None where git is not there, or stands still."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
