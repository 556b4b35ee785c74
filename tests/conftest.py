"""What every test stands on: no network but loopback, here and in child processes, and no settings of the user."""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where the invariants of the model run")


def pytest_configure(config: pytest.Config) -> None:
    """Promises of equal bits are a CPU's, so the tests run there even beside a GPU, and so do their processes."""
    if config.getoption("--device") == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_unconfigure(config: pytest.Config) -> None:
    """Leave nothing behind."""
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


@pytest.fixture(scope="session")
def prepared_workplace(tmp_path_factory) -> Path:
    """What all modules' `workplace` is made of."""
    from runs import make_workplace  # takes seconds to import

    return make_workplace(tmp_path_factory.mktemp("workplace"))


@pytest.fixture(scope="module")
def workplace(prepared_workplace: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder with text, shards and `tiny.yaml`, for all tests that train; the names of runs are a module's own."""
    yield prepared_workplace
    used = prepared_workplace / request.module.__name__
    for run in prepared_workplace.glob("runs/*"):
        if run.name != "tiny":
            used.mkdir(exist_ok=True)
            run.rename(used / run.name)


@pytest.fixture(scope="session")
def undisturbed(prepared_workplace: Path) -> str:
    """One whole run of `tiny.yaml`, started as a user does, that others are compared with; what it printed."""
    from runs import train_in_a_fresh_process

    result = train_in_a_fresh_process(prepared_workplace, "tiny.yaml")
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture
def in_process(workplace: Path, monkeypatch) -> Path:
    """Lets a test call the trainer in its own process; the finished model's check by another process is left out."""
    from accelerate.state import AcceleratorState, GradientState

    from overnight.model import export

    monkeypatch.chdir(workplace)
    monkeypatch.setattr(export, "verify_export", lambda *arguments: None)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return workplace


@pytest.fixture
def device(pytestconfig: pytest.Config):
    """Where the model of a test computes: `--device`."""
    import torch

    return torch.device(pytestconfig.getoption("--device"))


@pytest.fixture
def root() -> Path:
    """The project's folder."""
    return ROOT


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory) -> Path:
    """GPT-2's own tokenizer in a folder, as a recipe names one."""
    from texts import gpt2

    folder = tmp_path_factory.mktemp("gpt2")
    gpt2().save_pretrained(folder)
    return folder
