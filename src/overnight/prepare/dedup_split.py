"""Which documents of a set are used, and on which side: a function of their keys and the recipe's budgets alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from overnight.data.manifest import InputRecord
from overnight.prepare.documents import first_training_key
from overnight.recipe.schema import Data

DOCUMENT = np.dtype([("high", ">u8"), ("low", ">u8"), ("tokens", "<u4")])
"""A document's key, in two halves that sort as its bytes do, and its tokens, the end of text included."""


class Stage(NamedTuple):
    """A staged file, opened."""

    folder: Path
    record: InputRecord
    counts: dict[str, int]
    documents: np.ndarray


def read_stage(folder: Path) -> Stage | None:
    """Open a staged file; None while there is none."""
    try:
        about = json.loads((folder / "stage.json").read_bytes())
    except FileNotFoundError:
        return None
    documents = np.fromfile(folder / "documents.bin", DOCUMENT)
    return Stage(folder, InputRecord.model_validate(about["record"]), about["counts"], documents)


class Allotment(NamedTuple):
    """For each file in order, by document number: those that train, in order, and those that validate, in key order.

    `training` and `reserved` count the documents of these files that survived, used or not; `duplicates` are those
    across the files. `enough` says that both budgets are met.
    """

    train: list[np.ndarray]
    val: list[np.ndarray]
    training: int
    reserved: int
    duplicates: int
    enough: bool


def allot(documents: list[np.ndarray], data: Data) -> Allotment:
    """Say what becomes of the documents of a set's first files; files that the budgets make needless are left out.

    Equal keys: the first survives. Reserved documents never train: validation takes those of the first file in the
    order of their keys, and those of a later file only when the files before it did not suffice.
    """
    every = np.concatenate([*documents, np.empty(0, DOCUMENT)])
    high, low = every["high"].astype(np.uint64), every["low"].astype(np.uint64)
    first = _first_of_equal(high, low)
    reserved = first & _reserved(high, data)
    training = first & ~reserved
    train, val = [], []
    train_left, val_left = data.train_tokens or np.inf, data.val_tokens
    stop = 0
    for file in documents:
        start, stop = stop, stop + len(file)
        kept = np.flatnonzero(training[start:stop]) if train_left > 0 else np.empty(0, np.int64)
        held = np.flatnonzero(reserved[start:stop]) if val_left > 0 else np.empty(0, np.int64)
        train.append(kept)
        val.append(held[np.lexsort((file["low"][held], file["high"][held]))])
        train_left -= int(file["tokens"][kept].sum())
        val_left -= int(file["tokens"][held].sum())
        if train_left <= 0 and val_left <= 0:
            break
    counts = {name: int(marks[:stop].sum()) for name, marks in (("training", training), ("reserved", reserved))}
    duplicates = int((~first[:stop]).sum())
    return Allotment(train, val, **counts, duplicates=duplicates, enough=train_left <= 0 and val_left <= 0)


class Budgets:
    """Whether the first files of a set meet both budgets; each is read as it is staged, and few of them twice."""

    def __init__(self, data: Data, stage_of: Callable[[int], Path]):
        self.data, self.stage_of = data, stage_of
        self.files = self.train = self.val = 0  # read so far, and the tokens in them, those of equal texts too
        self.next_look = 0
        self.enough: int | None = None  # so many files are

    def met_before(self, rank: int) -> bool:
        """Whether those before number `rank`, as far as they are staged without a gap, meet both."""
        while self.data.train_tokens and self.enough is None and self.files < rank:
            stage = read_stage(self.stage_of(self.files))
            if stage is None:
                break
            self._add(stage.documents)
        return self.enough is not None and self.enough <= rank

    def _add(self, documents: np.ndarray) -> None:
        """Count a file; equal texts are looked for only where the budgets would be met without that."""
        self.files += 1
        reserved = int(documents["tokens"][_reserved(documents["high"], self.data)].sum())
        self.val += reserved
        self.train += int(documents["tokens"].sum()) - reserved
        if self.files < self.next_look or self.train < (self.data.train_tokens or 0) or self.val < self.data.val_tokens:
            return
        stages = (read_stage(self.stage_of(number)) for number in range(self.files))
        if allot([stage.documents for stage in stages if stage], self.data).enough:
            self.enough = self.files
        self.next_look = self.files + self.files // 10 + 1  # so that all looks together take a multiple of one


def _reserved(high: np.ndarray, data: Data) -> np.ndarray:
    """Marks the documents that never train, by the first halves of their keys."""
    border = first_training_key(data.reserved_fraction)
    return high.astype(np.uint64) <= border - 1 if border else np.zeros(len(high), bool)


def _first_of_equal(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Marks the documents before which no other has the same key."""
    order = np.lexsort((low, high))  # stable: of equal keys the earliest comes first
    again = (high[order][1:] == high[order][:-1]) & (low[order][1:] == low[order][:-1])
    first = np.ones(len(order), bool)
    first[order[1:][again]] = False
    return first
