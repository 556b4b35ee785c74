"""Token files that others wrote, made trainable where they lie: nothing is copied but a validation set to be cut.

Taken are nanoGPT's `train.bin` and `val.bin` (raw uint16, data/openwebtext/prepare.py there), and what datatrove's
DocumentTokenizer writes: `.ds` files in `train/` and `val/`, or in one folder, whose last file then validates.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
from transformers import PreTrainedTokenizerFast

from overnight.core import files
from overnight.data.manifest import (
    Counts,
    FileRecord,
    Manifest,
    SourceRecord,
    SplitRule,
    TokenizerRecord,
    dtype_for,
    is_prepared,
    little_endian,
    name_prepared,
)
from overnight.data.shards import TOKENS_AT_ONCE, SplitWriter, verify
from overnight.data.tokenizer import fingerprint, load_tokenizer_of
from overnight.errors import DamagedData, InputError
from overnight.recipe.schema import Data

MAGIC, HEADER = (20240520, 20240801), 1024
"""What llm.c's token files begin with (dev/data/data_common.py there), and the bytes before their tokens."""
SHOWN = 16  # tokens of each side, by which a user sees that they are what they should be
FEW = 50_000  # validation tokens


def adopt(
    origin: Path,
    data: Data,
    vocab_size: int,
    report: Callable[[str], None] = print,
    *,
    said: Mapping[str, str] = MappingProxyType({}),
    dry_run: bool = False,
) -> Manifest | None:
    """Make `data.dir` a prepared folder whose shards are links to the token files in `origin`; returns its manifest.

    `said` is what the user says of these tokens: `path`, `files`, `revision` and `license`, as in a recipe's `data`;
    what stands in the recipe may be of other ones. Whether a text stands on both sides is not checked.

    Raises InputError for files that are not there or do not fit the tokenizer, and DamagedData for an index that does
    not fit its tokens.
    """
    folder = Path(data.dir)
    sides = find_sides(origin)
    if data.tokenizer == "trained":
        raise InputError("`data.tokenizer` is trained, and these tokens have one already: name it")
    there = [path.resolve() for path in sorted(folder.glob("train/*.ds"))]
    if is_prepared(folder) and there == [path.resolve() for path in sides["train"]]:
        report(f"{folder}: already adopted from {origin}; verifying it")
        manifest = verify(folder)
        _refuse_other_words(folder, manifest, said, _val_tokens(sides["val"], data, vocab_size))
        report(f"{folder}: as it was adopted")
        return manifest
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"`data.dir` is {folder}, which is not empty: name a new folder")
    tokenizer = load_tokenizer_of(data.tokenizer, vocab_size)
    for side, paths in sides.items():
        head = _tokens(paths[0], vocab_size, whole=False)[:SHOWN]
        report(f"{side}: {', '.join(map(str, paths))}, which begins {tokenizer.decode(head)!r}")
    if dry_run:
        return None
    partial = folder.with_name(folder.name + ".adopting")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        manifest = name_prepared(partial, _written(partial, sides, data, tokenizer, said), folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    train, val = (sum(record.tokens for record in records) for records in (manifest.train, manifest.val))
    documents = sum(record.documents for record in manifest.train)
    report(
        f"{folder}: {train:,} training tokens of {documents:,} documents and {val:,} validation tokens adopted from"
        f" {origin}; leakage between the sides: not checked"
    )
    if documents == len(manifest.train):
        report(f"WARNING: no end of text ({tokenizer.eos_token}) between documents: are they this tokenizer's?")
    if val < FEW:
        report(f"WARNING: the loss on {val:,} validation tokens is noisy; {FEW:,} or more would be better")
    return manifest


def _val_tokens(origins: list[Path], data: Data, vocab_size: int) -> int:
    """Tokens of a validation side that is made of these files."""
    size = little_endian(dtype_for(vocab_size)).itemsize
    return min(data.val_tokens, sum(path.stat().st_size for path in origins) // size)


def _refuse_other_words(folder: Path, manifest: Manifest, said: Mapping[str, str], val_tokens: int) -> None:
    """Raise InputError where the folder's manifest says something else of the tokens than is said now."""
    held = manifest.source.model_dump() | {"license": manifest.source.licence, "val_tokens": manifest.split.val_tokens}
    asked = {**said, "val_tokens": val_tokens}
    other = [f"`data.{key}` is {now}, but {folder} says {held[key]}" for key, now in asked.items() if now != held[key]]
    if other:
        raise InputError([*other, f"remove {folder}, whose training tokens are links, or name a new folder"])


def _written(
    partial: Path,
    sides: dict[str, list[Path]],
    data: Data,
    tokenizer: PreTrainedTokenizerFast,
    said: Mapping[str, str],
) -> Manifest:
    """Fill the folder `partial` with tokenizer, links and validation set; returns what its manifest will say."""
    vocab_size, eos_id = len(tokenizer), tokenizer.eos_token_id
    tokenizer.save_pretrained(partial / "tokenizer")
    train = _linked(sides["train"], partial / "train", vocab_size, eos_id)
    val = _validation(sides["val"], partial, data.val_tokens, vocab_size, eos_id)
    return Manifest(
        tokenizer=TokenizerRecord(name=data.tokenizer, sha256=fingerprint(tokenizer)),
        vocab_size=vocab_size,
        eos_id=eos_id,
        dtype=dtype_for(vocab_size),
        source=SourceRecord(
            source="adopted",
            **{key: said.get(key) for key in ("path", "files", "revision")},
            commit=None,
            text_column=data.text_column,
            licence=said.get("license"),
        ),
        inputs=[],
        split=SplitRule(
            rule="adopted",
            leakage="not checked",
            reserved_fraction=None,
            val_tokens=sum(record.tokens for record in val),
            train_tokens=None,
        ),
        val=val,
        train=train,
        counts=Counts(**dict.fromkeys(Counts.model_fields, 0)),
    )


def find_sides(origin: Path) -> dict[str, list[Path]]:
    """The token files of each side. Raises InputError when `origin` is neither of the two layouts."""
    if (origin / "train.bin").is_file() and (origin / "val.bin").is_file():
        return {"train": [origin / "train.bin"], "val": [origin / "val.bin"]}
    sides = {side: sorted((origin / side).glob("*.ds")) for side in ("train", "val")}
    if all(sides.values()):
        return sides
    together = sorted(origin.glob("*.ds"))
    if len(together) > 1:
        return {"train": together[:-1], "val": together[-1:]}
    found = "a file" if origin.is_file() else "no such folder"
    if origin.is_dir():
        found = ", ".join(sorted(path.name for path in origin.iterdir())[:8])
    raise InputError(
        f"`--adopt` is {origin}: {found or 'an empty folder'}; train.bin and val.bin, train/*.ds and val/*.ds, or two "
        "*.ds files would work"
    )


def _linked(origins: list[Path], folder: Path, vocab_size: int, eos_id: int) -> list[FileRecord]:
    """Link the token files into `folder`, each with its index: the one that came with it, or made by scanning."""
    folder.mkdir(parents=True)
    records = []
    for number, origin in enumerate(origins):
        tokens = _tokens(origin, vocab_size)
        came = origin.with_name(origin.name + ".index")
        ends = np.fromfile(came, "<u8") if came.is_file() else _ends(tokens, eos_id)
        if not len(ends) or ends[-1] != len(tokens) or (np.diff(ends.astype(np.int64)) <= 0).any():
            raise DamagedData(
                f"{came}: does not rise to the {len(tokens):,} tokens of {origin.name}; remove or remake it"
            )
        path, index = folder / f"{number:05d}.ds", folder / f"{number:05d}.ds.index"
        path.symlink_to(origin.absolute())
        index.write_bytes(ends.astype("<u8").tobytes())
        records.append(
            FileRecord(
                path=f"{folder.name}/{path.name}",
                tokens=len(tokens),
                documents=len(ends),
                bytes=tokens.nbytes,
                sha256=files.sha256(origin),
                index_sha256=files.sha256(index),
            )
        )
    return records


def _validation(origins: list[Path], partial: Path, limit: int, vocab_size: int, eos_id: int) -> list[FileRecord]:
    """The validation side: linked when it is no larger than `limit` tokens, otherwise its head, copied."""
    token_bytes = little_endian(dtype_for(vocab_size)).itemsize
    if sum(path.stat().st_size for path in origins) <= limit * token_bytes:
        return _linked(origins, partial / "val", vocab_size, eos_id)
    writer = SplitWriter(partial / "val", vocab_size, limit)
    for path in origins:
        if not writer.full:
            head = np.asarray(_tokens(path, vocab_size)[:limit])
            writer.write(head, np.diff(_ends(head, eos_id), prepend=0))
    writer.close()
    return writer.records


def _tokens(path: Path, vocab_size: int, *, whole: bool = True) -> np.ndarray:
    """The tokens of a file, mapped. Raises InputError when it is not a whole number of ids below `vocab_size`.

    Unless `whole`, only its beginning is looked at.
    """
    dtype = little_endian(dtype_for(vocab_size))
    size = path.stat().st_size
    if not size or size % dtype.itemsize:
        raise InputError(f"{path}: {size} bytes are not a whole number of {dtype.name} tokens")
    if size >= HEADER and int(np.fromfile(path, "<i4", 1)[0]) in MAGIC:
        raise InputError(
            f"{path} begins with the header of llm.c's and modded-nanogpt's files; `tail -c +{HEADER + 1}` drops it:"
            f" the tokens behind it must be {dtype.name}"
        )
    tokens = np.memmap(path, dtype, mode="r")
    head = tokens[: 2 * SHOWN]
    if len(head) == 2 * SHOWN and not head[1::2].any():
        raise InputError(f"{path}: every second token is 0: these are wider than {dtype.name}, which would work")
    for start in range(0, len(tokens) if whole else min(SHOWN, len(tokens)), TOKENS_AT_ONCE):
        largest = int(tokens[start : start + TOKENS_AT_ONCE].max())
        if largest >= vocab_size:
            raise InputError(
                f"{path}: holds token {largest}, and the tokenizer has {vocab_size} entries: it is another's"
            )
    return tokens


def _ends(tokens: np.ndarray, eos_id: int) -> np.ndarray:
    """Where each document ends, behind its end of text; what follows the last one is a document too."""
    parts = range(0, len(tokens), TOKENS_AT_ONCE)
    ends = (
        np.concatenate([start + np.flatnonzero(tokens[start : start + TOKENS_AT_ONCE] == eos_id) for start in parts])
        + 1
    )
    return ends if len(ends) and ends[-1] == len(tokens) else np.append(ends, len(tokens))
