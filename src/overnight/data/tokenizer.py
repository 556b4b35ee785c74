"""The tokenizer of a recipe: loaded by name, or a GPT-2-like byte-level BPE trained on the text itself."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast

from overnight.core.files import errno_of
from overnight.data.encoder import json_fingerprint
from overnight.errors import InputError, Unreachable, first_line, network_away
from overnight.recipe.text import is_path

END_OF_TEXT = "<|endoftext|>"
FILES = ["tokenizer*.json", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "config.json"]
LONGEST_WORD = 1000  # characters; training by more at once


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with GPT-2's pre-tokenizer on `texts`; `<|endoftext|>` is its bos, eos and unk token.

    The vocabulary has exactly `vocab_size` entries, the special token and the 256 bytes included. The same texts give
    the same tokenizer. Raises InputError naming `model.vocab_size` when the texts do not yield that many.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator((piece for text in texts for piece in _pieces(text)), trainer)
    found = backend.get_vocab_size()
    if found != vocab_size:
        works = f"at least {found}" if found > vocab_size else f"at most {found}, or give more text"
        raise InputError(
            f"`model.vocab_size` is {vocab_size}, but this text gives a vocabulary of {found}: use {works}"
        )
    model = json.loads(backend.to_str())["model"]
    # GPT-2's own class around it, so that every release of transformers loads what is saved.
    merges: Any = [tuple(pair) for pair in model["merges"]]  # annotated as strings upstream, read as pairs
    return GPT2Tokenizer(vocab=model["vocab"], merges=merges)


def _pieces(text: str) -> Iterator[str]:
    """A text as it is, or in pieces where it has a longer word than any language: the trainer's time is its square."""
    whole = re.search(rf"\S{{{LONGEST_WORD}}}|\s{{{LONGEST_WORD}}}", text) is None
    size = len(text) if whole else LONGEST_WORD
    return (text[at : at + size] for at in range(0, len(text), max(size, 1)))


def load_tokenizer(name_or_dir: str) -> PreTrainedTokenizerFast:
    """Load a tokenizer by Hub name or from a folder, without running code from either.

    Raises InputError naming `data.tokenizer` when it cannot be had, has no end-of-text token or ids with holes,
    Unreachable when the Hub stays away, and OSError where the system refuses a file.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(fetched(name_or_dir), trust_remote_code=False)
    except InputError:
        raise
    except Exception as error:  # the Hub client, its transport and the parsers share no base class
        if errno_of(error) is not None:
            raise
        raise InputError(
            f"`data.tokenizer` is {name_or_dir}, which cannot be loaded: {first_line(error)} "
            "Check the name and the network, give a folder with a tokenizer.json, or use `trained`"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or tokenizer.eos_token_id is None:
        raise InputError(
            f"`data.tokenizer` is {name_or_dir}, which has no tokenizer.json or no end-of-text token; "
            "openai-community/gpt2 has both"
        )
    _require_countable(name_or_dir, tokenizer)
    if tokenizer.backend_tokenizer.num_special_tokens_to_add(False):
        # a text has no token before or behind it in training, so the tokenizer that is published adds none either
        tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
    return tokenizer


def load_tokenizer_of(name_or_dir: str, vocab_size: int) -> PreTrainedTokenizerFast:
    """`load_tokenizer`, and InputError naming `model.vocab_size` when that is not its number of entries."""
    tokenizer = load_tokenizer(name_or_dir)
    if len(tokenizer) != vocab_size:
        raise InputError(
            f"`model.vocab_size` is {vocab_size}, but the tokenizer {name_or_dir} has {len(tokenizer)} entries: "
            f"use {len(tokenizer)}"
        )
    return tokenizer


def fetched(name_or_dir: str) -> str:
    """The folder of a tokenizer's files; those of a Hub name are fetched, and asked for once."""
    if os.path.isdir(name_or_dir):
        return name_or_dir
    if os.path.isfile(name_or_dir) or is_path(name_or_dir):
        raise InputError(
            f"`data.tokenizer` is {name_or_dir}, which is no folder; one with a tokenizer.json, a name on the Hub, or"
            " `trained` would work"
        )
    try:
        return snapshot_download(name_or_dir, allow_patterns=FILES)
    except LocalEntryNotFoundError as error:
        if not network_away(error):
            raise
        raise Unreachable(
            f"`data.tokenizer` is {name_or_dir}, and the Hub cannot be reached ({first_line(error)}); the same command"
            " continues when it can, and a folder with a tokenizer.json needs no network"
        ) from error


def _require_countable(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise InputError unless the ids are 0 up to the number of entries, and a text always has the same."""
    ids = set(tokenizer.get_vocab().values())
    if len(ids) != len(tokenizer) or max(ids) + 1 != len(ids):
        raise InputError(
            f"`data.tokenizer` is {name}, which has {len(tokenizer)} entries, {len(ids)} different ids and the largest "
            f"{max(ids)}; one whose ids are 0 to {len(tokenizer) - 1} would work"
        )
    if dropout := json.loads(tokenizer.backend_tokenizer.to_str())["model"].get("dropout"):
        raise InputError(
            f"`data.tokenizer` is {name}, whose tokenizer.json has `dropout` {dropout}: a text would have other ids "
            "each time; null there would work"
        )


def fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the SHA-256 of the canonical tokenizer.json: equal for tokenizers that give the same ids."""
    return json_fingerprint(tokenizer.backend_tokenizer.to_str())
