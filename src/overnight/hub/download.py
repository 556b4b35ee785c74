"""A run's state, fetched from the Hub into an empty run directory: `--resume hub:OWNER/NAME`."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

from overnight.core.published import allowed_files
from overnight.core.sums import write_sums
from overnight.errors import DamagedData, InputError, Unreachable, first_line
from overnight.hub.contents import MODEL_FILES, STATE, STATE_FILES, fresh, staging
from overnight.hub.upload import HubRepo, differing
from overnight.run_dir.directory import RunDirectory
from overnight.run_dir.layout import finished_in, folder_name
from overnight.run_dir.metrics import Metrics

FROM_HUB = "hub:"


def fetch_state(source: str, directory: RunDirectory) -> None:
    """Fill an empty run directory with the state and the finished models that a run has pushed.

    `source` is hub:OWNER/NAME. A transfer that was interrupted continues where it was (huggingface_hub's part).
    Raises `InputError` when there is no such state, or a run of this name is here already,
    `DamagedData` when what came is not what was saved, and `Unreachable` when the Hub stays away.
    """
    repo_id = source.removeprefix(FROM_HUB)
    if repo_id == source:
        raise InputError(f"`--resume {source}`: hub:OWNER/NAME would work")
    if directory.resumable(directory.recipe.schedule):
        raise InputError(
            f"{directory.path} holds a run already: without `--resume` it continues; `--name NAME` starts another"
        )
    try:
        staged = fetch(repo_id, STATE, directory, STATE_FILES)
        for target in finished_in(Metrics(staged / "metrics.jsonl").records()):
            fetch_model(repo_id, folder_name(target), directory)
    except InputError:
        raise
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise InputError(f"`--resume {source}`: no state to be seen there ({first_line(error)})") from None
    except Exception as error:  # huggingface_hub passes on httpx's transport errors, which have no class in common
        raise Unreachable(f"`--resume {source}`: {type(error).__name__}: {first_line(error)}") from None
    move(staged, STATE_FILES, directory.path)
    shutil.rmtree(staging(directory.path))


def fetch(repo_id: str, branch: str, directory: RunDirectory, names: re.Pattern[str]) -> Path:
    """A branch as it is now in a folder of its commit, so that an interrupted transfer continues; `names` are verified.

    huggingface_hub compares sizes alone, and takes what lies there already for right.
    """
    repo = HubRepo(repo_id)
    commit = repo.api.model_info(repo_id, revision=branch).sha or branch
    staged = staging(directory.path) / f"{branch}-{commit}"
    snapshot_download(repo_id, revision=commit, local_dir=staged)
    if wrong := differing(allowed_files(staged, names), repo.digests(commit)):
        shutil.rmtree(staged)
        raise DamagedData(
            f"{repo_id}, {branch}: {', '.join(wrong)} did not arrive as sent; the same command tries again"
        )
    return staged


def fetch_model(repo_id: str, name: str, directory: RunDirectory) -> None:
    """A finished model from its own branch; one that was never pushed is left out, and is trained again."""
    try:
        staged = fetch(repo_id, name, directory, MODEL_FILES)
    except RevisionNotFoundError:
        return
    folder = fresh(directory.models / name)
    move(staged, MODEL_FILES, folder)
    write_sums(folder)


def move(staged: Path, names: re.Pattern[str], folder: Path) -> None:
    """Move the files that are allowed from where they were fetched into their folder."""
    for name, path in allowed_files(staged, names).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        path.rename(folder / name)
