"""Every process that these tests start sees the ghost card, which `make ghost` builds; without it there are none."""

import os

from ghost import LIBRARY, PRELOADED

collect_ignore_glob = [] if LIBRARY.exists() else ["test_*.py"]


def pytest_collection_modifyitems(config, items) -> None:
    """Beside a ghost card, the card that the user hid from the other tests may be seen."""
    if any("ghost_card" in str(item.path) for item in items):
        os.environ.update(PRELOADED)
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
