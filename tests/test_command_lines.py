"""No command line of ours is wrong before it is run: its script's parser takes it, and its recipe the overrides."""

import runpy
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
from command_lines import ROOT, of_documents, of_make, ours, started_by, take, targets

from overnight import pipeline
from overnight.recipe.load import load
from overnight.training.state import QuickEval

DAY = ROOT / "benchmarks" / "gpu_day"
QUICKSTART = str(ROOT / "recipes" / "quickstart.yaml")


def script(name: str) -> dict:
    """The functions of a script in benchmarks/ or tests/."""
    sys.path.insert(0, str((ROOT / name).parent))
    try:
        return runpy.run_path(str(ROOT / name))
    finally:
        sys.path.pop(0)


def unique(commands) -> list[list[str]]:
    """Each once, those that are ours."""
    found = [given for words in commands if (given := ours(words))]
    return [list(words) for words in dict.fromkeys(map(tuple, found))]


def of_gpu_day() -> list[list[str]]:
    """Every task of every step, on every device, in both shapes, with and without what may be given."""
    steps, found = script("benchmarks/gpu_day/steps.py"), []
    more = ({}, {"text": (Path("a.parquet"), Path("b.parquet")), "nanogpt": Path("nano"), "iterations": 90})
    for device, small, given in product(("cpu", "cuda"), (True, False), more):
        for step in steps["STEPS"].values():
            tasks = step(steps["Settings"](device, small, **given))
            found += [["python", *task.words] for task in tasks]
    return found


class Recorder(pipeline.Child):
    """Collects the commands of a night."""

    def __init__(self):
        super().__init__()
        self.commands = []

    def run(self, command, environment):
        self.commands.append(command)
        return 0


def of_night() -> list[list[str]]:
    """What a night starts, by itself and under a launcher of several processes."""
    recipe = load(Path(QUICKSTART), ["--hub.repo_id", "alice/small", "--name", "never-run"])
    given, child = [QUICKSTART, "--name", "never-run", "--until", "07:30"], Recorder()
    for file in ("accelerate_config.yaml", "recipes/accelerate_configs/multi_gpu.yaml"):
        pipeline.run_train(recipe, given, ROOT / file, child)
        pipeline.run_evaluate(Path("runs/never-run/models/iter-000320"), ROOT / file, child)
    pipeline.run_prepare(given[:-2], child)
    pipeline.run_publish(recipe, child)
    return child.commands


def of_scripts(folder: Path) -> list[list[str]]:
    """What the scripts and modules that start others would start."""
    losses, hub, forecast = (script(f"benchmarks/{name}.py") for name in ("tokens_to_loss", "hub", "forecast"))
    step, kill = script("benchmarks/training_step.py"), script("tests/reliability/kill_prepare.py")
    killed = script("benchmarks/gpu_day/killed.py")
    jobs = [losses["Job"](arm, 1, 2e-3) for arm in losses["SETTINGS"]]
    words = [started_by(lambda job=job: losses["run"](job, folder)) for job in jobs]
    shapes = (*forecast["TUNED"], *forecast["HELD_OUT"])
    words += [started_by(lambda shape=shape: forecast["train"](folder, shape, 1)) for shape in shapes]
    words.append(started_by(lambda: hub["seconds"](folder, "alone", None)))
    words.append(started_by(lambda: kill["start"](Path(QUICKSTART), folder / "data")))
    sys_argv, sys.argv = sys.argv, ["training_step.py", "--device", "cuda", "--nanogpt", "nano"]
    try:
        args = step["arguments"]()
    finally:
        sys.argv = sys_argv
    words += [started_by(lambda name=name: step["child"](args, name, "32x1024")) for name in (*step["SIDES"], "muon")]
    again = [sys.executable, str(killed["TRAIN"]), QUICKSTART, "--name", "killed"]
    words.append(started_by(lambda: killed["kill_behind"](again, None, 4, 2)))
    return [*words, started_by(lambda: QuickEval(Path("runs/a/models/iter-000010"), 5))]


def check(given: list[str]) -> None:
    """The script or module takes what follows its name; of pytest only the files are looked for."""
    if given[:2] == ["-m", "pytest"]:
        assert all(Path(ROOT, word).exists() for word in given if word.endswith(".py")), given
    else:
        take(given)


@pytest.mark.parametrize("words", unique(of_documents()), ids=" ".join)
def test_a_document_names_a_command_line_that_its_script_takes(words):
    check(words)


MAKE = [words for words in of_documents() if words[0] == "make"]


@pytest.mark.parametrize("words", MAKE, ids=" ".join)
def test_a_document_names_a_target_its_variables_and_command_lines_that_are_taken(words):
    variables = {word.partition("=")[0] for word in words[1:] if "=" in word}
    assert variables <= {"RECIPE", "ARGS", "TORCH", "PYTHON", "EXTRAS", "CONFIG_FILE"}
    for started in unique(of_make(*words[1:])):
        check(started)


@pytest.mark.parametrize("target", targets())
def test_a_target_of_the_makefile_starts_what_its_script_takes(target):
    for words in unique(of_make(target)):
        check(words)


@pytest.mark.parametrize("words", unique(of_gpu_day()), ids=lambda words: f"{Path(words[0]).name} {words[-1]}")
def test_a_task_of_the_gpu_day_is_a_command_line_that_its_script_takes(words):
    check(words)


def test_the_invariants_of_the_gpu_day_are_collected_by_pytest():
    [words] = [words for words in of_gpu_day() if "pytest" in words and "cuda" in words][:1]
    collected = subprocess.run(
        [sys.executable, *words[1:], "--collect-only"], capture_output=True, text=True, check=False
    )
    assert collected.returncode == 0, collected.stdout + collected.stderr


def test_a_night_starts_what_its_scripts_take():
    for words in unique(of_night()):
        check(words)


def test_scripts_and_modules_start_what_their_scripts_take(tmp_path):
    for words in unique(of_scripts(tmp_path)):
        check(words)


@pytest.mark.parametrize("wrong", ["--no-such-option", "--data.no_such_key 1"])
def test_a_wrong_command_line_would_be_found(wrong):
    with pytest.raises(AssertionError):
        check(["recipes/plan.py", "recipes/quickstart.yaml", *wrong.split()])
