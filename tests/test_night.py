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


def test_the_trainer_is_started_again_only_after_progress_and_not_without_end():
    assert pipeline.goes_on(75, True, progressed=True, restarts=0)
    assert pipeline.goes_on(-9, True, progressed=True, restarts=0)
    assert not pipeline.goes_on(75, True, progressed=False, restarts=0)
    assert not pipeline.goes_on(75, True, progressed=True, restarts=pipeline.MAX_RESTARTS)
    for code in (0, 1, 2, 3, 4):
        assert not pipeline.goes_on(code, True, progressed=True, restarts=0)
    assert pipeline.goes_on(1, False, progressed=True, restarts=0)  # the launcher of several processes says 1 for all


@pytest.mark.parametrize(("codes", "result"), [([75, 75, 0], 0), ([75, 3, 0], 3), ([75] * 20, 75)])
def test_preparing_is_started_again_when_the_network_stayed_away(codes, result, monkeypatch):
    child, runs = pipeline.Child(), []
    monkeypatch.setattr(child, "run", lambda command, environment: runs.append(command) or codes[len(runs) - 1])
    assert pipeline.run_prepare(["a.yaml"], child) == result
    assert len(runs) == min(codes.index(result) + 1 if result != 75 else len(codes), pipeline.MAX_RESTARTS + 1)


def test_one_process_is_started_directly_and_several_through_the_launcher(root: Path, tmp_path: Path):
    command, environment, one_process = pipeline.launched(
        root / "accelerate_config.yaml", "train.py", ["a.yaml", "--optim.lr", "1"]
    )
    assert one_process
    assert command == [sys.executable, str(root / "recipes" / "train.py"), "a.yaml", "--optim.lr", "1"]
    assert environment["ACCELERATE_USE_CPU"] == "False"

    several = tmp_path / "two_gpus.yaml"
    several.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nnum_machines: 1\nnum_processes: 2\n"
    )
    command, _, one_process = pipeline.launched(several, "train.py", ["a.yaml"])
    assert not one_process
    assert command[1:5] == ["-m", "accelerate.commands.launch", "--config_file", str(several)]


@pytest.mark.parametrize("kind", ["DEEPSPEED", "FSDP", "MEGATRON_LM"])
def test_what_a_configuration_says_beside_the_devices_is_overruled_by_how_it_is_launched(tmp_path: Path, kind: str):
    config = tmp_path / "own.yaml"
    for processes in (1, 2):
        said = {"distributed_type": kind, "num_processes": processes, "num_machines": 1, "mixed_precision": "fp8"}
        config.write_text(yaml.safe_dump(said))
        command, _, one_process = pipeline.launched(config, "train.py", ["a.yaml"])
        assert one_process == (processes == 1)
        assert one_process or {"--multi_gpu", "--mixed_precision"} <= set(command)


def test_a_tpus_configuration_starts_one_process_and_a_broken_one_is_refused(tmp_path: Path):
    config = tmp_path / "own.yaml"
    config.write_text("distributed_type: XLA\nnum_processes: 8\n")
    assert pipeline.launched(config, "train.py", [])[2]
    for text in ("unheard_of: 1", "[", "compute_environment: AMAZON_SAGEMAKER"):
        config.write_text(text)
        with pytest.raises(InputError, match="`--config_file` is"):
            pipeline.launched(config, "train.py", [])


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"use_cpu": True, "mixed_precision": "bf16", "debug": True},
        {"gpu_ids": "1", "dynamo_config": {"dynamo_backend": "INDUCTOR"}},
    ],
    ids=str,
)
def test_a_process_that_is_started_directly_is_told_what_accelerates_launcher_would_tell(said, tmp_path: Path):
    config, script = tmp_path / "one.yaml", tmp_path / "environment.py"
    config.write_text(yaml.safe_dump({"distributed_type": "NO", "num_processes": 1} | said))
    script.write_text("import json, os; print(json.dumps(dict(os.environ)))")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), str(script)]
    upstream = json.loads(subprocess.run(launcher, capture_output=True, text=True, check=True).stdout)
    _, ours, _ = pipeline.launched(config, "train.py", [])

    names = "ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_DEBUG_MODE", "CUDA_VISIBLE_DEVICES"
    assert [ours.get(name) for name in names] == [upstream.get(name) for name in names]
    backend = ours.get("ACCELERATE_DYNAMO_BACKEND", "NO")  # compared with the default, which is left out
    assert backend == upstream["ACCELERATE_DYNAMO_BACKEND"]


def test_the_plan_skips_what_is_done(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    recipe = load(root / "recipes" / "fineweb_edu_40m.yaml")
    _, prepare, train, compare, publish = pipeline.steps(recipe)
    assert publish == "publish  skipped: no `hub.repo_id`"
    assert "recipes/prepare.py" in prepare
    assert "20,000 iterations" in train
    assert "recipes/eval.py, 9 tasks, against openai-community/gpt2" in compare

    shards = Path(recipe.data.dir)
    shards.mkdir(parents=True)
    (shards / "manifest.json").write_text("{}")
    run = tmp_path / "runs" / recipe.name
    (run / "checkpoints" / "iter-000500").mkdir(parents=True)
    _, prepare, train, *_ = pipeline.steps(recipe)
    assert prepare.startswith("prepare  skipped")
    assert "continues at iteration 500 of 20,000" in train

    (run / "models" / "iter-020000").mkdir(parents=True)
    assert "done" in pipeline.steps(recipe)[2]
    assert "recipes/eval.py" in pipeline.steps(recipe)[3]
    (run / "evaluation" / "iter-020000").mkdir(parents=True)
    (run / "evaluation" / "iter-020000" / "comparison.md").write_text("")
    (run / "recipe.yaml").write_text(yaml.safe_dump({"recipe": recipe.model_dump()}))
    for limit, done in ((5, False), (None, True)):  # a look, and the night's answer
        settings = recipe.evaluation.model_dump() | {"limit": limit}
        (run / "evaluation" / "iter-020000" / "results.json").write_text(json.dumps({"settings": settings}))
        assert ("skipped" in pipeline.steps(recipe)[3]) == done


@pytest.mark.slow
def test_a_dry_run_prints_the_plan_and_bad_input_ends_with_2(root: Path, tmp_path: Path):
    command = [sys.executable, "-m", "overnight.pipeline"]
    recipe = str(root / "recipes" / "quickstart.yaml")
    planned = subprocess.run([*command, recipe, "--dry-run"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert planned.returncode == 0, planned.stderr
    assert "prepare  skipped" in planned.stdout
    assert not list(tmp_path.iterdir())
    for wrong in ([recipe, "--optim.lr", "fast"], [recipe, "--config_file", "gone.yaml"]):
        refused = subprocess.run([*command, *wrong], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert refused.returncode == 2
        assert refused.stderr.strip()
