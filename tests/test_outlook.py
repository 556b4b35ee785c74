"""A run looks ahead: its forecasts are on record, it ends where it is flat and only there, and its curve is drawn."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from runs import TINY, finished, model_sums, records, start, tiny

from overnight.prepare.prepare import prepare
from overnight.recipe.load import load
from overnight.recipe.schedule import towards
from overnight.training import train as train_module
from overnight.training.stopping import to_come

LADDER = ("--schedule.max_iters", "80", "--schedule.milestones", "[50, 60]", "--validation.every", "5")
STOPS = (*LADDER, "--stop.when_flat", "true", "--stop.min_gain_nats")


TRACKED: dict[str, float] = {}  # what the trackers were given


def run(folder: Path, name: str, *overrides: str, **how) -> int:
    return train_module.train(tiny(folder, "--name", name, *overrides), **how)


@pytest.fixture(scope="module")
def flat(workplace):
    """Whether the run that ends early was made."""
    return []


@pytest.fixture
def flat_run(in_process, flat, monkeypatch):
    """A run in which every gain is too small: it ends at the first forecast, after iteration 30."""
    if not flat:
        monkeypatch.setattr("accelerate.Accelerator.log", lambda accelerator, values, step: TRACKED.update(values))
        assert run(in_process, "flat", *STOPS, "3", "--validation.ngram_baselines", "true") == 0
        flat.append("flat")
    return "flat"


def test_a_flat_run_cools_down_and_ends_with_the_model_of_a_run_of_that_length(in_process, flat_run, capsys):
    (event,) = [r for r in records(in_process, flat_run, "event") if r["event"] == "flat"]
    assert (event["iteration"], event["budget"], event["longer"]) == (30, 37, 50)
    assert finished(in_process, flat_run) == [37]
    assert run(in_process, "alone", "--schedule.max_iters", "37") == 0
    assert model_sums(flat_run, 37) == model_sums("alone", 37)
    capsys.readouterr()
    assert run(in_process, flat_run, *STOPS, "3") == 0
    assert "runs/flat is finished" in capsys.readouterr().out
    assert finished(in_process, flat_run) == [37]


def test_forecasts_and_baselines_reach_the_trackers(flat_run):
    assert {"baseline/unigram", "baseline/bigram", "forecast/50", "forecast/80", "val/loss"} <= TRACKED.keys()


def test_a_run_that_gains_goes_to_its_end_and_its_forecasts_are_on_record(in_process, flat_run, capsys):
    shutil.copytree("runs/flat", "runs/goes-on")
    assert run(in_process, "goes-on", *STOPS, "1e-6") == 0
    said = capsys.readouterr().out
    assert "resumes at iteration 30 from" in said
    assert finished(in_process, "goes-on") == [37, 50, 60, 80]
    forecasts = records(in_process, "goes-on", "forecast")
    (first,) = [r for r in forecasts if r["iteration"] == 30]
    assert [row["max_iters"] for row in first["budgets"]] == [37, 50, 60, 80]
    assert all(row["loss_low"] < row["loss"] < row["loss_high"] for row in first["budgets"])
    late = [r for r in forecasts if r["iteration"] == 60 and "cooldown" not in r]
    assert [row["max_iters"] for row in late[0]["budgets"]] == [75, 80]
    came = {r["iteration"]: r["val_loss"] for r in records(in_process, "goes-on", "event") if r["event"] == "finished"}
    assert late[0]["budgets"][-1]["loss"] == pytest.approx(came[80], abs=0.15)
    assert re.search(r"forecast of .*\n  ending now, 75 +\d", said)


def test_the_curve_of_several_runs_is_drawn(in_process, flat_run, root):
    report = [sys.executable, str(root / "recipes" / "report.py")]
    drawn = subprocess.run([*report, "runs/flat", "runs/flat", "--curve"], capture_output=True, text=True, check=False)
    assert (drawn.returncode, drawn.stdout) == (0, "written: runs/flat/report/curve.png\n"), drawn.stderr
    assert Path("runs/flat/report/curve.png").read_bytes().startswith(b"\x89PNG")
    drawn = [*report, "runs/flat", "--curve", "--out", "curve.svg"]
    subprocess.run(drawn, capture_output=True, check=True)
    words = set(re.findall("<!-- (.*) -->", Path("curve.svg").read_text()))
    assert {"training tokens, thousands", "iterations", "flat: loss along the training", "decay begins"} <= words
    assert "20" in words and not any(word.startswith("1e") for word in words)
    for wrong, said in (
        (["data", "--curve"], "data is no run directory"),
        (["runs/flat", "--curve", "--out", "x.docx"], "x.docx cannot be drawn"),
    ):
        refused = subprocess.run([*report, *wrong], capture_output=True, text=True, check=False)
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1) and said in refused.stderr


@pytest.mark.slow
def test_a_plan_takes_its_losses_from_a_run(in_process, flat_run, root):
    plan = [sys.executable, str(root / "recipes" / "plan.py"), "tiny.yaml", "--json", "--milestones", "50,80"]
    planned = subprocess.run([*plan, "--calibrate", "runs/flat"], capture_output=True, text=True, check=False)
    assert planned.returncode == 0, planned.stderr
    shown = json.loads(planned.stdout)
    assert "runs/flat" in shown["losses"]
    assert 3 < shown["rows"][1]["loss"] < shown["rows"][0]["loss"] < 6
    shutil.copytree("runs/flat", "runs/short")
    lines = Path("runs/short/metrics.jsonl").read_text().splitlines(keepends=True)
    Path("runs/short/metrics.jsonl").write_text("".join(lines[:20]))
    refused = subprocess.run([*plan, "--calibrate", "runs/short"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and "5 are needed, which are there at iteration 30" in refused.stderr


@pytest.mark.slow
def test_killed_in_its_last_decay_a_flat_run_ends_there_all_the_same(in_process, flat_run):
    process = start(in_process, "tiny.yaml", "--name", "killed-flat", "--checkpoint.every", "2", *STOPS, "3")
    for line in process.stdout:
        if line.startswith("iter 35/37"):
            process.kill()
            break
    assert process.wait() == -signal.SIGKILL
    assert run(in_process, "killed-flat", *STOPS, "3") == 0
    assert finished(in_process, "killed-flat") == [37]
    assert model_sums("killed-flat", 37) == model_sums(flat_run, 37)


@pytest.mark.slow
def test_a_corpus_that_is_used_up_is_flat_and_a_larger_one_is_not(in_process):
    recipe = TINY | {"data": TINY["data"] | {"path": str(in_process / "text.jsonl"), "train_tokens": 8_192}}
    recipe["data"]["dir"] = str(in_process / "used-up")
    (in_process / "used_up.yaml").write_text(json.dumps(recipe))
    prepare(load(in_process / "used_up.yaml").data, 500, report=lambda line: None)
    options = ["--schedule.max_iters", "400", "--schedule.milestones", "[100, 200]", "--validation.every", "10"]
    options += ["--stop.when_flat", "true", "--logging.every", "50"]
    assert train_module.train(load(in_process / "used_up.yaml", options)) == 0
    (event,) = [r for r in records(in_process, "used_up", "event") if r["event"] == "flat"]
    assert finished(in_process, "used_up")[-1] == event["budget"] < 400
    shorter = ("--schedule.max_iters", "200", "--schedule.milestones", "[100]")  # longer than the other one's trunk
    assert run(in_process, "not-used-up", *options, *shorter) == 0
    assert finished(in_process, "not-used-up") == [100, 200]


def test_a_decay_takes_no_budget_from_the_trunk_that_it_goes_back_to():
    recipe = load(Path(__file__).resolve().parents[1] / "recipes" / "fineweb_edu_40m_ladder.yaml")
    schedule = recipe.schedule
    assert to_come(recipe, towards(schedule, 6_000), 3_000) == {6_000, 10_000, 15_000, 20_000}
    assert to_come(recipe, towards(schedule, 10_000), 9_000) == {10_000, 15_000, 20_000}
    assert to_come(recipe, towards(schedule, 10_000), 10_000) == {15_000, 20_000}
    single = load(Path(__file__).resolve().parents[1] / "recipes" / "fineweb_edu_40m.yaml")
    assert to_come(single, single.schedule, 5_000) == {10_000, 15_000, 20_000}  # 6,000 would have left at 4,800
