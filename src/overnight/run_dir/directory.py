"""The run directory: who works in it, its resolved recipe and environment, its checkpoints, and metrics.jsonl."""

from __future__ import annotations

import itertools
import shlex
import uuid
from collections.abc import Collection
from pathlib import Path
from typing import Any

from filelock import FileLock

from overnight.core.files import atomic_write, entries, remove, strict_json
from overnight.core.lock import hold
from overnight.core.published import redacted, yaml_text
from overnight.core.sums import damage
from overnight.errors import InputError, listed
from overnight.recipe.identity import difference_lines, differences, grown, immutable_keys, recipe_identity
from overnight.recipe.schedule import branch_point, branch_points, decaying, goals, towards
from overnight.recipe.schema import Recipe, Schedule
from overnight.run_dir.layout import (
    CHECKPOINTS,
    ENVIRONMENT,
    MODELS,
    RECIPE,
    REWRITTEN,
    RUNS,
    cooldown_name,
    cooldowns,
    folder_name,
    read_file,
    saved_iterations,
)
from overnight.run_dir.metrics import Metrics


class RunDirectory:
    """`runs/<name>`; nothing is created before `claim`."""

    def __init__(self, recipe: Recipe, runs: Path = RUNS):
        self.path = runs / recipe.name
        self.recipe = recipe
        self.checkpoints = self.path / CHECKPOINTS
        self.models = self.path / MODELS
        self.metrics = Metrics(self.path / "metrics.jsonl")
        self.changes: list[dict[str, Any]] = []  # of the run's identity since it began: {"key", "before", "now"}
        self.run_id: str | None = None  # what its checkpoints call it, wherever the directory lies; None before `claim`
        self._lock: FileLock | None = None

    def cooldown_of(self, goal: int) -> Path:
        """The checkpoints of the decay towards a budget."""
        return self.checkpoints / cooldown_name(goal)

    def refuse_unreachable(self, goal: int, *, now: bool) -> None:
        """Raise `InputError` when the trunk has no checkpoint that the decay of `goal` begins with, and went past it.

        With `now` the trunk must have been there already.
        """
        schedule = self.recipe.schedule
        if now and schedule.kind != "wsd":
            raise InputError(f"`--cooldown {goal}` needs `schedule.kind: wsd`, whose trunk it branches off")
        trunk, point = saved_iterations(self.checkpoints), branch_point(towards(schedule, goal))
        if point in trunk or saved_iterations(self.cooldown_of(goal)) or not (now or any(i > point for i in trunk)):
            return
        share = 1 - schedule.decay_fraction
        near = [round(i / share) for i in trunk if share]
        can = [m for m in near if branch_point(towards(schedule, m)) in trunk]
        raise InputError(
            f"{goal} iterations cannot be finished: {self.checkpoints} has no checkpoint of iteration {point}, where"
            f" that decay begins; from those that are kept, {listed(can)} can"
        )

    def kept_for_ever(self, schedule: Schedule) -> set[int]:
        """Iterations of the trunk that are never pruned: there a budget that is wanted, or finished, branches off."""
        wanted = branch_points(self.recipe.schedule) | {branch_point(schedule)}
        return wanted | {branch_point(towards(schedule, m)) for m in cooldowns(self.checkpoints)}

    def refuse_another_run(self, found: dict[str, Any], allowed: Collection[str] = ()) -> None:
        """Raise `InputError` with every difference when this directory holds a run of another identity.

        `found` is what decides the run beside its recipe: the data's fingerprint and the precision of this device.
        `allowed` names keys that may differ all the same; under `wsd` the run may always become longer.
        """
        stored = self._stored_identity()
        meaning, self.changes, self.run_id = stored or ({}, [], None)
        differing = differences(meaning, recipe_identity(self.recipe) | found) if stored else []
        if useless := set(allowed) - {change["key"] for change in differing + self.changes}:
            raise InputError(f"`--allow-change {min(useless)}`: nothing to allow, that is as it was in {self.path}")
        grows = self.recipe.schedule.kind == "wsd" and grown(differing)
        free = {*allowed, *(["schedule.max_iters"] if grows else [])} - immutable_keys(self.recipe)
        if refused := [change for change in differing if change["key"] not in free]:
            raise InputError(self._refusal(refused))
        self.changes = self.changes + differing

    def _refusal(self, refused: list[dict[str, Any]]) -> str:
        keys = [change["key"] for change in refused]
        never = [key for key in keys if key in immutable_keys(self.recipe)]
        options = " ".join(f"--allow-change {shlex.quote(key)}" for key in keys)
        way_on = f"`{never[0]}` can never change" if never else f"`{options}` continues this one with the new value"
        names = (f"{self.recipe.name}-{number}" for number in itertools.count(2))
        free = next(name for name in names if not (RUNS / name).exists())
        return (
            f"{self.path} holds another run:\n{difference_lines(refused)}\n`--name {free}` starts a new one; {way_on}"
        )

    def _stored_identity(self) -> tuple[dict[str, Any], list[dict[str, Any]], str | None] | None:
        """The identity of the run here, its changes, and its id: from recipe.yaml, or without it from a checkpoint."""
        checkpoints = [path for folder in self._folders() for path in saved_iterations(folder).values()]
        whole = (path / "state.json" for path in reversed(checkpoints) if damage(path) is None)
        path = self.path / RECIPE if (self.path / RECIPE).exists() else next(whole, None)

        def identity(found: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]], str | None]:
            changes = [{key: change[key] for key in ("key", "before", "now")} for change in found.get("changes", [])]
            return dict(found["meaning"]), changes, found.get("run")

        return read_file(path, identity, REWRITTEN) if path else None

    def _folders(self) -> list[Path]:
        """The trunk's checkpoints, and those of each decay."""
        return [self.checkpoints, *cooldowns(self.checkpoints).values()]

    def lock(self, *, create: bool = False) -> None:
        """Let no other process work here until this one ends; a directory that is not there yet is left to `claim`.

        Raises `InputError` when one does, or nothing can be written.
        """
        if self._lock or not (create or self.path.exists()):
            return
        try:
            self.models.mkdir(parents=True, exist_ok=True)
            self._lock = hold(self.path, "wait for it, stop it, or take another --name")
        except OSError as error:
            raise InputError(
                f"{self.path} cannot be written to: {error.strerror} ({error.filename}); mend that, or change to"
                " another folder and type the same command there"
            ) from error

    def claim(self, found: dict[str, Any], environment: dict[str, Any]) -> None:
        """Lock the directory and write what runs here: the recipe of this session, and its environment.

        A changed identity is written down with what it was before.
        """
        self.lock(create=True)
        self.run_id = self.run_id or uuid.uuid4().hex
        now = {
            "run": self.run_id,
            "meaning": recipe_identity(self.recipe) | found,
            "changes": self.changes,
            "recipe": self.recipe.model_dump(),
        }
        atomic_write(self.path / RECIPE, yaml_text(redacted(now)))
        atomic_write(self.path / ENVIRONMENT, strict_json(redacted(environment), indent=1))

    def checkpoint(self, iteration: int, schedule: Schedule) -> Path:
        """Where the state after `iteration` belongs: to the trunk, or to the decay towards the schedule's end."""
        folder = self.cooldown_of(schedule.max_iters) if decaying(schedule, iteration) else self.checkpoints
        return folder / folder_name(iteration)

    def resumable(self, schedule: Schedule) -> list[Path]:
        """The checkpoints that a schedule can continue from, newest first: none of another decay than its own."""
        trunk = {i: path for i, path in saved_iterations(self.checkpoints).items() if not decaying(schedule, i)}
        own = saved_iterations(self.cooldown_of(schedule.max_iters))
        return [*reversed(own.values()), *reversed(trunk.values())]

    def clear_leftovers(self) -> None:
        """Remove what killed saves have left: half-written and half-deleted folders."""
        for folder in self._folders():
            for path in entries(folder):
                if path.name.startswith(".iter-") and path.suffix in (".partial", ".discarded"):
                    remove(path)

    def append(self, kind: str, iteration: int, *, cooldown: int | None = None, **values: Any) -> dict[str, Any]:
        """Add one record to metrics.jsonl and return it; `cooldown` is the milestone of the decay that it is of."""
        tokens = iteration * self.recipe.batch.tokens_per_iter
        record = {"kind": kind, "iteration": iteration, "tokens": tokens, **values}
        if cooldown is not None:
            record["cooldown"] = cooldown
        self.metrics.append(record)
        return record

    def records(self, kind: str | None = None) -> list[dict[str, Any]]:
        """The records so far, of one kind or of all."""
        return [record for record in self.metrics.records() if kind in (None, record["kind"])]

    def flat_end(self) -> int | None:
        """The budget that the run chose to end with when it was flat; None where `stop` or the goals are others now."""
        stop, trunk = self.recipe.stop, saved_iterations(self.checkpoints)
        flat = [record for record in self.records("event") if record["event"] == "flat"]
        if not stop.when_flat or not flat or flat[-1]["iteration"] not in trunk:
            return None
        same = flat[-1]["min_gain_nats"] == stop.min_gain_nats and flat[-1]["longer"] in goals(self.recipe.schedule)
        return flat[-1]["budget"] if same else None

    def forget_after(self, iteration: int, target: int) -> None:
        """Drop what was measured after `iteration` on the way to `target`: a resumed run measures it again.

        Records of other decays stay, and those of the trunk as far as its checkpoints reach.
        """
        trunk = max([iteration, *saved_iterations(self.checkpoints)])

        def wanted(record: dict[str, Any]) -> bool:
            reach = {None: trunk, target: iteration}.get(record.get("cooldown"))
            return reach is None or record["iteration"] <= reach

        self.metrics.keep(wanted)
