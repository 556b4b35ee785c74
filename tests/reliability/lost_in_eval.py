"""`recipes/eval.py` whose device is lost after CALLS batches, for tests alone."""

import os
import runpy
import sys
from pathlib import Path

import torch

from overnight.evaluation.scoring import Scorer

EVAL = Path(__file__).resolve().parents[2] / "recipes" / "eval.py"


def lose_device_after(calls: int) -> None:
    """Have every batch behind the first `calls` fail as on a device that is lost."""
    real, made = Scorer.score, []

    def score(self, trees):
        made.append(1)
        if len(made) > calls:
            raise torch.AcceleratorError("CUDA error: unspecified launch failure")
        return real(self, trees)

    Scorer.score = score


if __name__ == "__main__":
    lose_device_after(int(os.environ.pop("CALLS")))
    sys.argv[0] = str(EVAL)
    runpy.run_path(str(EVAL), run_name="__main__")
