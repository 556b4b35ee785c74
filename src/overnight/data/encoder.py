"""Many texts to token ids: fastokens where it is installed, `tokenizers` otherwise, the same ids from both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from overnight.errors import InputError

try:
    from fastokens import Tokenizer as FastTokenizer
except ImportError:  # an extra: `tokenizers` serves without it, at about a hundredth of the speed
    FastTokenizer = None


@lru_cache(maxsize=1)
def encoder_of(folder: Path) -> Encoder:
    """The encoder of a tokenizer's folder, once for each process: making one takes a second."""
    return Encoder(folder)


class Encoder:
    """The tokenizer of a folder with a `tokenizer.json`; special tokens spelled out in a text are plain text to it."""

    def __init__(self, folder: Path):
        path = str(folder / "tokenizer.json")
        self.reference = Tokenizer.from_file(path)
        self.reference.encode_special_tokens = True
        self.reference.no_truncation()
        self.reference.no_padding()
        self.fast = None
        if FastTokenizer:
            with suppress(ValueError):  # a kind of tokenizer that fastokens does not know, and `tokenizers` serves
                self.fast = FastTokenizer.from_file(path)

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of all texts one after the other, uint32 (tokens,), and where each ends, int64 (texts,)."""
        if self.fast is None:
            return self.reference_ids(texts)
        ids, offsets = self.fast.encode_batch_flat(texts, add_special_tokens=False, split_special_tokens=True)
        return np.frombuffer(ids, "<u4"), np.frombuffer(offsets, "<u8")[1:].astype(np.int64)

    def reference_ids(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The same from `tokenizers`."""
        encoded = [found.ids for found in self.reference.encode_batch_fast(texts, add_special_tokens=False)]
        ids = np.fromiter((number for each in encoded for number in each), np.uint32)
        return ids, np.cumsum([len(each) for each in encoded], dtype=np.int64)

    def check(self, texts: Sequence[str], name: str) -> None:
        """Raise InputError when fastokens gives other ids than `tokenizers` for these texts of the file `name`."""
        if self.fast is None:
            return
        for text, expected, found in zip(
            texts, self._split(self.reference_ids(texts)), self._split(self(texts)), strict=True
        ):
            if expected.tolist() != found.tolist():
                raise InputError(
                    f"{name}: fastokens and tokenizers give different ids for a text that begins {text[:60]!r}; "
                    "`pip uninstall fastokens` continues without it, and slower"
                )

    @staticmethod
    def _split(encoded: tuple[np.ndarray, np.ndarray]) -> list[np.ndarray]:
        ids, ends = encoded
        return np.split(ids, ends[:-1])


def json_fingerprint(tokenizer_json: str) -> str:
    """Return the fingerprint of the text of a tokenizer.json, whatever its layout and batch settings."""
    content = json.loads(tokenizer_json)
    content["truncation"] = content["padding"] = None  # the last caller's settings, not the tokenizer's
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
