"""Documents to verified token shards: every file staged by itself, then put together, and named when whole.

`DIR.partial` holds the work in hand and survives whatever ends it; the same command continues from there:

    files-KEY.json  the input files, as they were found
    inputs/         files that are being fetched
    tokenizer-KEY/  the tokenizer
    stage/KEY/      a staged file (tokenize_files.py)
    whole/          the prepared folder, before it gets its name
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overnight.core.files import atomic_write, disk_full_error, refuse_dangling
from overnight.core.lock import hold, kernel_lock
from overnight.core.scripts import no_command
from overnight.data.manifest import (
    MANIFEST,
    Counts,
    Manifest,
    dtype_for,
    is_prepared,
    require_same_request,
)
from overnight.data.shards import verify
from overnight.data.tokenizer import fingerprint, load_tokenizer, load_tokenizer_of, train_tokenizer
from overnight.errors import InputError, listed
from overnight.prepare import sources
from overnight.prepare.build_shards import build_shards
from overnight.prepare.cost import require_room, require_same_text
from overnight.prepare.documents import FORMATS, REASONS, is_reserved, keyed, rows
from overnight.prepare.progress import watched
from overnight.prepare.sources import SourceFile
from overnight.prepare.tokenize_files import Job, Tally, stage_file
from overnight.prepare.workers import Task, raise_left, run_local, run_ray, submit_slurm
from overnight.recipe.schema import Data

TOKENIZER_CHARACTERS = 50_000_000
"""A tokenizer is trained on the first training documents, up to this much text."""


@dataclass(frozen=True)
class Workers:
    """Where the files are staged: `executor` is local, slurm or ray, `options` are its own."""

    executor: str = "local"
    count: int = 1
    options: dict[str, Any] | None = None


def prepare(
    data: Data, vocab_size: int, report: Callable[[str], None] = print, workers: Workers | None = None
) -> Manifest | None:
    """Write the token shards of `data` into `data.dir` and return their manifest; None when Slurm will do it.

    Equal inputs give equal bytes, whatever the workers. A folder that already holds what is asked for is verified and
    returned. Raises InputError naming the recipe key for what cannot be read, does not fit or falls short, DamagedData
    for a folder or source that is not what it should be, and Unreachable for a network that stays away.
    """
    folder = Path(data.dir)
    if is_prepared(folder):
        require_same_text(data, require_same_request(folder, data, vocab_size).inputs)
        report(f"{folder}: already prepared; verifying it")
        if _partial(folder).exists():  # killed after the folder had its name
            with _claimed(folder) as partial:
                shutil.rmtree(partial)
        return verify(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"`data.dir` is {folder}, which holds other files and no {MANIFEST}: name a new folder")
    refuse_dangling(folder)
    if folder.is_symlink() or not folder.name:  # the folder behind a link is what gets its name at the end
        folder = folder.resolve()
    workers = workers or Workers()
    with _claimed(folder) as partial, disk_full_error(partial, "data.dir"):
        job = _job(partial, folder, data, vocab_size, workers.count, report)
        if workers.executor == "slurm":
            number = _submit(job, workers)
            report(f"{folder}: handed to Slurm; it is there when job {number} has ended, and says so in {partial}/logs")
            return None
        with watched(job, report):
            _stage_all(job, workers)
        manifest = complete(job)
    train, val = (sum(record.tokens for record in side) for side in (manifest.train, manifest.val))
    report(f"{folder}: {train:,} training and {val:,} validation tokens{_left_out(manifest.counts)}")
    return manifest


def _left_out(counts: Counts) -> str:
    """What of the rows is in neither, by cause."""
    found = counts.model_dump(exclude={"reserved_unused", "after_budget"})
    listed = [f"{number:,} {cause.replace('_', ' ')}" for cause, number in found.items() if number]
    return f"; left out of the text: {', '.join(listed)} (rows that are named in {MANIFEST})" if listed else ""


def _partial(folder: Path) -> Path:
    return folder.with_name(folder.name + ".partial")


@contextmanager
def _claimed(folder: Path) -> Iterator[Path]:
    """Lend the folder of the work in hand to one process, when no worker of an earlier one is left in it."""
    partial = _partial(folder)
    partial.mkdir(parents=True, exist_ok=True)
    lock = hold(partial, "wait for it to end, or name another `data.dir`")
    try:
        for worker in partial.glob("workers/*"):
            with kernel_lock(worker):  # those of a killed process die with it
                pass
        for left in [partial / "errors", partial / "progress", *partial.glob("stage/*.partial")]:
            shutil.rmtree(left, ignore_errors=True)
        (partial / "progress").mkdir()
        yield partial
    finally:
        fetched = [path for path in partial.glob("inputs/*") if path.suffix != ".sha256"]
        if partial.exists() and not any([*fetched, *partial.glob("stage/*")]):
            shutil.rmtree(partial)  # nothing that a next try could continue
        lock.release()


def _job(partial: Path, target: Path, data: Data, vocab_size: int, workers: int, report: Callable[[str], None]) -> Job:
    """What the tasks need: the files, found and with room for what they become, and the tokenizer in the folder."""
    commit = sources.pinned_commit(data)
    files = sources.find(data, commit, report)
    require_room(partial, data, vocab_size, files, workers)
    about = [data.tokenizer, vocab_size]
    if data.tokenizer == "trained":
        about += [data.reserved_fraction, data.text_column, [file.key for file in files]]
    name = f"tokenizer-{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]}"
    if (partial / name).exists():
        tokenizer = load_tokenizer(str(partial / name))
    else:
        if data.tokenizer == "trained":
            report(f"training a tokenizer of {vocab_size:,} entries on the training documents")
            tokenizer = train_tokenizer(_tokenizer_texts(partial / "inputs", data, files), vocab_size)
        else:
            tokenizer = load_tokenizer_of(data.tokenizer, vocab_size)
        tokenizer.save_pretrained(partial / f"{name}.partial")
        (partial / f"{name}.partial").rename(partial / name)
    listed = json.dumps(files)
    key = hashlib.sha256(f"{data.model_dump_json()} {listed}".encode()).hexdigest()[:16]
    atomic_write(partial / f"files-{key}.json", listed)
    return Job(
        folder=partial.absolute(),  # tasks on a cluster may start elsewhere
        target=target.absolute(),
        data=data,
        commit=commit,
        key=key,
        tokenizer=name,
        tokenizer_sha256=fingerprint(tokenizer),
        vocab_size=vocab_size,
        eos_id=tokenizer.eos_token_id,
        dtype=dtype_for(vocab_size),
    )


def _tokenizer_texts(inputs: Path, data: Data, files: list[SourceFile]) -> Iterator[str]:
    """The first training documents, as the shards will have them."""
    seen: set[bytes] = set()
    found: Counter[str] = Counter()
    left = TOKENIZER_CHARACTERS
    for file in files:
        path, _ = sources.fetch(file, inputs)
        tally = Tally(file, path)
        for row in tally.counted(keyed(rows(path, file.form, data.text_column, file.name), seen)):
            if not is_reserved(row.key, data.reserved_fraction):
                yield row.text
                left -= len(row.text)
                if left <= 0:
                    tally.refuse_unreadable()
                    return
        found += tally.counts
    rejected = {reason: found[reason] for reason in REASONS if found[reason]}
    if found["rows"] == sum(rejected.values()):
        why = ", ".join(f"{number:,} times {reason}" for reason, number in rejected.items()) or "no row at all"
        raise InputError(
            f"`data.path` is {listed(data.path)}, where no row has a text: {why}; {FORMATS} files with one work"
        )


def _stage_all(job: Job, workers: Workers) -> None:
    """Run the task of every file; a single worker is this process."""
    tasks, logs, options = len(job.files), job.folder / "logs", workers.options or {}
    count = min(workers.count, tasks)
    if workers.executor == "ray":
        run_ray(Task(stage_file, job), tasks, count, logs, options)
    elif count > 1:
        run_local(Task(stage_file, job), tasks, count, logs, options)
    else:
        for rank in range(tasks):
            stage_file(job, rank)


def complete(job: Job, rank: int = 0) -> Manifest:
    """Make the prepared folder of what the tasks have staged, or raise what they left; on a cluster the last task."""
    raise_left(job.error(0).parent)
    manifest = build_shards(job)
    shutil.rmtree(job.folder)
    return manifest


def _submit(job: Job, workers: Workers) -> str:
    options = {"venv_path": f"{sys.prefix}/bin/activate", "workers": workers.count} | (workers.options or {})
    return submit_slurm(Task(stage_file, job), len(job.files), Task(complete, job), job.folder / "logs", options)


if __name__ == "__main__":
    sys.exit(no_command("prepare"))
