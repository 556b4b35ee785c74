"""`manifest.json`, which makes a folder of token shards a prepared one: what its tokens are, and every file's sum."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, model_validator

from overnight.core.files import sha256, sync, within
from overnight.core.published import redacted
from overnight.errors import DamagedData, InputError, listed
from overnight.recipe.schema import Data, Recipe

MANIFEST, OWN_SUM = "manifest.json", "sha256"
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
    """The tokenizer by the name the recipe gave, and `tokenizer.fingerprint` of the one saved in the folder.

    `files` are the SHA-256 of what was saved there, by name; an older version did not keep them.
    """

    name: str
    sha256: str
    files: dict[str, str] | None = None


class SourceRecord(ShardRecord):
    """What the recipe named; `commit` is what a Hub dataset's revision meant. Of `adopted` tokens what was said of them
    when they were adopted, which may be nothing."""

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

    @model_validator(mode="after")
    def _counts_agree(self) -> Manifest:
        """What is said twice is said alike; only the sums of shards stand against a change of both."""
        size = little_endian(self.dtype).itemsize
        for record in (*self.val, *self.train):
            if record.tokens * size != record.bytes:
                raise ValueError(f"{record.path} cannot hold {record.tokens} tokens of {size} bytes in {record.bytes}")
        if self.dtype != dtype_for(self.vocab_size) or not 0 <= self.eos_id < self.vocab_size:
            raise ValueError(f"no vocabulary of {self.vocab_size} has {self.dtype} and the end of text {self.eos_id}")
        return self

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


def named_file(folder: Path, name: str) -> Path:
    """A file of a prepared folder by its name in the manifest; `DamagedData` where that leads out of the folder."""
    return within(folder / MANIFEST, name)


def is_prepared(folder: Path) -> bool:
    """Whether the folder's shards are all there: the manifest is written last."""
    return (folder / MANIFEST).exists()


def read_manifest(folder: Path) -> Manifest:
    """Read `manifest.json`. Raises InputError when there is none and DamagedData when it is not one."""
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_bytes())
        said = content.pop(OWN_SUM, None)  # an older version wrote none
        manifest = Manifest.model_validate_json(json.dumps(content))
    except FileNotFoundError:
        raise InputError(f"`data.dir` is {folder}: no {MANIFEST} there; prepare.py makes it") from None
    except (ValueError, AttributeError, TypeError) as error:
        raise DamagedData(f"{path} is not a manifest of format 1: {error}") from error
    if said not in (None, _sum_of(content)):
        raise DamagedData(f"{path} differs from the checksum that it was written with; prepare.py makes it anew")
    return manifest


def _sum_of(content: dict[str, Any]) -> str:
    """SHA-256 of a manifest as it was parsed, without its own sum: the same in a version that knows more keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def ordered_path(data: Data) -> str | list[str] | None:
    """`data.path`, a list in the order in which its files are read."""
    return sorted(data.path) if isinstance(data.path, list) else data.path


def require_same_request(folder: Path, data: Data, vocab_size: int) -> Manifest:
    """The manifest of a prepared folder; raises InputError with every key in which it is not what is asked for.

    Of adopted tokens only the tokenizer counts: what a recipe says of their text has no bearing on them.
    """
    manifest = read_manifest(folder)
    held = {"data.tokenizer": manifest.tokenizer.name, "model.vocab_size": manifest.vocab_size}
    asked = {"data.tokenizer": data.tokenizer, "model.vocab_size": vocab_size}
    if manifest.split.rule != "adopted":
        source = manifest.source.model_dump(include=SOURCE_KEYS)
        source["path"] = Data(path=source["path"]).path  # `~` as recipes have it, and older manifests have not
        said = redacted(source) | manifest.split.model_dump(include=SPLIT_KEYS)
        wanted = data.model_dump(include=SOURCE_KEYS | SPLIT_KEYS) | {"path": redacted(ordered_path(data))}
        held |= {f"data.{key}": said[key] for key in said}
        asked |= {f"data.{key}": wanted[key] for key in said}
    problems = [
        f"`{key}` is {listed(asked[key])}, but {folder / MANIFEST} names {listed(held[key])}"
        for key in asked
        if asked[key] != held[key]
    ]
    if problems:
        raise InputError([*problems, f"`data.dir` is {folder}: name a new folder, or go back to those values"])
    return manifest


def as_prepared(recipe: Recipe, manifest: Manifest) -> Recipe:
    """The recipe with what its prepared folder says of the data's origin, which is all that anybody is told of it."""
    told = manifest.source.model_dump(include={"source", "path", "files", "revision"})
    told |= {"revision": manifest.source.commit or told["revision"], "license": manifest.source.licence}
    if manifest.split.rule != "adopted":
        told["license"] = told["license"] or recipe.data.license
    else:
        told |= {"val_tokens": manifest.split.val_tokens, "train_tokens": None, "download_gb": None}
        if Path(str(told["path"])).is_absolute():  # where they lay, as older versions wrote
            told["path"] = None
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=told)})


def with_prepared_data(recipe: Recipe) -> tuple[Recipe, int | None]:
    """The recipe `as_prepared` and the training tokens that are there; while they are not, as it is and asks for.

    Raises InputError where the folder was prepared for something else.
    """
    folder = Path(recipe.data.dir)
    if not is_prepared(folder):
        return recipe, recipe.data.train_tokens
    manifest = require_same_request(folder, recipe.data, recipe.model.vocab_size)
    return as_prepared(recipe, manifest), sum(record.tokens for record in manifest.train)


def name_prepared(whole: Path, manifest: Manifest, folder: Path) -> Manifest:
    """Write the manifest into `whole`, wait until all of it is on the disk, and give it its name, `folder`.

    It gets the sums of the tokenizer's files, and its own. Returns it as it then is.
    """
    content = redacted(manifest.model_dump())
    content["tokenizer"]["files"] = {path.name: sha256(path) for path in sorted((whole / "tokenizer").iterdir())}
    content[OWN_SUM] = _sum_of(content)
    (whole / MANIFEST).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for path in (whole, *whole.rglob("*")):
        sync(path)
    whole.rename(folder)
    sync(folder.parent)
    return read_manifest(folder)
