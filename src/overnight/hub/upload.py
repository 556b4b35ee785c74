"""Publishing a run: what the Hub lacks of it, one commit a branch, verified by the Hub's own listing.

`python -m overnight.hub.upload RUN` does it once, and may be done again at any time: what is missing follows from the
run directory and the Hub alone, so an upload that was killed leaves nothing to repair. Large files that are there are
not sent twice (huggingface_hub and the Hub compare SHA-256), and a commit is seen whole or not at all.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from json import JSONDecodeError
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import get_session
from huggingface_hub.utils.sha import git_hash

from overnight.core.console import outlets
from overnight.core.files import of_this_machine, sha256
from overnight.errors import (
    EXIT_INPUT,
    EXIT_INTERRUPTED,
    DamagedData,
    InputError,
    Unreachable,
    first_line,
    refused_by_system,
    script_command,
)
from overnight.hub.contents import Commit, commits, linked
from overnight.recipe.schema import Recipe
from overnight.run_dir.layout import finished, folder_name, recipe_of

FIRST_WAIT, LONGEST_WAIT = 2.0, 300.0  # seconds between two tries; doubled each time, half of it by chance
SILENCE = 120.0  # seconds without a byte after which a request has failed; huggingface_hub itself would wait for ever

Log = Callable[[str], None]
Result = TypeVar("Result")


class NotAsSent(Exception):
    """What arrived is not what was sent."""


@dataclass
class HubRepo:
    """A model repository on the Hub."""

    repo_id: str
    private: bool = True  # where it is made
    api: HfApi = field(default_factory=HfApi)

    def open(self) -> None:
        """Make the repository where there is none; `InputError` where nothing can be sent from this machine."""
        if is_offline_mode():
            raise InputError("HF_HUB_OFFLINE is set, so nothing is sent")
        if get_token() is None:
            raise InputError("no token is set, so nothing is sent; `hf auth login` or HF_TOKEN would work")
        self.repo_id = self.api.create_repo(self.repo_id, private=self.private, exist_ok=True).repo_id  # with its owner

    def digests(self, branch: str) -> dict[str, str]:
        """The digests of a branch's files as the Hub has them: SHA-256 of a large file, git's SHA-1 of a small one."""
        try:  # list_repo_tree would do, but takes no timeout
            info = self.api.model_info(self.repo_id, revision=branch, files_metadata=True, timeout=SILENCE)
        except (RevisionNotFoundError, RepositoryNotFoundError):
            return {}
        return {e.rfilename: e.lfs.sha256 if e.lfs else e.blob_id or "" for e in info.siblings or []}

    def push(self, commit: Commit, files: dict[str, Path]) -> None:
        """Send these files of a commit; `NotAsSent` unless the listing then shows every byte of them."""
        if commit.branch != "main":
            self.api.create_branch(self.repo_id, branch=commit.branch, exist_ok=True)
        operations: list = [CommitOperationAdd(name, path) for name, path in files.items()]
        if commit.replaces:
            gone = self.digests(commit.branch).keys() - files.keys()
            operations += [CommitOperationDelete(name) for name in gone if commit.replaces.fullmatch(name)]
        self.api.create_commit(self.repo_id, operations, commit_message=commit.message, revision=commit.branch)
        if wrong := differing(files, self.digests(commit.branch)):
            raise NotAsSent(f"{self.repo_id}, {commit.branch}: {', '.join(wrong)} did not arrive as sent")

    def mark(self, tag: str, branch: str) -> None:
        """Have a tag mean a branch as it is, whatever it meant before."""
        with suppress(RevisionNotFoundError):
            self.api.delete_tag(self.repo_id, tag=tag)
        self.api.create_tag(self.repo_id, tag=tag, revision=branch)


def differing(files: dict[str, Path], digests: dict[str, str]) -> list[str]:
    """The names of those local files whose digest the Hub does not have: SHA-256 where it is that, or git's SHA-1."""

    def digest(name: str) -> str:
        return sha256(files[name]) if len(digests[name]) == 64 else git_hash(files[name].read_bytes())

    return [name for name in sorted(files) if name not in digests or digest(name) != digests[name]]


