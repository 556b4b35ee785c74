"""A look at a finished model while its run goes on: a few items of each task, scored by a process of their own."""

from __future__ import annotations

import json
from pathlib import Path

from overnight.core.processes import beside

ROOT = Path(__file__).resolve().parents[3]


class Look:
    """`recipes/eval.py` on the model in `folder`, at low priority: no step waits for it, and no failure reaches one."""

    def __init__(self, folder: Path, items: int):
        self.out = folder.parents[1] / "evaluation" / f"{folder.name}-first-{items}"
        script = str(ROOT / "recipes" / "eval.py")
        options = ["--against", "none", "--texts", "none", "--shards", "none", "--limit", str(items)]
        self.process = beside(script, str(folder), "--out", str(self.out), *options)

    def scores(self) -> tuple[dict[str, float], str]:
        """Wait for the end: the deciding metric of each task, and what went wrong, or an empty text."""
        said, _ = self.process.communicate()
        if self.process.returncode:
            return {}, (said.strip().splitlines() or ["no word"])[-1]
        [model] = json.loads((self.out / "results.json").read_text(encoding="utf-8"))["models"]
        return {task: found["metrics"][found["metric"]] for task, found in model["tasks"].items()}, ""
