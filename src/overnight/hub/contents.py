"""What of a run belongs on the Hub, and on which branch: files by name, from a list of names that are allowed.

Nothing else is ever sent, whatever lies in the run directory: no keys, no pickles, no links to elsewhere.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from overnight.core.files import atomic_write, entries, remove
from overnight.core.published import copy_for_others
from overnight.core.sums import damage
from overnight.errors import DamagedData
from overnight.recipe.schema import Recipe
from overnight.report.model_card import CARD, CURVE, METRICS, RECIPE, report, unfinished_card
from overnight.run_dir.layout import (
    CHECKPOINTS,
    cooldowns,
    evaluation_of,
    finished,
    folder_name,
    iteration_of,
    read_file,
    refuse_damaged_model,
    refuse_misplaced,
    saved_iterations,
)

MODEL_FILES = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json"
    r"|merges\.txt|model\.safetensors"
)
REPORT_FILES = re.compile("|".join(map(re.escape, (CARD, RECIPE, METRICS, CURVE))))
EVALUATION_FILES = re.compile(r"results\.json|comparison\.md|against-[A-Za-z0-9._-]+\.png")
TRIES = 5  # to stage a checkpoint before it is removed for a newer one
RUN_FILES = ("recipe.yaml", "environment.json", "metrics.jsonl", "night.json")  # of a state, beside its checkpoints
STATE_FILES = re.compile(
    "|".join(map(re.escape, RUN_FILES))
    + r"|checkpoints/(cooldown-\d+/)?iter-\d+/(model\.safetensors|optimizer\.safetensors|state\.json|SHA256SUMS)"
)
STATE = "state"  # a branch, as CHECKPOINTS is
ANY = re.compile(r"[^/]+")
STAGED = ".hub"  # in a run directory: copies and links of what is being sent, so that pruning takes nothing away


@dataclass(frozen=True)
class Commit:
    """One commit on a branch. Files are given by their path in the repository."""

    branch: str
    message: str
    files: dict[str, Path]  # which never change once they are there
    report: Callable[[], dict[str, Path]] = dict  # a card and what it shows, made when it is sent
    tag: str | None = None
    replaces: re.Pattern[str] | None = None  # files of earlier commits that go, unless they are sent again


def commits(run: Path, recipe: Recipe, repo_id: str, *, checkpoints: bool) -> list[Commit]:
    """All that belongs on the Hub, in the order in which it is sent; with `checkpoints`, of the unfinished run too.

    The state comes last, since it tells of finished models without which it could not be continued.
    """
    unfinished = []
    if checkpoints:  # staged before the finished models are looked for: it tells of none that is not among them
        unfinished = [settled(run, lambda: newest_weights(run, recipe, repo_id))]
        unfinished += [settled(run, lambda: exact_state(run))] if recipe.hub.push_state else []
    return [*finished_models(run, recipe, repo_id), *(commit for commit in unfinished if commit)]


def settled(run: Path, make: Callable[[], Commit | None]) -> Commit | None:
    """What `make` stages of the newest checkpoint; anew where the run has removed one meanwhile, at last nothing."""
    for _ in range(TRIES):
        before = [
            path for folder in (run / CHECKPOINTS, *cooldowns(run / CHECKPOINTS).values()) for path in entries(folder)
        ]
        try:
            return make()
        except (DamagedData, FileNotFoundError):
            if all(path.exists() for path in before):
                raise
    return None


def finished_models(run: Path, recipe: Recipe, repo_id: str) -> list[Commit]:
    """A branch for each finished model, and `main` for the one with the lowest validation loss, which comes last."""
    losses = {target: end["val_loss"] for target, end in finished(run).items() if not linked(run, target)}
    models = {target: finished_model(run, recipe, repo_id, target, loss) for target, loss in losses.items()}
    if not models:
        return []
    best = models[min(losses, key=lambda target: (losses[target], -target))]
    return [*models.values(), replace(best, branch="main", tag=None)]


def linked(run: Path, target: int) -> bool:
    """Whether a finished model lies behind a link, and so is never sent."""
    return (run / "models").is_symlink() or (run / "models" / folder_name(target)).is_symlink()


def finished_model(run: Path, recipe: Recipe, repo_id: str, target: int, loss: float) -> Commit:
    """One finished model, with its evaluation where there is one."""
    name, last = folder_name(target), recipe.schedule.max_iters
    refuse_damaged_model(run / "models" / name)
    scored = allowed_files(evaluation_of(run / "models" / name), EVALUATION_FILES)
    staged = staging(run) / name
    return Commit(
        branch=name,
        message=f"{target:,} iterations, validation loss {loss:.4f}",
        files=allowed_files(run / "models" / name, MODEL_FILES)
        | {f"evaluation/{path}": copy_for_others(file, staged / path) for path, file in scored.items()},
        report=lambda: allowed_files(report(run, target, repo_id), REPORT_FILES),
        tag=f"final-{last:06d}" if target == last else None,
    )


def newest_weights(run: Path, recipe: Recipe, repo_id: str) -> Commit | None:
    """The newest weights of the trunk, before any decay, as a model that loads; None while there are none."""
    from overnight.model.unannealed import write_model  # and with it torch, which nothing else here needs

    trunk = own_checkpoints(run / CHECKPOINTS)
    if not trunk:
        return None
    iteration, checkpoint = max(trunk.items())
    refuse_damaged(checkpoint)
    folder = fresh(staging(run) / CHECKPOINTS)
    write_model(checkpoint, recipe, folder)
    atomic_write(folder / CARD, unfinished_card(recipe, iteration, repo_id))
    files = allowed_files(folder, MODEL_FILES)
    return Commit(CHECKPOINTS, f"{iteration:,} iterations, not annealed", files, lambda: {CARD: folder / CARD})


def exact_state(run: Path) -> Commit | None:
    """The exact state to continue from elsewhere: the newest checkpoint of the trunk, and of a decay that is newer."""
    trunk = own_checkpoints(run / CHECKPOINTS)
    decays = [own_checkpoints(folder) for folder in cooldowns(run / CHECKPOINTS).values()]
    newest = [max(found.items())[1] for found in (trunk, *decays) if found]
    if not newest:
        return None
    last_trunk = max(trunk, default=-1)
    chosen = [path for path in newest if path.parent.name == CHECKPOINTS or iteration_of(path) > last_trunk]
    staged = fresh(staging(run) / STATE)
    for path in chosen:  # as hard links: a checkpoint's files are never changed, only removed
        there = staged / path.relative_to(run)
        there.mkdir(parents=True)
        for name, file in allowed_files(path, ANY).items():
            try:
                os.link(file, there / name, follow_symlinks=False)
            except FileNotFoundError:  # pruned by now
                raise
            except OSError:  # a file system without hard links
                shutil.copyfile(file, there / name, follow_symlinks=False)
        refuse_damaged(there)
    for name in RUN_FILES:
        if (run / name).is_file() and not (run / name).is_symlink():
            copy_for_others(run / name, staged / name)
    message = f"the state after {max(map(iteration_of, chosen)):,} iterations"
    return Commit(STATE, message, allowed_files(staged, STATE_FILES), replaces=STATE_FILES)


def own_checkpoints(folder: Path) -> dict[int, Path]:
    """The checkpoints in a folder by iteration, but for those that were moved away with a link in their place."""
    behind_link = folder.is_symlink() or folder.parent.is_symlink()
    return {i: path for i, path in saved_iterations(folder).items() if not (behind_link or path.is_symlink())}


def refuse_damaged(checkpoint: Path) -> None:
    """Raise `DamagedData` for a checkpoint that is not whole, `InputError` for one that is not in its place."""
    if (reason := damage(checkpoint, ["state.json", "model.safetensors"])) is not None:
        raise DamagedData(f"{checkpoint} is damaged: {reason}; it is not sent")
    refuse_misplaced(checkpoint, read_file(checkpoint / "state.json", dict, "it is not sent"))


def allowed_files(folder: Path, names: re.Pattern[str]) -> dict[str, Path]:
    """The files of a folder whose path in it is allowed; never a link, nor anything behind one."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink())
    found = {path.relative_to(folder).as_posix(): path for path in paths}  # rglob enters no folder that is a link
    return {name: path for name, path in found.items() if names.fullmatch(name) and not folder.is_symlink()}


def staging(run: Path) -> Path:
    """Where what is sent or fetched is put together; a link there goes: what lies behind it is not ours to empty."""
    if (run / STAGED).is_symlink():
        (run / STAGED).unlink()
    return run / STAGED


def fresh(folder: Path) -> Path:
    """An empty folder."""
    remove(folder)
    folder.mkdir(parents=True)
    return folder
