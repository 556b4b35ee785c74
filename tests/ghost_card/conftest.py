"""Every process that these tests start sees the ghost card; they run in the environment of `make ghost` alone."""

import os
import sys
from pathlib import Path

from ghost import PRELOADED

collect_ignore_glob = [] if Path(sys.prefix).name == ".venv-ghost" else ["test_*.py"]


def pytest_collection_modifyitems(config, items) -> None:
    """Beside a ghost card, the card that the user hid from the other tests may be seen."""
    if any("ghost_card" in str(item.path) for item in items):
        os.environ.update(PRELOADED)
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
