"""A few items of each task for a finished model while its run goes on, scored by a process of their own."""

from __future__ import annotations

import json
from pathlib import Path

from overnight.core.processes import beside

ROOT = Path(__file__).resolve().parents[3]


class QuickEval:
    """`recipes/eval.py` on the model in `folder`, at low priority and on the CPU: no step waits for it.

    The device's memory is the training's, and so is its time.
    """

    def __init__(self, folder: Path, items: int):
        self.folder, self.items = folder, items
        self.out = folder.parents[1] / "evaluation" / f"{folder.name}-first-{items}"
        script = str(ROOT / "recipes" / "eval.py")
        options = ["--against", "none", "--texts", "none", "--shards", "none", "--limit", str(items)]
        command = [script, str(folder), "--out", str(self.out), *options]
        self.process = beside(*command, environment={"CUDA_VISIBLE_DEVICES": ""})

    @property
    def over(self) -> bool:
        """Whether the process has ended."""
        return self.process.poll() is not None

    def scores(self) -> tuple[dict[str, float], str]:
        """Wait for the end: the deciding metric of each task, and what went wrong, or an empty text."""
        said, _ = self.process.communicate()
        if self.process.returncode:
            return {}, (said.strip().splitlines() or ["no word"])[-1]
        [model] = json.loads((self.out / "results.json").read_text(encoding="utf-8"))["models"]
        return {task: found["metrics"][found["metric"]] for task, found in model["tasks"].items()}, ""
