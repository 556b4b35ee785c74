"""The trainer's side of the Hub: a process that sends, started beside the run, and a state to go on from, fetched."""

from __future__ import annotations

import contextlib
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

from accelerate import Accelerator
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from overnight.core.console import Console
from overnight.core.processes import beside
from overnight.errors import DamagedData, InputError, Unreachable, first_line
from overnight.hub.contents import MODEL_FILES, RUN_FILES, STAGED, STATE, STATE_FILES, allowed_files, fresh
from overnight.model.checkpoint import damage
from overnight.run_dir.directory import RunDirectory
from overnight.run_dir.layout import finished_in, folder_name, saved_iterations
from overnight.run_dir.metrics import Metrics

FROM_HUB = "hub:"
FIRST_WORD = 5.0  # seconds in which, before the first iteration, it can be known whether the Hub lets us


class Dispatch:
    """`python -m overnight.hub.upload RUN`, at low priority; its lines go to the console; no step sees it fail."""

    def __init__(self, run: Path, console: Console):
        self.run = run
        self.over = False  # the run: what is owed is still sent
        self.process = beside(
            *("-m", "overnight.hub.upload", str(run)),
            environment={"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            process_group=0,  # Ctrl-C is for the trainer
        )
        self.console = console
        self.said = ""
        self.heard = threading.Event()
        self.reader = threading.Thread(target=self._repeat, daemon=True)
        self.reader.start()

    def _repeat(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said = line.rstrip()
            self.console.log(self.said)
            self.heard.set()
        self.heard.set()

    def first_word(self) -> None:
        """Wait for it, a little: what keeps everything from being sent is then said before the first iteration."""
        self.heard.wait(FIRST_WORD)

    def close(self) -> None:
        """Let it send what is owed when the run is over, and end; otherwise end at once.

        Where it gave up before, hours ago perhaps, that is said again.
        """
        assert self.process.stdin is not None
        gave_up = self.process.poll() is not None
        with contextlib.suppress(OSError):  # it has ended, and said why
            self.process.stdin.write("over\n" if self.over else "\n")
            self.process.stdin.close()
        self.process.wait()
        self.reader.join()
        if self.process.returncode < 0:
            later = f"python recipes/publish.py {self.run}"
            self.console.log(
                f"hub: sending was ended by signal {-self.process.returncode}; what is owed, this sends: {later}"
            )
        elif gave_up:
            self.console.log(self.said)


class Nothing:
    """In its place where no repository is named, and beside the main process."""

    over = False

    def first_word(self) -> None:
        """There is none."""


@contextlib.contextmanager
def sending(accelerator: Accelerator, directory: RunDirectory, console: Console) -> Iterator[Dispatch | Nothing]:
    """Send what the run finishes while the block goes on, and at its end if `over` was set."""
    if not (directory.recipe.hub.repo_id and accelerator.is_main_process):
        yield Nothing()
        return
    dispatch = Dispatch(directory.path, console)
    try:
        yield dispatch
    finally:
        dispatch.close()


def fetch_state(source: str, directory: RunDirectory) -> None:
    """Fill an empty run directory with the state and the finished models that a run has pushed.

    `source` is hub:OWNER/NAME. Raises `InputError` when there is no such state, or a run of this name is here already,
    `DamagedData` when what came is not what was saved, and `Unreachable` when the Hub stays away.
    """
    repo_id = source.removeprefix(FROM_HUB)
    if repo_id == source:
        raise InputError(f"`--resume {source}`: hub:OWNER/NAME would work")
    if directory.resumable(directory.recipe.schedule):
        raise InputError(
            f"{directory.path} holds a run already: without `--resume` it goes on; `--name NAME` starts beside it"
        )
    staged = fresh(directory.path / STAGED / "fetched")
    try:
        snapshot_download(repo_id, revision=STATE, local_dir=staged, allow_patterns=["checkpoints/*", *RUN_FILES])
        for budget in finished_in(Metrics(staged / "metrics.jsonl").records()):
            fetch_model(repo_id, budget, directory)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise InputError(f"`--resume {source}`: no state to be seen there ({first_line(error)})") from None
    except HfHubHTTPError as error:
        raise Unreachable(f"`--resume {source}`: {first_line(error)}") from None
    except ValueError as error:  # a name that the Hub would not take
        raise InputError(f"`--resume {source}`: {first_line(error)}") from None
    except Exception as error:  # httpx's transport errors, which huggingface_hub passes on
        raise Unreachable(f"`--resume {source}`: {type(error).__name__}: {first_line(error)}") from None
    place(staged, directory)


def fetch_model(repo_id: str, budget: int, directory: RunDirectory) -> None:
    """A finished model from its own branch; one that was never pushed is left out, and is trained again."""
    folder = directory.models / folder_name(budget)
    aside = fresh(directory.path / STAGED / folder_name(budget))
    try:
        snapshot_download(repo_id, revision=folder_name(budget), local_dir=aside)
    except RevisionNotFoundError:
        return
    fresh(folder)
    for name, path in allowed_files(aside, MODEL_FILES).items():
        path.rename(folder / name)


def place(staged: Path, directory: RunDirectory) -> None:
    """Move a fetched state to where a run is gone on from, once every checkpoint in it is found whole."""
    found = allowed_files(staged, STATE_FILES)
    checkpoints = [*saved_iterations(staged / "checkpoints").values()]
    for folder in (staged / "checkpoints").glob("cooldown-*"):
        checkpoints += saved_iterations(folder).values()
    for checkpoint in checkpoints:
        if (problem := damage(checkpoint)) is not None:
            raise DamagedData(f"{checkpoint.relative_to(staged)} of the Hub: {problem}")
    for name, path in found.items():
        there = directory.path / name
        there.parent.mkdir(parents=True, exist_ok=True)
        path.rename(there)
