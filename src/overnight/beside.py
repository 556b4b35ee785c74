"""Processes that work beside a run and take no part in it."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

OF_THE_GROUP = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def beside(*arguments: str, environment: dict[str, str] | None = None, **how: Any) -> subprocess.Popen[str]:
    """Start Python at low priority, outside of the run's group of processes; all that it says is on its `stdout`."""
    inherited = {key: value for key, value in os.environ.items() if key not in OF_THE_GROUP}
    return subprocess.Popen(
        ["nice", sys.executable, *arguments],
        env=inherited | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **how,
    )
