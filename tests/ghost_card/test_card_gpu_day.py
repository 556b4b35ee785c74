"""The GPU day on a card: every command line, run, file and row of it as `cuda`, so that a real card's minutes are not
spent on typing errors. What is compiled the host does not compute: the training step beside others is left out."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ghost import ROOT, USUAL, settings
from texts import paragraphs, write_parquet

DAY = ROOT / "benchmarks" / "gpu_day"
COMPILED = {"training_step"}


@pytest.mark.slow
def test_the_days_runs_go_from_text_to_figures_on_a_card(tmp_path: Path):
    text = write_parquet(tmp_path / "books.parquet", paragraphs())
    words = [str(DAY / "day.py"), "2", "3", "--small", "--minutes", "30", "--out", str(tmp_path), "--text", str(text)]
    path = f"{ROOT}/tests/ghost_card/every_process:{os.environ.get('PYTHONPATH', '')}"
    here = os.environ | settings(USUAL) | {"PYTHONPATH": path}
    done = subprocess.run([sys.executable, *words], env=here, capture_output=True, text=True, check=False)
    steps = [tmp_path / "step-2.json", tmp_path / "step-3.json"]
    tasks = {name: task for step in steps for name, task in json.loads(step.read_text())["tasks"].items()}
    failed = {name: task["output"] for name, task in tasks.items() if task["exit"] and name not in COMPILED}
    assert not failed, failed
    page = tmp_path / "gpu.md"
    shutil.copy(ROOT / "docs" / "gpu.md", page)
    report = [sys.executable, str(DAY / "report.py"), *map(str, steps), "--page", str(page)]
    assert subprocess.run(report, check=False, capture_output=True).returncode == 0, done.stdout
    assert "NVIDIA GeForce RTX 4070, " in page.read_text() and "| micro-batch on 12 GB | " in page.read_text()
    assert "iterations made again after SIGKILL" in page.read_text() and "evaluation in bfloat16" in page.read_text()
