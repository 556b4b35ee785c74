"""Parcels to the Hub: pushed as one commit each, verified by the listing of what arrived, tried again until they do.

`python -m overnight.hub.upload RUN` is the process that a run with `hub.repo_id` starts beside itself, so that no
iteration waits for a network. What is owed follows from the run directory and the Hub's listing alone: a session
that was killed in the middle of an upload leaves nothing to repair. It ends when its standard input does.
"""

from __future__ import annotations

import hashlib
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from json import JSONDecodeError
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session
from pydantic import ValidationError

from overnight.core.extras import require
from overnight.core.files import sha256
from overnight.errors import EXIT_INTERRUPTED, InputError, first_line
from overnight.hub.contents import CHECKPOINTS, STATE, Parcel, exact_state, finished_models, newest_weights
from overnight.recipe.schema import Hub, Recipe
from overnight.report.model_card import reported
from overnight.run_dir.layout import recipe_of

FIRST_WAIT, LONGEST_WAIT = 2.0, 300.0  # seconds between two tries; doubled each time, half of it by chance
POLL = 5.0  # seconds between two looks at the run directory
SILENCE = 120.0  # seconds without a byte after which a request has failed; huggingface_hub itself would wait for ever
GRACE = 5.0  # seconds after the patience at a run's end in which a request may still come back
REFUSALS = (401, 403)
NEVER = (400, 422)  # the request itself is wrong; the same again would be too

Log = Callable[[str], None]


class Refused(Exception):
    """The Hub does not let us: another try would not help. One line that says what would."""


class Differs(Exception):
    """What arrived is not what was sent."""


@dataclass
class Shelf:
    """A model repository on the Hub, seen through what this process has verified there."""

    repo_id: str
    private: bool
    api: HfApi = field(default_factory=HfApi)
    there: dict[str, dict[str, str]] = field(default_factory=dict)  # digests that were verified, by branch and file
    hashed: dict[tuple[str, int, int], str] = field(default_factory=dict)  # of local files, by path, size and time

    def open(self) -> None:
        """Make sure that the repository is there and ours to write; `Refused` where that is known not to be."""
        if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON"):
            raise Refused("HF_HUB_OFFLINE is set, so nothing is sent")
        try:
            me = self.api.whoami()
        except LocalTokenNotFoundError:
            raise Refused("no token is set, so nothing is sent; `hf auth login` or HF_TOKEN would work") from None
        name, _, rest = self.repo_id.rpartition("/")
        mine = [me["name"], *(org["name"] for org in me.get("orgs", []))]
        self.repo_id = f"{name or me['name']}/{rest}"
        if name and name not in mine:
            raise Refused(
                f"{self.repo_id} belongs to {name}, the token to {me['name']}: {me['name']}/{rest} would work"
            )
        if me.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise Refused("the token may only read; one with write access would work (`hf auth login`)")
        self.api.create_repo(self.repo_id, private=self.private, exist_ok=True)

    def owes(self, parcel: Parcel) -> bool:
        """Whether the branch lacks anything of a parcel, or holds other bytes where they may not change."""
        there = self.there.get(parcel.revision)
        if there is None:
            there = self.there[parcel.revision] = self.listed(parcel.revision)
        return any(there.get(name) != self.digest(path, there.get(name)) for name, path in parcel.files.items())

    def listed(self, revision: str) -> dict[str, str]:
        """The digests of a branch's files as the Hub has them: SHA-256 of a large file, git's SHA-1 of a small one."""
        try:  # list_repo_tree would do, but takes no timeout
            found = self.api.model_info(self.repo_id, revision=revision, files_metadata=True, timeout=SILENCE)
        except (RevisionNotFoundError, RepositoryNotFoundError):
            return {}
        return {e.rfilename: e.lfs.sha256 if e.lfs else e.blob_id or "" for e in found.siblings or []}

    def digest(self, path: Path, like: str | None) -> str:
        """The digest of a local file in the form that `like` has: SHA-256 for 64 digits, git's otherwise."""
        stat = path.stat()
        key = (f"{path} {len(like or '')}", stat.st_size, stat.st_mtime_ns)
        if key not in self.hashed:
            self.hashed[key] = sha256(path) if len(like or "") == 64 else git_sha1(path)
        return self.hashed[key]

    def push(self, parcel: Parcel) -> None:
        """One commit with a parcel on its branch; `Differs` unless the listing then shows every byte of it."""
        if parcel.revision != "main":
            self.api.create_branch(self.repo_id, branch=parcel.revision, exist_ok=True)
        before = self.listed(parcel.revision)
        files = parcel.files | parcel.beside()
        operations: list = [CommitOperationAdd(name, path) for name, path in files.items()]
        gone = [name for name in before if parcel.replaces and parcel.replaces.fullmatch(name)]
        operations += [CommitOperationDelete(name) for name in gone if name not in files]
        digests = {name: (git_sha1(path), sha256(path)) for name, path in files.items()}
        self.api.create_commit(self.repo_id, operations, commit_message=parcel.title, revision=parcel.revision)
        there = self.listed(parcel.revision)
        wrong = [name for name, both in digests.items() if there.get(name) not in both]
        if wrong:
            raise Differs(f"{self.repo_id}, {parcel.revision}: {', '.join(sorted(wrong))} did not arrive as sent")
        if parcel.tag:
            self.api.create_tag(self.repo_id, tag=parcel.tag, revision=parcel.revision, exist_ok=True)
        self.there[parcel.revision] = there


