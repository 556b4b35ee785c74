"""Checks of a machine before a run, one line each, with the command that mends what is missing.

Every check is a pure function of the plain values that machine.py reads off this machine.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from rich.console import Console

from overnight.core.nvml import DetectedGpu, Driver
from overnight.doctor.machine import Machine, Place, TorchBuild, survey
from overnight.recipe.schema import Recipe

OLDEST_PYTHON = (3, 11)
# From NVIDIA's table "CUDA Toolkit and Minimum Required Driver Version for CUDA Minor Version Compatibility", Linux.
OLDEST_DRIVER = {11: "450.80", 12: "525.60", 13: "580"}
SLOW_MOUNTS = {"9p", "drvfs", "v9fs", "cifs", "smb3", "nfs", "nfs4", "vboxsf", "fuse.sshfs"}

Status = Literal["ok", "warn", "fail"]
COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


@dataclass(frozen=True)
class Check:
    """One line of the doctor: `warn` costs speed or comfort, `fail` stops training; `mend` is a command or advice."""

    name: str
    status: Status
    text: str
    mend: str = ""


def checks(machine: Machine) -> list[Check]:
    """Every check of `machine`, in the order in which one mends things."""
    wsl, build, gpus = is_wsl(machine.kernel), machine.torch, machine.driver.gpus if machine.driver else ()
    found = [
        check_python(machine.python),
        check_packages(machine.installed, machine.pinned),
        check_torch(build, machine.driver, wsl, hidden=machine.gpus_hidden),
        *(check_gpu(gpu, build.archs if build else ()) for gpu in gpus),
        check_compiler(machine, needed=bool(gpus and build and build.cuda and machine.compiles)),
    ]
    if wsl:
        found.append(check_wsl(machine.kernel))
    for place in machine.places:
        found += [check_disk(place), check_mount(place)]
    login = "a Hub token is set"
    if not machine.hub_token:  # it is looked for on this machine; nothing is sent
        login = "not logged in to the Hub; training needs no login, uploads do: hf auth login"
    return [*found, Check("hub", "ok", login), Check("threads", "ok", f"{machine.threads} CPU threads")]


def check_python(version: tuple[int, int]) -> Check:
    """Python is new enough for the libraries."""
    text = f"Python {version[0]}.{version[1]}"
    if version < OLDEST_PYTHON:
        return Check("python", "fail", f"{text}; 3.11 or newer is needed", "rm -r .venv; make setup PYTHON=python3.12")
    return Check("python", "ok", text)


def check_packages(installed: dict[str, str | None], pinned: dict[str, str]) -> Check:
    """Every direct dependency is there, in the version of constraints.txt where that file is at hand."""
    missing = [name for name, version in installed.items() if version is None]
    if missing == ["nvidia-ml-py"]:
        text = "nvidia-ml-py is not installed: no GPU is seen here, and its power is not measured"
        return Check("packages", "warn", text, "make setup")
    if missing:
        return Check("packages", "fail", f"not installed: {', '.join(missing)}", "make setup")
    others = [
        f"{name} {version} (tested with {pinned[name]})"
        for name, version in installed.items()
        if version is not None and version.partition("+")[0] != pinned.get(name, version.partition("+")[0])
    ]
    if others:
        return Check("packages", "warn", ", ".join(others), "pip install -e . -c constraints.txt")
    where = "in the versions of constraints.txt" if pinned else "in versions that the package admits"
    return Check("packages", "ok", f"{len(installed)} {where}")


def check_torch(torch: TorchBuild | None, driver: Driver | None, wsl: bool, *, hidden: bool) -> Check:
    """PyTorch's CUDA build and the driver fit each other, where the GPUs are not `hidden` from it."""
    if torch is None:
        return Check("torch", "fail", "PyTorch is not installed", "make setup")
    build = f"PyTorch {torch.version} built for {f'CUDA {torch.cuda}' if torch.cuda else 'CPUs'}"
    install = "install NVIDIA's driver in Windows, not in WSL" if wsl else "sudo ubuntu-drivers install"
    if hidden:
        return Check("torch", "warn", f"{build}; CUDA_VISIBLE_DEVICES hides every GPU: the CPU trains")
    if driver is None:
        text = f"{build}; no CUDA device: the quickstart runs on the CPU"
        return Check("torch", "warn", text, install if torch.cuda else "")
    if torch.cuda is None:
        mend = "rm -r .venv; make setup" if "+cpu" in torch.version else "pip install --force-reinstall torch"
        return Check("torch", "warn", f"{build}, but here is a GPU ({driver.gpus[0].name}) it cannot use", mend)
    fits = f"{build}, driver {driver.version} (CUDA up to {driver.cuda[0]}.{driver.cuda[1]})"
    major = int(torch.cuda.split(".")[0])
    if driver.cuda[0] >= major:  # within one major version, an older driver runs a newer minor version
        return Check("torch", "ok", fits)
    needed = f"; it needs driver {OLDEST_DRIVER[major]} or newer" if major in OLDEST_DRIVER else ""
    mend = "update NVIDIA's driver in Windows, then wsl --shutdown" if wsl else f"{install}; reboot"
    mend += "   (or the CPU, enough for the quickstart: CUDA_VISIBLE_DEVICES= make quickstart)"
    return Check("torch", "fail", fits + needed, mend)


