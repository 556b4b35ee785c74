"""The doctor sees what would stop or slow a run on machines unlike this one, and names the command that mends it."""

import dataclasses
import subprocess
import sys
from pathlib import Path

from overnight.core.nvml import DetectedGpu, Driver
from overnight.doctor.checks import Check, checks
from overnight.doctor.machine import Machine, Place, filesystem_of, pins

RTX_4070 = DetectedGpu("NVIDIA GeForce RTX 4070", free_gib=11, total_gib=12, capability=(8, 9))
GOOD = Machine(
    python=(3, 12),
    installed={"torch": "2.13.0", "numpy": "2.4.6"},
    pinned={"torch": "2.13.0", "numpy": "2.4.6"},
    torch="2.13.0+cu130",
    torch_cuda="13.0",
    torch_archs=("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"),
    driver=Driver("580.95", (13, 0), (RTX_4070,)),
    gpus_hidden=False,
    gcc="/usr/bin/gcc",
    python_header=True,
    compiles=True,
    kernel="6.8.0-51-generic",
    places=(Place("runs", Path("runs"), free=500 * 10**9, needed=10**9, filesystem="ext4", writable=True),),
    hub_token=True,
    threads=16,
    omp_threads=None,
)
WSL = "5.15.167.4-microsoft-standard-WSL2"


def findings(**changes) -> dict[str, Check]:
    """What is not in order on the good machine after `changes`."""
    return {check.name: check for check in checks(dataclasses.replace(GOOD, **changes)) if check.status != "ok"}


def test_a_good_machine_has_no_findings():
    assert findings() == {}


def test_a_driver_too_old_for_the_cuda_of_torch_fails():
    found = findings(driver=Driver("550.54", (12, 4), (RTX_4070,)))
    assert found["torch"].status == "fail"
    assert "needs driver 580" in found["torch"].text
    assert "ubuntu-drivers" in found["torch"].mend
    assert "Windows" in findings(driver=Driver("550.54", (12, 4), (RTX_4070,)), kernel=WSL)["torch"].mend


def test_an_older_driver_of_the_same_cuda_generation_is_enough():
    assert findings(torch_cuda="13.2") == {}


def test_a_missing_package_fails_and_a_missing_power_meter_warns():
    missing = findings(installed={"torch": None, "nvidia-ml-py": None})["packages"]
    assert missing.status == "fail" and "torch, nvidia-ml-py" in missing.text
    unseen = findings(installed={"torch": "2.13.0", "nvidia-ml-py": None})["packages"]
    assert unseen.status == "warn" and "no GPU is seen" in unseen.text


def test_no_cuda_device_is_a_warning_and_the_compiler_is_not_needed():
    found = findings(driver=None, torch="2.13.0+cpu", torch_cuda=None, gcc=None, python_header=False)
    assert {name: check.status for name, check in found.items()} == {"torch": "warn"}
    assert "no CUDA device: the quickstart runs on the CPU" in found["torch"].text


def test_gpus_that_the_user_hides_are_no_failure():
    found = findings(driver=Driver("550.54", (12, 4), (RTX_4070,)), gpus_hidden=True)
    assert {name: check.status for name, check in found.items()} == {"torch": "warn"}
    assert "the CPU trains" in found["torch"].text


def test_a_cpu_build_beside_a_gpu_is_named():
    found = findings(torch="2.13.0+cpu", torch_cuda=None)
    assert "RTX 4070" in found["torch"].text
    assert found["torch"].mend


def test_a_gpu_older_than_the_build_fails_and_one_without_bf16_warns():
    old = dataclasses.replace(RTX_4070, name="GTX 1080", capability=(6, 1))
    turing = dataclasses.replace(RTX_4070, name="RTX 2080", capability=(7, 5))
    assert findings(driver=Driver("580", (13, 0), (old,)))["gpu"].status == "fail"
    assert "no bf16" in findings(driver=Driver("580", (13, 0), (turing,)))["gpu"].text


def test_memory_held_by_other_programs_is_a_warning():
    busy = dataclasses.replace(RTX_4070, free_gib=2)
    assert findings(driver=Driver("580", (13, 0), (busy,)))["gpu"].status == "warn"


def test_torch_compile_without_gcc_or_headers_fails_with_the_packages_to_install():
    assert "python3.12-dev" in findings(python_header=False)["compiler"].mend
    assert findings(gcc=None)["compiler"].status == "fail"
    assert findings(gcc=None, compiles=False) == {}


def test_disk_and_mount_are_judged_for_each_folder():
    full = Place("data", Path("data"), free=10**9, needed=20 * 10**9, filesystem="9p", writable=True)
    found = findings(places=(full,))
    assert found["data"].status == "fail"
    assert "20.0 GB" in found["data"].text
    assert found["data mount"].status == "warn"
    assert findings(places=(dataclasses.replace(full, writable=False),))["data"].status == "fail"


def test_packages_are_compared_with_the_pins():
    assert findings(installed={"torch": "2.13.0+cpu", "numpy": "2.4.6"}) == {}
    assert findings(installed={"torch": "2.14.1", "numpy": "2.4.6"})["packages"].status == "warn"
    assert findings(installed={"torch": None, "numpy": "2.4.6"})["packages"].status == "fail"


def test_an_old_python_and_wsl_1_fail():
    assert findings(python=(3, 10))["python"].status == "fail"
    assert findings(kernel="4.4.0-19041-Microsoft")["wsl"].status == "fail"
    assert "wsl" not in findings(kernel=WSL)


def test_the_innermost_mount_decides_the_file_system():
    mounts = "/dev/sdc / ext4 rw 0 0\nC:\\134 /mnt/c 9p rw 0 0\n/dev/sdd /mnt/c\\040d ext4 rw 0 0\n"
    assert filesystem_of(Path("/mnt/c/overnight/runs"), mounts) == "9p"
    assert filesystem_of(Path("/mnt/cd/runs"), mounts) == "ext4"
    assert filesystem_of(Path("/mnt/c d/runs"), mounts) == "ext4"


def test_pins_are_read_with_normalised_names():
    assert pins("# a note\nPyYAML==6.0.3\nhuggingface_hub==2.4.0 ; python_version < '4'\n") == {
        "pyyaml": "6.0.3",
        "huggingface-hub": "2.4.0",
    }


def test_the_doctor_runs_here_and_refuses_a_recipe_that_is_not_there(root: Path):
    recipe = root / "recipes" / "quickstart.yaml"
    here = subprocess.run(
        [sys.executable, "-m", "overnight.doctor", str(recipe)],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert here.returncode == 0, here.stdout + here.stderr
    assert all(line[:4].strip() in ("ok", "warn", "") for line in here.stdout.splitlines())
    gone = subprocess.run(
        [sys.executable, "-m", "overnight.doctor", "gone.yaml"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert gone.returncode == 2
    assert "gone.yaml" in gone.stderr
