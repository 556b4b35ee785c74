"""Runs a script on the ghost card: `python on_card.py SCRIPT ARGUMENTS`, in the environment that ghost.py makes.

GHOST_COMPUTES says what the host computes: "all", "small" tensors alone, or nothing. With TRITON_INTERPRET=1 the
kernels that torch.compile makes run in Triton's interpreter. GHOST_FAULT="FAULT@PHASE:N" arms a fault when the phase
begins for the Nth time.
"""

from __future__ import annotations

import os
import runpy
import sys
import warnings
from pathlib import Path

SMALL = 4096  # elements: counters, flags, losses


def main(script: str) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    warnings.filterwarnings("ignore", message=".*overriding a previously registered kernel")
    warnings.filterwarnings("ignore", message=".*Overriding a previously registered kernel")
    computes = os.environ.get("GHOST_COMPUTES")
    if computes:
        import operators

        library = operators.install(None if computes == "all" else SMALL)
        assert library is not None
    if computes == "small":
        import unwritten

        unwritten.install()
    if os.environ.get("TRITON_INTERPRET") == "1":
        import interpreter

        interpreter.install()
    if fault := os.environ.get("GHOST_FAULT"):
        import faults

        faults.arm(fault)
    sys.path[0] = str(Path(script).resolve().parent)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    main(sys.argv[0])
