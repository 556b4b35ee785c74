"""A training run that is killed after a checkpoint and started again: what it lost, and what it took to the end.

python benchmarks/gpu_day/killed.py RECIPE --saved N [--section.key VALUE ...]

The trainer gets SIGKILL in the middle of the iterations behind the checkpoint of iteration N; the same command then
continues to the finished model. The run folder keeps what was recorded before the kill in before_kill.jsonl: the
iterations that were made twice say how far a resumed run is from an undisturbed one.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

from overnight.cli import recipe_command
from overnight.recipe.schema import Recipe
from overnight.run_dir.layout import folder_name
from overnight.run_dir.metrics import Metrics

TRAIN = Path(__file__).resolve().parents[2] / "recipes" / "train.py"


def kill_behind(command: list[str], metrics: Metrics, saved: int, further: int) -> None:
    """Train until `further` iterations stand behind the saved one, then SIGKILL."""
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            records = metrics.records()
            checkpoints = {record["checkpoint"] for record in records if record.get("event") == "saved"}
            if folder_name(saved) in checkpoints and records[-1]["iteration"] >= saved + further:
                process.kill()
            time.sleep(0.05)


def run(recipe: Recipe, chosen: argparse.Namespace) -> int:
    """Kill, keep what was recorded, and continue."""
    folder = Path("runs") / recipe.name
    command, metrics = [sys.executable, str(TRAIN), *chosen.arguments], Metrics(folder / "metrics.jsonl")
    kill_behind(command, metrics, chosen.saved, recipe.checkpoint.every // 2)
    shutil.copy(metrics.path, folder / "before_kill.jsonl")
    return subprocess.run(command, check=False).returncode


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--saved", type=int, required=True, metavar="N", help="the checkpoint to be killed behind")


if __name__ == "__main__":
    sys.exit(recipe_command(__doc__ or "", run, options=add_options))
