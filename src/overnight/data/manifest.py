"""`manifest.json`, which makes a folder of token shards a prepared one: what its tokens are, and every file's sum."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from overnight.core.files import sync
from overnight.errors import DamagedData, InputError
from overnight.recipe.schema import Data

MANIFEST = "manifest.json"
DType = Literal["uint16", "uint32"]
SOURCE_KEYS = {"source", "path", "files", "revision", "text_column"}
SPLIT_KEYS = {"reserved_fraction", "val_tokens", "train_tokens"}
"""With the tokenizer and the vocabulary, what a prepared folder must agree in to serve a recipe."""


class ShardRecord(BaseModel):
    """Strict and closed: a manifest of another version is refused, not guessed at."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class FileRecord(ShardRecord):
    """What a shard must be: `path` inside the folder, sizes, and the SHA-256 of the tokens and of the index."""

    path: str
    tokens: int
    documents: int
    bytes: int
    sha256: str
    index_sha256: str


class TokenizerRecord(ShardRecord):
    """The tokenizer by the name the recipe gave, and `tokenizer.fingerprint` of the one saved in the folder."""

    name: str
    sha256: str


class SourceRecord(ShardRecord):
    """What the recipe named; `commit` is what a Hub dataset's revision meant."""

    source: str
    path: str | list[str] | None
    files: str | None
    revision: str | None
    commit: str | None
    text_column: str
    licence: str | None


class InputRecord(ShardRecord):
    """An input file as it was read: size and SHA-256, rows, and of the documents in them number, characters, UTF-8
    bytes. `rejected` names rows that were not used, at most 100, and why."""

    name: str
    bytes: int
    sha256: str
    rows: int
    documents: int
    characters: int
    text_bytes: int
    rejected: list[str]


class SplitRule(ShardRecord):
    """How documents came to a side, and the budgets asked for. Sides that came from elsewhere are "adopted": whether
    a text stands on both was not checked."""

    rule: Literal["sha256-nfc-whitespace", "adopted"] = "sha256-nfc-whitespace"
    leakage: Literal["none", "not checked"] = "none"
    reserved_fraction: float | None
    val_tokens: int
    train_tokens: int | None


class Counts(ShardRecord):
    """What was read and written nowhere: exact duplicates, reserved documents validation did not need, whitespace
    only, rows that are no UTF-8 or JSON, rows without a text, rows that are too long, and training documents after
    `train_tokens`."""

    duplicates: int
    reserved_unused: int
    empty: int
    unreadable: int
    missing: int = 0
    too_long: int
    after_budget: int


class Manifest(ShardRecord):
    """The content of `manifest.json`. `inputs` are in the order in which their documents were written; files that
    `train_tokens` made needless are not among them."""

    format: Literal[1] = 1
    tokenizer: TokenizerRecord
    vocab_size: int
    eos_id: int
    dtype: DType
    source: SourceRecord
    inputs: list[InputRecord]
    split: SplitRule
    val: list[FileRecord]
    train: list[FileRecord]
    counts: Counts

    @property
    def text_sha256(self) -> str:
        """SHA-256 of the input: of the one file, or of the sums of several, in order, as text with a newline each."""
        sums = [record.sha256 for record in self.inputs]
        together = "".join(f"{each}\n" for each in sums)
        return sums[0] if len(sums) == 1 else hashlib.sha256(together.encode()).hexdigest()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what defines the data a model sees: tokenizer and ordered files. Goes into checkpoints."""
        defining = {"format", "vocab_size", "eos_id", "dtype", "val", "train"}
        content = self.model_dump(include=defining) | {"tokenizer": self.tokenizer.sha256}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def dtype_for(vocab_size: int) -> DType:
    """Return the smallest token type of the format that holds ids below `vocab_size`."""
    return "uint16" if vocab_size <= 65_536 else "uint32"


def little_endian(dtype: DType) -> np.dtype[Any]:
    """Return the numpy type of the tokens on disk."""
    return np.dtype(dtype).newbyteorder("<")


def narrowed(ids: np.ndarray, vocab_size: int, name: object) -> np.ndarray:
    """Token ids in the type on disk. Raises ValueError when one is not in [0, vocab_size): it would become another."""
    if len(ids) and (ids.min() < 0 or ids.max() >= vocab_size):
        raise ValueError(f"{name}: has an id outside [0, {vocab_size})")
    return ids.astype(little_endian(dtype_for(vocab_size)), copy=False)


def is_prepared(folder: Path) -> bool:
    """Whether the folder's shards are all there: the manifest is written last."""
    return (folder / MANIFEST).exists()


def read_manifest(folder: Path) -> Manifest:
    """Read `manifest.json`. Raises InputError when there is none and DamagedData when it is not one."""
    path = folder / MANIFEST
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"`data.dir` is {folder}: no {MANIFEST} there; prepare.py makes it") from None
    except ValidationError as error:
        raise DamagedData(f"{path} is not a manifest of format 1: {error}") from error


def ordered_path(data: Data) -> str | list[str] | None:
    """`data.path`, a list in the order in which its files are read."""
    return sorted(data.path) if isinstance(data.path, list) else data.path


def require_same_request(folder: Path, data: Data, vocab_size: int) -> None:
    """Raise InputError with every key in which a prepared folder is not what is asked for; an adopted one is."""
    manifest = read_manifest(folder)
    if manifest.split.rule == "adopted":
        return  # what the recipe says of text and split has no bearing on it
    source = manifest.source.model_dump(include=SOURCE_KEYS)
    source["path"] = Data(path=source["path"]).path  # `~` as recipes have it, and older manifests have not
    held = source | manifest.split.model_dump(include=SPLIT_KEYS)
    held = {f"data.{key}": value for key, value in held.items()}
    held |= {"data.tokenizer": manifest.tokenizer.name, "model.vocab_size": manifest.vocab_size}
    asked = data.model_dump(include=SOURCE_KEYS | SPLIT_KEYS) | {"path": ordered_path(data)}
    asked = {f"data.{key}": value for key, value in asked.items()}
    asked |= {"data.tokenizer": data.tokenizer, "model.vocab_size": vocab_size}
    problems = [
        f"`{key}` is {asked[key]}, but {folder} was prepared with {held[key]}"
        for key in asked
        if asked[key] != held[key]
    ]
    if problems:
        raise InputError([*problems, f"`data.dir` is {folder}: name a new folder, or go back to those values"])


def name_prepared(whole: Path, manifest: Manifest, folder: Path) -> None:
    """Write the manifest into `whole`, wait until all of it is on the disk, and give it its name, `folder`."""
    (whole / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    for path in (whole, *whole.rglob("*")):
        sync(path)
    whole.rename(folder)
    sync(folder.parent)
