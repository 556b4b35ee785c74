"""`recipes/train.py` on a screen that has ASCII's characters alone, for tests alone."""

import runpy
import sys
from pathlib import Path

TRAIN = Path(__file__).resolve().parents[2] / "recipes" / "train.py"

if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="ascii", errors="strict")
    sys.argv[0] = str(TRAIN)
    runpy.run_path(str(TRAIN), run_name="__main__")