def refusal(error: Exception) -> str | None:
    """Why another try would not help, in a line; None where it may."""
    if isinstance(error, ValueError) and not isinstance(error, JSONDecodeError):
        return f"the Hub does not take it: {first_line(error)}"  # of the card, which the Hub has checked
    code = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if code in (401, 403):
        return f"the Hub refuses ({code}): {first_line(error)}; a token with write access would work"
    if code in (400, 422):  # the request itself is wrong; the same again would be too
        return f"the Hub does not take it ({code}): {first_line(error)}"
    return None


def with_exponential_backoff(act: Callable[[], Result], *, patience: float, log: Log) -> Result:
    """What `act` returns, tried again after anything that may pass, for `patience` seconds after the first failure.

    huggingface_hub tries only a part of its requests again, and for seconds. Raises `InputError` where another try
    would not help, and `Unreachable` when the patience is used up.
    """
    pause, problem, deadline = FIRST_WAIT, "", None
    while True:
        get_session().timeout = SILENCE  # a new one may have been made after an error
        try:
            return act()
        except InputError:
            raise
        except Exception as error:  # httpx's transport errors are of neither huggingface_hub's classes nor OSError
            if (why := refusal(error)) is not None:
                raise InputError(why) from None
            if of_this_machine(error):
                raise refused_by_system(error) from None
            last, problem = problem, f"{type(error).__name__}: {first_line(error)}"
        deadline = deadline or time.monotonic() + patience
        left = deadline - time.monotonic()
        if left <= 0:
            raise Unreachable(problem)
        if problem != last:
            log(f"hub: {problem}; trying again")
        time.sleep(min(left, pause * (0.5 + random.random() / 2)))
        pause = min(2 * pause, LONGEST_WAIT)


def publish(run: Path, recipe: Recipe, log: Log, *, checkpoints: bool = False) -> None:
    """Send what the Hub lacks of a run: finished models, and with `checkpoints` what there is of the unfinished one.

    Raises `InputError` where the Hub refuses, and `Unreachable` where it stays away.
    """
    repo = HubRepo(recipe.hub.repo_id or "", recipe.hub.private)
    attempt = partial(with_exponential_backoff, patience=60 * recipe.hub.patience_minutes, log=log)
    attempt(repo.open)
    for commit in commits(run, recipe, repo.repo_id, checkpoints=checkpoints):
        if differing(commit.files, attempt(partial(repo.digests, commit.branch))):
            attempt(partial(repo.push, commit, commit.files | commit.report()))
            log(f"hub: {repo.repo_id}, {commit.branch}: {commit.message}, verified")
        if commit.tag and differing(commit.files, attempt(partial(repo.digests, commit.tag))):
            attempt(partial(repo.mark, commit.tag, commit.branch))
    left = [folder_name(target) for target in finished(run) if linked(run, target)]
    but = f" but {', '.join(left)}: links are never sent" if left else ""
    log(f"hub: {repo.repo_id}, {'private' if repo.private else 'public'}, holds every finished model of {run}{but}")


def main() -> int:
    """What the trainer starts: 0 when all is there, 75 to try again, 2 when refused; the last line says why."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--checkpoints", action="store_true")
    options = parser.parse_args()
    outlets()
    log: Log = partial(print, flush=True)
    try:
        publish(options.run, recipe_of(options.run), log, checkpoints=options.checkpoints)
    except (InputError, OSError) as caught:
        error = caught if isinstance(caught, InputError) else refused_by_system(caught)
        log(f"hub: {error}. What is still missing, this sends: {script_command('publish.py', options.run)}")
        return EXIT_INTERRUPTED if isinstance(error, Unreachable | DamagedData) else EXIT_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
