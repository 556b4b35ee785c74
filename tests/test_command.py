"""The command `overnight`: each part is its script, and a wheel brings all that it needs into an empty folder."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from runs import slow
from test_project import tracked

from overnight.__main__ import MODULES, SCRIPTS


def run(*words: str, **how) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, **how)


def test_every_script_is_a_part_of_the_command(root):
    assert {path.stem for path in (root / "recipes").glob("*.py")} == set(SCRIPTS)
    said = run("-m", "overnight").stdout
    assert all(f"\n  {name} " in said for name in [*SCRIPTS, *MODULES])


def test_a_part_does_what_its_script_does_for_a_recipe_that_is_named_alone(root, tmp_path):
    given = ["--gpu", "rtx-4070", "--milestones", "6000"]
    by_script = run(str(root / "recipes" / "plan.py"), str(root / "recipes" / "fineweb_edu_40m.yaml"), *given)
    by_command = run("-m", "overnight", "plan", "fineweb_edu_40m", *given, cwd=tmp_path)
    assert by_command.returncode == 0 and by_command.stdout == by_script.stdout
    refused = run("-m", "overnight", "plan", "fineweb_edu_40m", "--milestones", "0")
    assert refused.returncode == 2 and "iterations with commas between" in refused.stderr


def test_another_word_is_answered_with_the_parts():
    refused = run("-m", "overnight", "trian")
    assert refused.returncode == 2 and "`overnight trian` is no command; plan, prepare, train" in refused.stderr


@pytest.mark.parametrize(
    ("module", "script"),
    [("planning.plan", "plan"), ("prepare.prepare", "prepare"), slow("training.train", "train"),
     slow("evaluation.evaluate", "eval")],
)  # fmt: skip
def test_a_module_that_is_no_command_says_what_is(module, script):
    refused = run("-m", f"overnight.{module}")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert f"`python recipes/{script}.py` would work" in refused.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """bin/ of an environment with the wheel of this tree, and with the libraries of the present one."""
    folder = tmp_path_factory.mktemp("wheel")
    root = Path(__file__).resolve().parents[1]
    for path in tracked(root):
        copy = folder / "tree" / path.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    pip = ["-m", "pip", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index", "--no-build-isolation"]
    built = run(*pip, "wheel", *offline, "--wheel-dir", str(folder), str(folder / "tree"))
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "venv", symlinks=True)
    bare = str(folder / "venv" / "bin" / "python")
    target = run(*pip, "--python", bare, "install", "--no-deps", "--no-index", str(wheel))
    assert target.returncode == 0, target.stderr
    (place,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (place / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")  # without the .pth files in it
    return folder / "venv" / "bin"


@pytest.mark.slow
def test_a_wheel_runs_the_quickstarts_first_iterations_in_an_empty_folder(installed, root, tmp_path):
    outside = os.environ | {"PYTHONPATH": str(root / "tests" / "no_network"), "CUDA_VISIBLE_DEVICES": ""}
    command = [str(installed / "overnight"), "train", "quickstart", "--schedule.max_iters", "3"]
    short = ["--schedule.warmup_iters", "1", "--validation.every", "3", "--validation.ngram_baselines", "false"]
    done = subprocess.run([*command, *short], cwd=tmp_path, env=outside, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "next: overnight eval runs/quickstart/models/iter-000003" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"data", "runs"}
    night = [str(installed / "overnight"), "night", "recipes/quickstart.yaml", "--dry-run"]
    steps = subprocess.run(night, cwd=tmp_path, env=outside, capture_output=True, text=True, check=False)
    assert steps.returncode == 0 and "prepare  skipped: data/quickstart" in steps.stdout, steps.stderr


WITHOUT_TORCH = [
    (["plan", "fineweb_edu_40m", "--gpu", "rtx-4070"], 0, "The sweet spot is"),
    (["train", "fineweb_edu_40m"], 2, "`data.dir`: data/fineweb_edu holds no prepared data"),
    slow(["train", "own_text"], 2, "`data.path` is texts: no file found there"),
    (
        ["eval", "runs/none/models/iter-000001", "--against", "none"],
        2,
        "nothing is there; there are no runs here",
    ),
    slow(["eval", "gpt2", "--against", "./none", "--dry-run"], 2, "./none is no model, nothing is there"),
    slow(["sample", "runs/none/models/iter-000001"], 2, "nothing is there; there are no runs here"),
    *(slow([part, "--help"], 0, "usage: ") for part in SCRIPTS),
]


def run_without_torch(folder: Path, *words: str) -> subprocess.CompletedProcess:
    """A part of the command where an import of torch ends the process."""
    (folder / "torch.py").write_text("raise SystemExit('torch was imported')")
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    return run("-m", "overnight", *words, cwd=folder, env=os.environ | {"PYTHONPATH": path})


@pytest.mark.parametrize(("words", "code", "said"), WITHOUT_TORCH, ids=lambda value: str(value)[:40])
def test_help_and_a_path_where_nothing_is_are_answered_without_torch(words, code, said, tmp_path):
    done = run_without_torch(tmp_path, *words)
    assert done.returncode == code and said in done.stdout + done.stderr, done.stdout + done.stderr


def test_a_training_says_that_it_starts_before_torch_is_imported(tmp_path):
    done = run_without_torch(tmp_path, "train", "quickstart")
    assert done.stdout == "starting the training of quickstart: importing PyTorch and transformers\n"
    assert "torch was imported" in done.stderr
