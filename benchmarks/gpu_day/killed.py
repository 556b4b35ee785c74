"""A training run that is killed after a checkpoint and started again: what it lost, and what it took to the end.

python benchmarks/gpu_day/killed.py RECIPE --saved N --json FILE [--section.key VALUE ...]

The trainer gets SIGKILL in the middle of the iterations behind the checkpoint of iteration N; the same command then
goes on to the finished model. The iterations that were made twice say how far a resumed run is from an undisturbed one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from overnight.cli import recipe_command
from overnight.files import write_whole
from overnight.layout import folder_name
from overnight.metrics import Metrics, Record
from overnight.recipe import Recipe

TRAIN = Path(__file__).resolve().parents[2] / "recipes" / "train.py"


def killed_behind(command: list[str], metrics: Metrics, saved: int, further: int) -> list[Record]:
    """Train until `further` iterations stand behind the saved one, then SIGKILL; the records that there were.

    Where the trainer ends by itself before, the records are those of its end.
    """
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            records = metrics.records()
            checkpoints = {record["checkpoint"] for record in records if record.get("event") == "saved"}
            if folder_name(saved) in checkpoints and records[-1]["iteration"] >= saved + further:
                process.kill()
            time.sleep(0.05)
    return metrics.records()


def by_iteration(records: list[Record]) -> dict[int, float]:
    """The training losses."""
    return {record["iteration"]: record["loss"] for record in records if record["kind"] == "train"}


def differences(before: list[Record], after: list[Record]) -> dict[int, float]:
    """By iteration that was made twice, how far apart its losses are, in nats."""
    resumed = next((r["iteration"] for r in after if r.get("event") == "resumed"), None)
    first, second = by_iteration(before), by_iteration(after)
    return {
        i: abs(first[i] - second[i])
        for i in sorted(first.keys() & second.keys())
        if resumed is not None and i > resumed
    }


def run(recipe: Recipe, chosen: argparse.Namespace) -> int:
    """Kill, go on, and write what both sessions recorded."""
    folder = Path("runs") / recipe.name
    command, metrics = [sys.executable, str(TRAIN), *chosen.arguments], Metrics(folder / "metrics.jsonl")
    found: dict[str, Any] = {"before": killed_behind(command, metrics, chosen.saved, recipe.checkpoint.every // 2)}
    write_whole(chosen.json, json.dumps(found))
    code = subprocess.run(command, check=False).returncode
    found["records"] = metrics.records()
    found["environment"] = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    found["differences"] = differences(found["before"], found["records"])
    write_whole(chosen.json, json.dumps(found))
    return code


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--saved", type=int, required=True, metavar="N", help="the checkpoint to be killed behind")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")


if __name__ == "__main__":
    sys.exit(recipe_command(__doc__ or "", run, options=add_options))
