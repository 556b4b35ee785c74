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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overnight.core.lock import unsafe
from overnight.core.nvml import Driver, driver
from overnight.planning.model_size import data_bytes, run_bytes
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


@dataclass(frozen=True)
class Machine:
    """Everything that the checks look at."""

    python: tuple[int, int]
    installed: dict[str, str | None]
    pinned: dict[str, str]
    torch: str | None
    torch_cuda: str | None
    torch_archs: tuple[str, ...]
    driver: Driver | None
    gpus_hidden: bool
    gcc: str | None
    python_header: bool
    compiles: bool
    kernel: str
    places: tuple[Place, ...]
    hub_token: bool
    threads: int
    omp_threads: str | None


def survey(recipe: Recipe | None = None) -> Machine:
    """Read this machine; opens no connection and makes no CUDA context."""
    torch, torch_cuda, archs = _torch_build()
    return Machine(
        python=sys.version_info[:2],
        installed=_installed(recipe),
        pinned=pins(CONSTRAINTS.read_text(encoding="utf-8")) if CONSTRAINTS.exists() else {},
        torch=torch,
        torch_cuda=torch_cuda,
        torch_archs=archs,
        driver=driver(),
        gpus_hidden=gpus_hidden(),
        gcc=shutil.which("gcc") or shutil.which("cc") or shutil.which("clang"),
        python_header=Path(sysconfig.get_paths()["include"], "Python.h").exists(),
        compiles=recipe is None or recipe.compile is not False,
        kernel=platform.release(),
        places=_places(recipe),
        hub_token=_hub_token(),
        threads=len(os.sched_getaffinity(0)),
        omp_threads=os.environ.get("OMP_NUM_THREADS"),
    )


def gpus_hidden() -> bool:
    """Whether the user keeps CUDA from every GPU, so that the CPU computes."""
    return os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")


def pins(constraints: str) -> dict[str, str]:
    """`name==version` lines as a dictionary with normalised names."""
    found = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;]+)", constraints, re.MULTILINE)
    return {canonical_name(name): version for name, version in found}


def filesystem_of(path: Path, mounts: str) -> str:
    """The file system type of the mount that holds `path`, from the text of /proc/mounts."""
    best, kind = "", "unknown"
    for line in mounts.splitlines():
        _, mount, found, *_ = line.split(" ")
        point = mount.replace("\\040", " ")
        if path.is_relative_to(point) and len(point) >= len(best):  # a later mount on the same point hides the earlier
            best, kind = point, found
    return kind


def canonical_name(name: str) -> str:
    """A distribution's name as the package index compares it: `PyYAML` and `pyyaml` are one."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _installed(recipe: Recipe | None) -> dict[str, str | None]:
    """The version of every direct dependency, None where it is missing; of what prepares data where that is to come."""
    extras = ["gpu", *(["prepare"] if recipe and data_bytes(recipe) else [])]
    try:
        required = importlib.metadata.requires("overnight") or []
    except importlib.metadata.PackageNotFoundError:
        return {"overnight": None}
    asked = [
        line for line in required if "extra ==" not in line or re.search(rf"extra == .({'|'.join(extras)})\b", line)
    ]
    names = [re.split(r"[^A-Za-z0-9._-]", line)[0] for line in asked]
    return {canonical_name(name): _version(name) for name in names}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch_build() -> tuple[str | None, str | None, tuple[str, ...]]:
    try:
        import torch
    except ImportError:
        return None, None, ()
    return torch.__version__, torch.version.cuda, tuple(torch.cuda.get_arch_list())


def _places(recipe: Recipe | None) -> tuple[Place, ...]:
    wanted = [("runs", Path("runs"), run_bytes(recipe) if recipe else 0)]
    if recipe:
        wanted.insert(0, ("data", Path(recipe.data.dir), data_bytes(recipe)))
    mounts = Path("/proc/mounts").read_text(encoding="utf-8", errors="replace")
    places = []
    for name, path, needed in wanted:
        existing = next(folder for folder in (path.resolve(), *path.resolve().parents) if folder.exists())
        free, writable = shutil.disk_usage(existing).free, os.access(existing, os.W_OK)
        trouble = unsafe(existing) if writable else None
        places.append(Place(name, path, free, needed, filesystem_of(existing, mounts), writable, trouble))
    return tuple(places)


def _hub_token() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None


def environment() -> dict[str, Any]:
    """Versions, commit, command line and threads, for environment.json."""
    import torch

    source = Path(__file__).parent
    return {
        "command": sys.argv,
        "commit": _output("git", "-C", str(source), "rev-parse", "HEAD"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: importlib.metadata.version(name) for name in RECORDED},
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
    }


def _output(*command: str) -> str | None:
    """What a command prints, or None where it cannot be run, or stands still."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
