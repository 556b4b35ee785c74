"""A look at a finished model while its run goes on: a few items of each task, scored by a process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
NOT_INHERITED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Look:
    """`recipes/eval.py` on the model in `folder`, at low priority: no step waits for it, and no failure reaches one."""

    def __init__(self, folder: Path, items: int):
        self.out = folder.parents[1] / "evaluation" / f"{folder.name}-first-{items}"
        command = [sys.executable, str(ROOT / "recipes" / "eval.py"), str(folder), "--out", str(self.out)]
        command += ["--against", "none", "--texts", "none", "--shards", "none", "--limit", str(items)]
        environment = {key: value for key, value in os.environ.items() if key not in NOT_INHERITED}
        self.process = subprocess.Popen(
            ["nice", *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def scores(self) -> tuple[dict[str, float], str]:
        """Wait for the end: the deciding metric of each task, and what went wrong, or an empty text."""
        said, _ = self.process.communicate()
        if self.process.returncode:
            return {}, (said.strip().splitlines() or ["no word"])[-1]
        [model] = json.loads((self.out / "results.json").read_text(encoding="utf-8"))["models"]
        return {task: found["metrics"][found["metric"]] for task, found in model["tasks"].items()}, ""
