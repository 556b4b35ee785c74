"""What a person sees while data is prepared: files, documents, tokens, speed and the time left.

The tasks write how far they are into files, wherever they run; a thread reads these, and notices a worker that was
killed, which the pool that started it would wait for without end.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console as RichConsole

from overnight.core.console import Progress, count
from overnight.core.processes import handled
from overnight.errors import Unreachable
from overnight.prepare.dedup_split import read_stage
from overnight.prepare.tokenize_files import Job

SECONDS_BETWEEN_LOOKS = 0.5


@contextmanager
def watched(job: Job, report: Callable[[str], None]) -> Iterator[None]:
    """Tell every ten seconds, and on a terminal all the time, how far the tasks of `job` are.

    Raises Unreachable when a worker was killed: what it had finished is kept, so the same command continues. One that
    ends because this command was asked to end was not.
    """
    watcher = Watcher(job, report)
    thread = threading.Thread(target=watcher.watch, daemon=True)

    def interrupt(number: int, frame: object) -> None:
        watcher.stopped.set()
        raise KeyboardInterrupt

    thread.start()
    try:
        with handled(interrupt):
            yield
    except KeyboardInterrupt:
        if watcher.killed is None:
            raise
        raise Unreachable(
            f"worker {watcher.killed} was killed, perhaps for want of memory; what it had finished is kept: the same "
            "command continues from there, and takes less memory with fewer --workers"
        ) from None
    finally:
        watcher.stopped.set()
        thread.join()
        watcher.look()
        report(watcher.line())


class Watcher:
    """Adds up what the tasks report."""

    def __init__(self, job: Job, report: Callable[[str], None]):
        self.job = job
        self.stopped = threading.Event()
        self.dead: set[int] = set()  # workers that were gone at an earlier look
        self.killed: int | None = None
        self.waiting = {job.stage(rank).name: rank for rank in range(len(job.files))}
        self.done: dict[int, Counter[str]] = {}  # of files that are staged
        self.look()
        self.before = self._sums()  # by an earlier command
        self.progress = Progress(RichConsole(), report, done=self.before["share"])

    def watch(self) -> None:
        """Look until `stopped`."""
        while not self.stopped.wait(SECONDS_BETWEEN_LOOKS):
            self.look()
            self.progress.update(self._sums()["share"], self.line())
        self.progress.stop()

    def line(self) -> str:
        """Files, documents, tokens, speed and time left."""
        now = self._sums()
        speed = (now["text_bytes"] - self.before["text_bytes"]) / self.progress.seconds()
        return (
            f"{len(self.done)}/{len(self.job.files)} files, {count(now['documents'])} documents, "
            f"{count(now['tokens'])} tokens, {speed / 1e6:.1f} MB/s, {self.progress.left(now['share'])} left"
        )

    def look(self) -> None:
        """Read what the tasks have written."""
        for name in self.waiting.keys() & {path.name for path in self.job.stage(0).parent.glob("*")}:
            if (stage := read_stage(self.job.stage(rank := self.waiting.pop(name)))) is not None:
                self.done[rank] = Counter(stage.counts) + Counter(tokens=int(stage.documents["tokens"].sum()))
        self.running: dict[int, dict] = {}
        for path in self.job.report(0).parent.glob("*.json"):
            if (rank := int(path.stem)) not in self.done:
                self._look_at(rank, path)

    def _look_at(self, rank: int, path: Path) -> None:
        try:
            self.running[rank] = json.loads(path.read_bytes())
        except FileNotFoundError:  # its task has just ended
            return
        pid, here = self.running[rank]["pid"], self.running[rank]["host"] == platform.node()
        if not here or _lives(pid) or not path.exists():
            return
        if pid not in self.dead:  # a Ctrl-C reaches the workers too: this process hears of it before the next look
            self.dead.add(pid)
        elif self.killed is None and not self.stopped.is_set():
            self.killed = pid
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)  # which waits for the pool

    def _sums(self) -> Counter[str]:
        sizes = [file.size for file in self.job.files]
        sums: Counter = Counter()
        for each in (*self.done.values(), *self.running.values()):
            sums.update({name: each[name] for name in ("documents", "tokens", "text_bytes")})
        read = sum(sizes[rank] for rank in self.done)
        read += sum(sizes[rank] * about["share"] for rank, about in self.running.items())
        sums["share"] = read / max(sum(sizes), 1)
        return sums


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
