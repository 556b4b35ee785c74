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

from overnight.core.files import atomic_write, remove
from overnight.core.published import allowed_files, copy_for_others
from overnight.core.sums import damage
from overnight.errors import DamagedData
from overnight.recipe.schema import Recipe
from overnight.report.model_card import CARD, REPORT_FILES, copy_evaluation, report, unfinished_card
from overnight.run_dir.layout import (
    CHECKPOINTS,
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
TRIES = 5  # to stage a checkpoint before it is removed for a newer one
RUN_FILES = ("recipe.yaml", "environment.json", "metrics.jsonl", "night.json")  # of a state, beside its checkpoints
STATE_FILES = re.compile(
    "|".join(map(re.escape, RUN_FILES))
    + r"|checkpoints/(cooldown-\d{6,}/)?iter-\d{6,}/(model\.safetensors|optimizer\.safetensors|state\.json|SHA256SUMS)"
)
STATE = "state"  # a branch, as CHECKPOINTS is
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
    unfinished: list[Commit | None] = []
    # Staged before the finished models are looked for: it tells of none that is not among them.
    if checkpoints and (state := exact_state(run)):
        unfinished = [newest_weights(run, recipe, repo_id), state if recipe.hub.push_state else None]
    return [*finished_models(run, recipe, repo_id), *filter(None, unfinished)]


def finished_models(run: Path, recipe: Recipe, repo_id: str) -> list[Commit]:
    """A branch for each finished model, and `main` for the one with the lowest validation loss, which comes last."""
    losses = {target: end["val_loss"] for target, end in finished(run).items() if not linked(run, target)}
    if not losses:
        return []
    models = {target: finished_model(run, recipe, repo_id, target, loss) for target, loss in losses.items()}
    best = models[min(losses, key=lambda target: (losses[target], -target))]
    return [*models.values(), replace(best, branch="main", tag=None)]


def linked(run: Path, target: int) -> bool:
    """Whether a finished model lies behind a link, and so is never sent."""
    return (run / "models").is_symlink() or (run / "models" / folder_name(target)).is_symlink()


def finished_model(run: Path, recipe: Recipe, repo_id: str, target: int, loss: float) -> Commit:
    """One finished model, with its evaluation where there is one."""
    name, last = folder_name(target), recipe.schedule.max_iters
    refuse_damaged_model(run / "models" / name)
    return Commit(
        branch=name,
        message=f"{target:,} iterations, validation loss {loss:.4f}",
        files=allowed_files(run / "models" / name, MODEL_FILES) | copy_evaluation(run, target),
        report=lambda: allowed_files(report(run, target, repo_id), REPORT_FILES),
        tag=f"final-{last:06d}" if target == last else None,
    )


def exact_state(run: Path) -> Commit | None:
    """The exact state to continue from elsewhere, staged anew where the run removes a checkpoint meanwhile."""
    for _ in range(TRIES):
        chosen = newest_checkpoints(run)
        try:
            return staged_state(run, chosen) if chosen else None
        except (DamagedData, FileNotFoundError):
            if all(path.exists() for path in chosen):
                raise
    return None


def newest_checkpoints(run: Path) -> list[Path]:
    """The newest checkpoint of the trunk, and of each decay that is newer; none that lies behind a link."""
    folders = {path.parent for path in allowed_files(run, STATE_FILES).values()} - {run}
    newest = {folder.parent: folder for folder in sorted(folders, key=iteration_of)}
    trunk = newest.get(run / CHECKPOINTS)
    return [each for each in newest.values() if trunk in (None, each) or iteration_of(each) > iteration_of(trunk)]


def staged_state(run: Path, checkpoints: list[Path]) -> Commit:
    """The files of these checkpoints, as hard links, since they are only ever removed, and copies of the run's own."""
    staged = fresh(staging(run) / STATE)
    for name, file in allowed_files(run, STATE_FILES).items():
        if file.parent == run:
            copy_for_others(file, staged / name)
        elif file.parent in checkpoints:
            link_or_copy(file, staged / name)
    for checkpoint in checkpoints:
        refuse_damaged(staged / checkpoint.relative_to(run))
    message = f"the state after {max(map(iteration_of, checkpoints)):,} iterations"
    return Commit(STATE, message, allowed_files(staged, STATE_FILES), replaces=STATE_FILES)


def newest_weights(run: Path, recipe: Recipe, repo_id: str) -> Commit | None:
    """The trunk's weights in the staged state, before any decay, as a model that loads; None while there are none."""
    from overnight.model.unannealed import write_model  # and with it torch, which nothing else here needs

    trunk = saved_iterations(staging(run) / STATE / CHECKPOINTS)
    if not trunk:
        return None
    iteration, checkpoint = max(trunk.items())
    folder = fresh(staging(run) / CHECKPOINTS)
    write_model(checkpoint, recipe, folder)
    atomic_write(folder / CARD, unfinished_card(recipe, iteration, repo_id))
    files = allowed_files(folder, MODEL_FILES)
    return Commit(CHECKPOINTS, f"{iteration:,} iterations, not annealed", files, lambda: {CARD: folder / CARD})


def refuse_damaged(checkpoint: Path) -> None:
    """Raise `DamagedData` for a checkpoint that is not whole, `InputError` for one that is not in its place."""
    if (reason := damage(checkpoint, ["state.json", "model.safetensors"])) is not None:
        raise DamagedData(f"{checkpoint} is damaged: {reason}; it is not sent")
    refuse_misplaced(checkpoint, read_file(checkpoint / "state.json", dict, "it is not sent"))


def link_or_copy(file: Path, there: Path) -> None:
    """A hard link to a file, or a copy where the file system has none; FileNotFoundError where it is gone by now."""
    there.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(file, there, follow_symlinks=False)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(file, there, follow_symlinks=False)


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
