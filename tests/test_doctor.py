"""The doctor sees what would stop or slow a run on machines unlike this one, and names the command that mends it."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from overnight.core.nvml import DetectedGpu, Driver
from overnight.core.scripts import recipe_file
from overnight.doctor import machine
from overnight.doctor.checks import Check, checks
from overnight.doctor.machine import Machine, Place, TorchBuild, filesystem_of, pins
from overnight.recipe.load import load

RTX_4070 = DetectedGpu("NVIDIA GeForce RTX 4070", free_gib=11, total_gib=12, capability=(8, 9))
RUNS = Place("runs", Path("runs"), free=500 * 10**9, needed=10**9, filesystem="ext4", writable=True)
GOOD = Machine(
    installed={"torch": "2.13.0", "numpy": "2.4.6"},
    compiles=True,
    places=(RUNS,),
    python=(3, 12),
    pinned={"torch": "2.13.0", "numpy": "2.4.6"},
    torch=TorchBuild("2.13.0+cu130", "13.0", ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")),
    driver=Driver("580.95", (13, 0), (RTX_4070,)),
    gpus_hidden=False,
    gcc="/usr/bin/gcc",
    python_header=True,
    kernel="6.8.0-51-generic",
    hub_token=True,
    threads=16,
)
WSL = "5.15.167.4-microsoft-standard-WSL2"
OLD_DRIVER = Driver("550.54", (12, 4), (RTX_4070,))
CPU_BUILD = TorchBuild("2.13.0+cpu", None)
FULL = Place("data", Path("data"), free=10**9, needed=20 * 10**9, filesystem="9p", writable=True)


def findings(**changes) -> dict[str, Check]:
    """What is not in order on the good machine after `changes`."""
    return {check.name: check for check in checks(dataclasses.replace(GOOD, **changes)) if check.status != "ok"}


def with_gpu(**changes) -> Driver:
    return Driver("580", (13, 0), (dataclasses.replace(RTX_4070, **changes),))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"torch": GOOD.torch._replace(cuda="13.2")},  # an older driver of the same generation is enough
        {"installed": {"torch": "2.13.0+cpu", "numpy": "2.4.6"}},
        {"gcc": None, "compiles": False},
        {"kernel": WSL},
    ],
    ids=str,
)
def test_a_good_machine_has_no_findings(changes):
    assert findings(**changes) == {}


@pytest.mark.parametrize(
    ("changes", "name", "status", "said"),
    [
        ({"driver": OLD_DRIVER}, "torch", "fail", "needs driver 580"),
        ({"driver": OLD_DRIVER}, "torch", "fail", "ubuntu-drivers"),
        ({"driver": OLD_DRIVER, "kernel": WSL}, "torch", "fail", "in Windows"),
        ({"driver": OLD_DRIVER, "gpus_hidden": True}, "torch", "warn", "the CPU trains"),
        ({"torch": CPU_BUILD}, "torch", "warn", "RTX 4070) it cannot use"),
        ({"torch": CPU_BUILD}, "torch", "warn", "rm -r .venv; make setup"),
        ({"torch": None}, "torch", "fail", "not installed"),
        ({"installed": {"torch": None, "nvidia-ml-py": None}}, "packages", "fail", "torch, nvidia-ml-py"),
        ({"installed": {"torch": "2.13.0", "nvidia-ml-py": None}}, "packages", "warn", "no GPU is seen"),
        ({"installed": {"torch": "2.14.1", "numpy": "2.4.6"}}, "packages", "warn", "tested with 2.13.0"),
        ({"driver": with_gpu(name="GTX 1080", capability=(6, 1))}, "gpu", "fail", "begins at 7.5"),
        ({"driver": with_gpu(name="RTX 2080", capability=(7, 5))}, "gpu", "warn", "no bf16"),
        ({"driver": with_gpu(free_gib=2)}, "gpu", "warn", "other programs hold the rest"),
        ({"python_header": False}, "compiler", "fail", "python3.12-dev"),
        ({"gcc": None}, "compiler", "fail", "torch.compile needs gcc"),
        ({"places": (FULL,)}, "data", "fail", "20.0 GB"),
        ({"places": (dataclasses.replace(FULL, bounded=False),)}, "data", "fail", "their size is unknown"),
        ({"places": (FULL,)}, "data mount", "warn", "9p"),
        ({"places": (dataclasses.replace(FULL, writable=False),)}, "data", "fail", "cannot be written to"),
        ({"python": (3, 10)}, "python", "fail", "3.11 or newer"),
        ({"kernel": "4.4.0-19041-Microsoft"}, "wsl", "fail", "WSL 1"),
    ],
)
def test_what_would_stop_or_slow_a_run_is_found_with_what_mends_it(changes, name, status, said):
    found = findings(**changes)[name]
    assert found.status == status and said in f"{found.text} {found.mend}"
    assert found.mend or status == "warn"


def test_no_cuda_device_is_a_warning_and_the_compiler_is_not_needed():
    found = findings(driver=None, torch=CPU_BUILD, gcc=None, python_header=False)
    assert {name: check.status for name, check in found.items()} == {"torch": "warn"}
    assert "no CUDA device: the quickstart runs on the CPU" in found["torch"].text


@pytest.mark.parametrize(("recipe", "bounded"), [("own_text", False), ("quickstart", True), ("fineweb_edu_40m", True)])
def test_text_of_unknown_size_is_told_from_text_whose_tokens_are_bounded(recipe, bounded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert machine.survey(load(recipe_file(recipe))).places[0].bounded is bounded


def test_the_innermost_mount_decides_the_file_system():
    mounts = "/dev/sdc / ext4 rw 0 0\nC:\\134 /mnt/c 9p rw 0 0\n/dev/sdd /mnt/c\\040d ext4 rw 0 0\n"
    for path, kind in (("/mnt/c/overnight/runs", "9p"), ("/mnt/cd/runs", "ext4"), ("/mnt/c d/runs", "ext4")):
        assert filesystem_of(Path(path), mounts) == kind


def test_pins_are_read_with_normalised_names(tmp_path, monkeypatch):
    (tmp_path / "pins").write_text("# a note\nPyYAML==6.0.3\nhuggingface_hub==2.4.0 ; python_version < '4'\n")
    monkeypatch.setattr(machine, "CONSTRAINTS", tmp_path / "pins")
    assert pins() == {"pyyaml": "6.0.3", "huggingface-hub": "2.4.0"}


def test_the_doctor_runs_here_and_refuses_a_recipe_that_is_not_there(root: Path):
    doctor = [sys.executable, "-m", "overnight.doctor"]
    here = subprocess.run([*doctor, "recipes/quickstart.yaml"], cwd=root, capture_output=True, text=True, check=False)
    assert here.returncode == 0, here.stdout + here.stderr
    assert all(line[:4].strip() in ("ok", "warn", "") for line in here.stdout.splitlines())
    gone = subprocess.run([*doctor, "gone.yaml"], cwd=root, capture_output=True, text=True, check=False)
    assert gone.returncode == 2 and "gone.yaml" in gone.stderr