def git_sha1(path: Path) -> str:
    """The name that git gives to a file's content."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def refusal(error: Exception) -> str | None:
    """Why another try would not help, in a line; None where it may."""
    if isinstance(error, Refused):
        return str(error)
    if isinstance(error, ValueError) and not isinstance(error, JSONDecodeError):
        return f"the Hub does not take it: {first_line(error)}"  # of a card, which huggingface_hub has checked there
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        code = error.response.status_code
        if code in REFUSALS:
            return f"the Hub refuses ({code}): {first_line(error)}; a token with write access would work"
        if code in NEVER:
            return f"the Hub does not take it ({code}): {first_line(error)}"
    return None


def patiently(act: Callable[[], None], log: Log, wait: Callable[[float], bool]) -> str | None:
    """Do `act`, again after anything that may pass; returns None, or why there was no time left for it.

    `wait` waits some seconds and says whether there is still time. Raises `Refused` where another try would not help.
    """
    pause, problem = FIRST_WAIT, ""
    while True:
        get_session().timeout = SILENCE  # a new one may have been made after an error
        try:
            act()
        except Exception as error:  # httpx's transport errors are of neither huggingface_hub's classes nor OSError
            if (why := refusal(error)) is not None:
                raise Refused(why) from None
            now = f"{type(error).__name__}: {first_line(error)}"
            if now != problem:
                log(f"hub: {now}; trying again")
            problem = now
        else:
            return None
        if not wait(pause * (0.5 + random.random() / 2)):
            return problem
        pause = min(2 * pause, LONGEST_WAIT)


class Courier:
    """Sends what a run owes, until its standard input says that the run is over."""

    def __init__(self, run: Path, recipe: Recipe, log: Log):
        self.run, self.recipe, self.log = run, recipe, log
        self.shelf = Shelf(recipe.hub.repo_id or "", recipe.hub.private)
        self.over = threading.Event()  # the run
        self.left_since: float | None = None
        self.sent_at: float | None = None  # when checkpoints and state were sent last

    def wait(self, seconds: float) -> bool:
        """Wait, less long when the run ends meanwhile; False when the patience after its end is used up."""
        if not self.over.wait(seconds):
            return True
        if self.left_since is None:
            self.left_since = time.monotonic()
        left = self.left_since + 60 * self.recipe.hub.patience_minutes - time.monotonic()
        time.sleep(max(0.0, min(seconds, left)))
        return left > 0

    def open(self) -> str | None:
        """Make the repository ready; why it cannot be, otherwise."""
        return patiently(self.shelf.open, self.log, self.wait)

    def parcels(self, *, rhythm: bool) -> Iterator[tuple[str, Callable[[], Parcel | None]]]:
        """Everything that may be owed, by its branch; with `rhythm` what is sent every `hub.every_hours` too.

        What is made of checkpoints is made when it is sent, and anew for another try: they may have been pruned.
        """
        repo_id = self.shelf.repo_id
        for parcel in finished_models(self.run, self.recipe, repo_id):
            yield parcel.revision, lambda parcel=parcel: parcel  # type: ignore[misc]
        if rhythm:
            yield CHECKPOINTS, partial(newest_weights, self.run, self.recipe, repo_id)
        if rhythm and self.recipe.hub.push_state:
            yield STATE, self.state_with_its_models

    def deliver(self) -> list[str]:
        """Send until the run is over and everything is there; returns what is still owed, in words.

        Raises `Refused` as soon as the Hub does.
        """
        if (why := self.open()) is not None:
            return [why]
        self.log(f"hub: finished models go to {self.shelf.repo_id}, {'private' if self.shelf.private else 'public'}")
        started = time.monotonic()
        while True:
            over = self.over.is_set()
            since = time.monotonic() - (self.sent_at or started)
            rhythm = not over and since > 3600 * self.recipe.hub.every_hours
            owed = self.send(rhythm=rhythm)
            if rhythm:
                self.sent_at = time.monotonic()
            if over:
                return owed
            self.over.wait(POLL)

    def send(self, *, rhythm: bool) -> list[str]:
        """Push what is owed now; returns what could not be, in words."""
        owed = []
        for revision, make in self.parcels(rhythm=rhythm):
            if (why := patiently(partial(self.push, make), self.log, self.wait)) is not None:
                owed.append(f"{revision} ({why})")
        return owed

    def state_with_its_models(self) -> Parcel | None:
        """The exact state, once every model that it tells of is there: without one it could not be gone on with."""
        state = exact_state(self.run)
        for parcel in finished_models(self.run, self.recipe, self.shelf.repo_id):
            self.push(lambda parcel=parcel: parcel)  # type: ignore[misc]
        return state

    def push(self, make: Callable[[], Parcel | None]) -> None:
        """Push a parcel unless all of it is there."""
        parcel = make()
        if parcel is not None and self.shelf.owes(parcel):
            self.shelf.push(parcel)
            self.log(f"hub: {self.shelf.repo_id}, {parcel.revision}: {parcel.title}, verified")


def publish(run: Path, repo_id: str | None, *, public: bool, dry_run: bool) -> int:
    """Send what a run owes, once; returns the exit code: 0 all of it is there, 75 try again later.

    Raises `InputError` where nothing can be sent: no repository, no finished model, a Hub that refuses.
    """
    recipe = recipe_of(run)
    chosen = recipe.hub.model_dump() | {"repo_id": repo_id or recipe.hub.repo_id}
    chosen["private"] = recipe.hub.private and not public
    try:
        recipe = recipe.model_copy(update={"hub": Hub.model_validate(chosen)})
    except ValidationError as error:
        raise InputError(f"`--repo-id {repo_id}`: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None
    if recipe.hub.repo_id is None:
        raise InputError("no repository: neither `--repo-id OWNER/NAME` nor the recipe's `hub.repo_id` names one")
    reported(run)  # or raise
    require("figures", "the curve on a card")
    if dry_run:
        for parcel in finished_models(run, recipe, recipe.hub.repo_id):
            print(f"{recipe.hub.repo_id}, {parcel.revision}: {parcel.title}")
            for name, path in sorted((parcel.files | parcel.beside()).items()):
                print(f"  {name:<32}{path.stat().st_size:>13,} bytes")
        return 0
    courier = Courier(run, recipe, lambda line: print(line, flush=True))
    courier.over.set()
    try:
        late = courier.open()
        owed = [late] if late is not None else courier.send(rhythm=False)
    except Refused as refused:
        raise InputError(str(refused)) from None
    if owed:
        print(f"still owed: {'; '.join(owed)}; the same command tries again")
        return EXIT_INTERRUPTED
    print(f"{courier.shelf.repo_id} holds every finished model of {run}")
    return 0


def main(run: Path) -> int:
    """Serve one run until standard input ends; 0 when all of it is there."""

    def log(line: str) -> None:
        print(line, flush=True)

    courier = Courier(run, recipe_of(run), log)

    def listen() -> None:
        if sys.stdin.readline().strip() != "over":  # the trainer was killed: what is owed, the next session sends
            os._exit(0)
        courier.over.set()
        time.sleep(60 * courier.recipe.hub.patience_minutes + GRACE)
        log(f"hub: no answer. {later}")
        os._exit(1)

    later = f"What is still owed, this sends: python recipes/publish.py {run}"
    threading.Thread(target=listen, daemon=True).start()
    try:
        owed = courier.deliver()
    except Refused as refused:
        log(f"hub: {refused}. {later}")
        return 1
    if owed:
        log(f"hub: still owed: {'; '.join(owed)}. {later}")
    return bool(owed)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
