"""The project's own files hold together: pins, the names of scripts, the accelerate configuration, no private hosts."""

import ast
import collections
import importlib.machinery
import itertools
import re
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
import yaml

from overnight.doctor.machine import pins


def project(root: Path) -> dict:
    return tomllib.loads((root / "pyproject.toml").read_text())["project"]


def tracked(root: Path) -> list[Path]:
    """Files that git has or would take; without git, everything that is not hidden."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if listed.returncode == 0 and listed.stdout:
        return [path for name in listed.stdout.split("\0") if name and (path := root / name).is_file()]
    made = re.compile(r"(runs|data|build|dist|\.(?!ci/).*/|.*\.egg-info/|.*__pycache__)")
    return [path for path in root.rglob("*") if path.is_file() and not made.match(str(path.relative_to(root)))]


def test_constraints_pin_every_direct_dependency_and_every_extra(root: Path):
    pinned = pins()
    extras = project(root)["optional-dependencies"].values()
    wanted = [*project(root)["dependencies"], *itertools.chain.from_iterable(extras)]
    names = {re.sub(r"[-_.]+", "-", re.split(r"[^A-Za-z0-9._-]", line)[0]).lower() for line in wanted}
    assert names - set(pinned) == {"overnight"}  # an extra that includes another
    assert not any("+" in version for version in pinned.values()), "a local build is on nobody else's index"


def test_no_script_hides_a_package_that_could_be_imported(root: Path):
    scripts = {path.stem for path in (root / "recipes").glob("*.py")}
    assert scripts
    # Without the current folder and recipes/ itself, as a library that one of the scripts imports would look.
    places = [*sysconfig.get_paths().values()]
    hidden = {name for name in scripts if importlib.machinery.PathFinder.find_spec(name, places)}
    assert not hidden | (scripts & set(sys.stdlib_module_names))


TOPOLOGIES = {  # machines, processes, several GPUs, only the CPU
    "accelerate_config.yaml": (1, 1, False, False),
    "recipes/accelerate_configs/cpu.yaml": (1, 1, False, True),
    "recipes/accelerate_configs/multi_gpu.yaml": (1, 2, True, False),
    "recipes/accelerate_configs/multi_node.yaml": (2, 16, True, False),
}


def test_every_accelerate_configuration_is_checked(root: Path):
    named = {str(path.relative_to(root)) for path in (root / "recipes" / "accelerate_configs").glob("*.yaml")}
    assert named | {"accelerate_config.yaml"} == set(TOPOLOGIES)


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_accelerate_accepts_every_key_and_takes_the_topology(root: Path, name: str):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    load_config_from_file(str(root / name))  # an unknown key is a ValueError
    options, _, from_file = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(root / name), "script.py"])
    )
    assert (options.num_machines, options.num_processes, options.multi_gpu, options.use_cpu) == TOPOLOGIES[name]
    assert not from_file  # no precision
    written = set(yaml.safe_load((root / name).read_text()))
    topology = {"compute_environment", "distributed_type", "num_machines", "num_processes", "machine_rank", "gpu_ids"}
    topology |= {"main_process_ip", "main_process_port", "rdzv_backend", "same_network", "use_cpu"}
    assert written <= topology | {"main_training_function", "debug"}


def test_accelerate_launches_under_its_configuration_without_a_warning(root: Path, tmp_path: Path):
    script = tmp_path / "hello.py"
    script.write_text("print('started')")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate_config.yaml", script]
    child = subprocess.run(launch, cwd=root, capture_output=True, text=True, check=False)
    assert (child.returncode, child.stdout, child.stderr) == (0, "started\n", "")


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?:^|[^A-Za-z0-9_.~}])/(?:home|root|work|Users)/\w",
        r"https?://[\w.-]*(?:py" + r"pi|python" + r"hosted|npm" + r"js|deb" + r"ian)[\w.-]*/",
    ],
    ids=["paths of one machine", "hosts of a package index"],
)
def test_no_file_names(root: Path, pattern: str):
    found = []
    for path in tracked(root):
        text = path.read_text(encoding="utf-8", errors="replace")
        found += [f"{path.relative_to(root)}: {hit.group(0)}" for hit in re.finditer(pattern, text, re.MULTILINE)]
    assert not found


def touched_at_import(path: Path) -> list[str]:
    """The statements that a module runs as it is imported and that change, or may change, what is not its own."""
    tree = ast.parse(path.read_text())
    own = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    found = []
    for node in tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            called = node.value.func
            touches = ast.unparse(called).split(".")[0] not in own
        else:
            targets = node.targets if isinstance(node, ast.Assign | ast.Delete) else [getattr(node, "target", None)]
            touches = any(isinstance(target, ast.Attribute | ast.Subscript) for target in targets)
        found += [f"{path.name} {node.lineno}: {ast.unparse(node)}"] if touches else []
    return found


def test_an_import_changes_no_environment_library_logger_or_warning(root: Path):
    modules = (root / "src" / "overnight").rglob("*.py")
    assert not [statement for path in modules for statement in touched_at_import(path)]


def defined_in(path: Path) -> set[str]:
    """The functions, classes and constants of a module's top level, `main` and dunder names left out."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return {name for name in found if name != "main" and not name.startswith("__")}


def test_few_names_mean_two_things(root: Path):
    modules = (root / "src" / "overnight").rglob("*.py")
    times = collections.Counter(name for path in modules for name in defined_in(path))
    assert len([name for name, number in times.items() if number > 1]) <= 8, times.most_common(12)


def test_make_lists_its_targets(root: Path):
    listed = subprocess.run(
        ["make", "--no-print-directory"], cwd=root, capture_output=True, text=True, check=True
    ).stdout
    for target in ("setup", "doctor", "quickstart", "overnight", "test", "test-all", "lint"):
        assert re.search(rf"^  make {target} ", listed, re.MULTILINE), target


def test_make_says_what_is_wrong_with_an_old_or_missing_python(root: Path, tmp_path: Path):
    old = tmp_path / "old-python"
    old.write_text('#!/bin/sh\necho "old-python is Python 3.8; 3.11 or newer is needed" >&2\nexit 1\n')
    old.chmod(0o755)
    for python, said in ((str(old), "3.11 or newer is needed"), ("no-such-python", "make PYTHON=")):
        command = ["make", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}", "setup"]
        child = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        assert child.returncode == 2
        assert said in child.stderr
        assert not (tmp_path / "venv").exists()
