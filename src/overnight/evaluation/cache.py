"""Answers that outlive the process: a batch of requests that a model once answered is read, not computed again.

They lie in `$XDG_CACHE_HOME/overnight/evaluation/<fingerprint>/rank<n>.jsonl`, one batch a line, found again by the
SHA-256 of the batch's tokens, and read only where the line has the SHA-256 that it was written with. The fingerprint is
that of weights, configuration, tokenizer and arithmetic, so nothing else can change an answer, whatever the tasks are
called.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from overnight.evaluation.progress import Meter
from overnight.evaluation.scoring import Answer, Scorer, Tree


def cache_folder() -> Path:
    """Where answers and losses of all models are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "overnight" / "evaluation"


class ResponseCache:
    """The answers of one model; each process adds to a file of its own and knows what all had added before."""

    def __init__(self, folder: Path, rank: int = 0):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"rank{rank}.jsonl"
        self.known: dict[str, list[Answer]] = {}
        for path in sorted(folder.glob("rank*.jsonl")):
            for line in path.read_bytes().splitlines():
                try:
                    key, answers, said = json.loads(line)
                    if said == sum_of(key, answers):
                        self.known[key] = [Answer(*answer) for answer in answers]
                except (ValueError, TypeError):  # a crash left it unfinished, or an older version kept no sum
                    continue

    def add(self, key: str, answers: list[Answer]) -> None:
        """Keep the answers to the batch of that key, in one write, so that a kill leaves all of them or none."""
        line = json.dumps([key, answers, sum_of(key, answers)])
        descriptor = os.open(self.path, os.O_CREAT | os.O_APPEND | os.O_WRONLY | os.O_NOFOLLOW, 0o644)
        try:
            os.write(descriptor, f"\n{line}\n".encode())  # the first newline ends a line that a crash left unfinished
        finally:
            os.close(descriptor)
        self.known[key] = answers


def sum_of(key: str, answers: list[Answer]) -> str:
    """SHA-256 of a line's key and answers, which the line ends with."""
    return hashlib.sha256(json.dumps([key, answers]).encode()).hexdigest()


def key_of(trees: list[Tree]) -> str:
    """SHA-256 of the tokens of a batch's requests, in their order."""
    return hashlib.sha256(json.dumps([tree.requests for tree in trees]).encode()).hexdigest()


def answer(batches: list[list[Tree]], scorer: Scorer, kept: ResponseCache, meter: Meter) -> dict[int, Answer]:
    """The answer to each request by its number; a batch that was answered before is not computed again."""
    answers: dict[int, Answer] = {}
    for trees in batches:
        key = key_of(trees)
        if key not in kept.known:
            kept.add(key, scorer.score(trees))
        numbers = [number for tree in trees for number in tree.numbers]
        answers |= zip(numbers, kept.known[key], strict=True)
        meter.advance(sum(map(len, trees)), len(numbers))
    return answers