def is_wsl(kernel: str) -> bool:
    """Whether that is the kernel of a Windows Subsystem for Linux."""
    return "microsoft" in kernel.lower()


def check_gpu(gpu: DetectedGpu, archs: tuple[str, ...]) -> Check:
    """The GPU is one that this PyTorch was built for, has bf16, and has its memory free."""
    major, minor = gpu.capability
    text = f"{gpu.name}, {gpu.free_gib:.1f} of {gpu.total_gib:.1f} GiB free, compute capability {major}.{minor}"
    oldest = min((int(number) for number in re.findall(r"sm_(\d+)", " ".join(archs))), default=0)
    if 10 * major + minor < oldest:
        return Check("gpu", "fail", f"{text}; this PyTorch begins at {oldest // 10}.{oldest % 10}", "use a newer GPU")
    if major < 8:
        return Check("gpu", "warn", f"{text}: no bf16, so `precision: auto` takes float32, several times slower")
    if gpu.free_gib < gpu.total_gib / 2:
        return Check("gpu", "warn", f"{text}; other programs hold the rest", "nvidia-smi shows which; end them")
    return Check("gpu", "ok", f"{text}, bf16")


def check_compiler(machine: Machine, *, needed: bool) -> Check:
    """Triton compiles a small C module against Python.h on its first kernel."""
    missing = [name for name, found in (("gcc", machine.gcc), ("Python.h", machine.python_header)) if not found]
    if not missing:
        return Check("compiler", "ok", f"{machine.gcc} and Python.h")
    if not needed:
        return Check("compiler", "ok", f"no {' and no '.join(missing)}; only torch.compile on a GPU needs them")
    mend = f"sudo apt install gcc libc6-dev python{machine.python[0]}.{machine.python[1]}-dev  (or --compile false)"
    return Check("compiler", "fail", f"torch.compile needs {' and '.join(missing)}", mend)


def check_wsl(kernel: str) -> Check:
    """WSL 2 runs CUDA, WSL 1 has no GPU."""
    if re.search(r"wsl2|microsoft-standard", kernel, re.IGNORECASE):
        return Check("wsl", "ok", "WSL 2: Windows may suspend the night; set its power plan to never sleep")
    return Check("wsl", "fail", "WSL 1, which has no CUDA", "wsl --set-version <distribution> 2   (in Windows)")


def check_disk(place: Place) -> Check:
    """The folder's disk has room for what the recipe will write there."""
    if not place.writable:
        return Check(place.name, "fail", f"{place.path} cannot be written to", f"sudo chown -R $USER {place.path}")
    if place.trouble:
        return Check(place.name, "fail", f"{place.path}: {place.trouble}", "use a folder on a local disk")
    text = f"{place.path}: {place.free / 1e9:.0f} GB free"
    if place.needed >= 10**8:
        text += f", the recipe needs about {place.needed / 1e9:.1f} GB"
    if not place.bounded:
        text += "; the shards of the text come on top, their size is unknown (`data.train_tokens` is empty)"
    if place.free < place.needed:
        return Check(place.name, "fail", text, f"free space there, or make {place.path} a link to a larger disk")
    return Check(place.name, "ok", text)


def check_mount(place: Place) -> Check:
    """The folder lies on a local Linux file system; Windows drives under WSL and network shares are slow."""
    name = f"{place.name} mount"
    if place.filesystem not in SLOW_MOUNTS:
        return Check(name, "ok", place.filesystem)
    mend = "cp -r . ~/overnight && cd ~/overnight   (the Linux side of WSL, or any local disk)"
    return Check(name, "warn", f"{place.path} is on {place.filesystem}, many times slower than a local disk", mend)


def examine(recipe: Recipe | None = None) -> bool:
    """Check this machine and print a line a check, and under it what mends it; returns whether training can start."""
    console, found = Console(highlight=False, soft_wrap=True), checks(survey(recipe))
    for check in found:
        console.print(f"{check.status:<4}", style=COLOURS[check.status], end=" ")
        console.print(f"{check.name:<10}  {check.text}", markup=False)
        if check.mend:
            console.print(f"{'':<15}  mend: {check.mend}", markup=False)
    return all(check.status != "fail" for check in found)
