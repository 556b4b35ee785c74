"""`make overnight`: its plan skips what is done, signals reach the running step once, restarts need progress."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

from overnight import pipeline
from overnight.core.processes import handled
from overnight.errors import InputError
from overnight.recipe.load import load

# Counts the signals that arrive within a second of the first one, and ends as the trainer does.
COUNTS_SIGNALS = """
import signal, sys, time
seen = []
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda number, frame: seen.append(number))
print("ready", flush=True)
while not seen:
    time.sleep(0.05)
time.sleep(1)
sys.exit(75 if len(seen) == 1 else 1)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_reaches_the_running_step_once_and_its_exit_code_comes_back(number: signal.Signals):
    child = pipeline.Child()
    with handled(child.pass_on):
        threading.Timer(1.5, os.kill, (os.getpid(), number)).start()
        assert child.run([sys.executable, "-c", COUNTS_SIGNALS], dict(os.environ)) == 75
    assert child.stopped_by == number
    assert child.run([sys.executable, "-c", ""], dict(os.environ)) == 75  # nothing starts after that


@pytest.mark.parametrize(
    ("code", "one_process", "progressed", "restarts", "again"),
    [
        (75, True, True, 0, True),
        (137, True, True, 0, True),
        (75, True, False, 0, False),
        (75, True, True, pipeline.MAX_RESTARTS, False),
        *((code, True, True, 0, False) for code in (0, 1, 2, 3, 4)),
        (1, False, True, 0, True),  # the launcher of several processes says 1 for all
    ],
)
def test_the_trainer_is_started_again_only_after_progress_and_not_without_end(
    code, one_process, progressed, restarts, again
):
    assert pipeline.goes_on(code, one_process, progressed, restarts) == again


@pytest.mark.parametrize(("codes", "result"), [([75, 75, 0], 0), ([75, 3, 0], 3), ([75] * 20, 75)])
def test_preparing_is_started_again_when_the_network_stayed_away(codes, result, monkeypatch):
    child, runs = pipeline.Child(), []
    monkeypatch.setattr(child, "run", lambda command, environment: runs.append(command) or codes[len(runs) - 1])
    assert pipeline.run_prepare(["a.yaml"], child) == result
    assert len(runs) == min(codes.index(result) + 1 if result != 75 else len(codes), pipeline.MAX_RESTARTS + 1)


@pytest.fixture
def launched(tmp_path: Path):
    """What starts the trainer under an accelerate configuration of these values, or of this text."""

    def make(said) -> tuple[list[str], dict[str, str], bool]:
        (tmp_path / "own.yaml").write_text(said if isinstance(said, str) else yaml.safe_dump(said))
        return pipeline.launched(tmp_path / "own.yaml", "train.py", ["a.yaml", "--optim.lr", "1"])

    return make


def test_one_process_is_started_directly_and_several_through_the_launcher(root: Path, launched, tmp_path: Path):
    script = [str(root / "recipes" / "train.py"), "a.yaml", "--optim.lr", "1"]
    for said in ((root / "accelerate_config.yaml").read_text(), "distributed_type: XLA\nnum_processes: 8\n"):
        command, environment, one_process = launched(said)
        assert one_process and command == [sys.executable, *script]
        assert environment["ACCELERATE_USE_CPU"] == "False"
    command, _, one_process = launched({"distributed_type": "MULTI_GPU", "num_machines": 1, "num_processes": 2})
    assert not one_process and command[-4:] == script
    assert command[1:5] == ["-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "own.yaml")]


@pytest.mark.parametrize("kind", ["DEEPSPEED", "FSDP", "MEGATRON_LM"])
def test_what_a_configuration_says_beside_the_devices_is_overruled_by_how_it_is_launched(launched, kind: str):
    said = {"distributed_type": kind, "num_machines": 1, "mixed_precision": "fp8"}
    assert launched(said | {"num_processes": 1})[2]
    command, _, one_process = launched(said | {"num_processes": 2})
    assert not one_process and {"--multi_gpu", "--mixed_precision"} <= set(command)


@pytest.mark.parametrize("text", ["unheard_of: 1", "[", "compute_environment: AMAZON_SAGEMAKER"])
def test_a_configuration_that_cannot_be_used_is_refused(launched, text):
    with pytest.raises(InputError, match="`--config_file` is"):
        launched(text)


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"use_cpu": True, "mixed_precision": "bf16", "debug": True},
        {"gpu_ids": "1", "dynamo_config": {"dynamo_backend": "INDUCTOR"}},
    ],
    ids=str,
)
def test_a_process_that_is_started_directly_is_told_what_accelerates_launcher_would_tell(said, launched, tmp_path):
    _, ours, _ = launched({"distributed_type": "NO", "num_processes": 1} | said)
    config, script = str(tmp_path / "own.yaml"), tmp_path / "environment.py"
    script.write_text("import json, os; print(json.dumps(dict(os.environ)))")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, str(script)]
    upstream = json.loads(subprocess.run(launcher, capture_output=True, text=True, check=True).stdout)
    names = "ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_DEBUG_MODE", "CUDA_VISIBLE_DEVICES"
    assert [ours.get(name) for name in names] == [upstream.get(name) for name in names]
    backend = ours.get("ACCELERATE_DYNAMO_BACKEND", "NO")  # compared with the default, which is left out
    assert backend == upstream["ACCELERATE_DYNAMO_BACKEND"]


def test_the_plan_skips_what_is_done(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    recipe = load(root / "recipes" / "fineweb_edu_40m.yaml")
    run = tmp_path / "runs" / recipe.name
    evaluation = run / "evaluation" / "iter-020000"
    _, prepare, train, compare, publish = pipeline.steps(recipe)
    assert publish == "publish  skipped: no `hub.repo_id`"
    assert "recipes/prepare.py" in prepare and "20,000 iterations" in train
    assert "recipes/eval.py, 9 tasks, against openai-community/gpt2" in compare

    Path(recipe.data.dir).mkdir(parents=True)
    Path(recipe.data.dir, "manifest.json").write_text("{}")
    (run / "checkpoints" / "iter-000500").mkdir(parents=True)
    _, prepare, train, *_ = pipeline.steps(recipe)
    assert prepare.startswith("prepare  skipped") and "continues at iteration 500 of 20,000" in train

    (run / "models" / "iter-020000").mkdir(parents=True)
    assert "done" in pipeline.steps(recipe)[2] and "recipes/eval.py" in pipeline.steps(recipe)[3]
    evaluation.mkdir(parents=True)
    (evaluation / "comparison.md").write_text("")
    (run / "recipe.yaml").write_text(yaml.safe_dump({"recipe": recipe.model_dump()}))
    for limit, done in ((5, False), (None, True)):  # a look, and the night's answer
        settings = recipe.evaluation.model_dump() | {"limit": limit}
        (evaluation / "results.json").write_text(json.dumps({"settings": settings}))
        assert ("skipped" in pipeline.steps(recipe)[3]) == done


@pytest.mark.slow
def test_a_dry_run_prints_the_plan_and_bad_input_ends_with_2(root: Path, tmp_path: Path):
    def night(*options: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "overnight.pipeline", str(root / "recipes" / "quickstart.yaml"), *options]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    planned = night("--dry-run")
    assert planned.returncode == 0 and "prepare  skipped" in planned.stdout, planned.stderr
    assert not list(tmp_path.iterdir())
    for wrong in (["--optim.lr", "fast"], ["--config_file", "gone.yaml"]):
        refused = night(*wrong)
        assert refused.returncode == 2 and refused.stderr.strip()
