"""What every test stands on: no network but loopback, here and in child processes, and no settings of the user."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NO_NETWORK = ROOT / "tests" / "no_network"

# Before anything imports huggingface_hub or accelerate, which read these once.
sys.path.insert(0, str(NO_NETWORK))
sys.modules.pop("sitecustomize", None)  # a distribution's own has done its work
import sitecustomize  # noqa: E402, F401

os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(NO_NETWORK), os.environ.get("PYTHONPATH")]))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="overnight-tests-hf-")  # no token and no accelerate configuration there
os.environ.pop("HF_TOKEN", None)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Leave nothing behind."""
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


@pytest.fixture
def root() -> Path:
    """The project's folder."""
    return ROOT
