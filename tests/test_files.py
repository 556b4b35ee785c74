"""Promises about files whatever lies under them: locks, syncing, JSON, and the mode of what is published."""

import errno
import json
import os
import time
from contextlib import nullcontext

import numpy as np
import pytest
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from overnight.core import files, lock
from overnight.core.files import strict_json, sync
from overnight.data.tokenizer import load_tokenizer, train_tokenizer
from overnight.errors import InputError, Unreachable
from overnight.hub.upload import with_exponential_backoff
from overnight.model.export import configure_for_readers
from overnight.prepare.sources import with_retries

TEXTS = ["a few words to train on " * 20]


def raises(number: int):
    def act(*arguments, **options):
        raise OSError(number, os.strerror(number))

    return act


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks_is_refused_by_its_name(tmp_path, monkeypatch, number):
    monkeypatch.setattr(lock.FileLock, "acquire", raises(number))
    with pytest.raises(InputError, match=r"its file system has no locks .*; name a local disk"):
        lock.hold(tmp_path, "wait")


def test_locks_are_tried_with_a_second_process(tmp_path, monkeypatch):
    assert lock.unsafe(tmp_path) is None
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(lock, "kernel_lock", lambda path: nullcontext())
    assert lock.unsafe(tmp_path) == "two processes get the same lock there"


def test_a_folder_that_cannot_be_synced_is_no_error_and_a_file_is(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "fsync", raises(errno.EINVAL))
    sync(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Invalid argument"):
        sync(tmp_path / "file")


def test_what_is_written_as_json_every_reader_takes():
    value = {"loss": float("nan"), "rows": (np.int64(3), np.float32("inf")), "mean": np.float64(0.5)}
    assert json.loads(strict_json(value), parse_constant=pytest.fail) == {"loss": None, "rows": [3, None], "mean": 0.5}


def test_a_published_tokenizer_is_one_that_older_readers_know(tmp_path):
    plain = PreTrainedTokenizerFast(tokenizer_object=train_tokenizer(TEXTS, 270).backend_tokenizer, eos_token="a")
    plain.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<x>"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    configure_for_readers(tmp_path / "tokenizer_config.json")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast" and "extra_special_tokens" not in config
    assert AutoTokenizer.from_pretrained(tmp_path).encode("words") == plain.encode("words")


def test_a_published_tokenizer_gives_the_ids_of_training(tmp_path):
    backend = train_tokenizer(TEXTS, 270).backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>").save_pretrained(tmp_path / "before")
    tokenizer = load_tokenizer(str(tmp_path / "before"))
    tokenizer.save_pretrained(tmp_path / "after")
    again = AutoTokenizer.from_pretrained(tmp_path / "after")
    assert again("words").input_ids == backend.encode("words", add_special_tokens=False).ids


def test_an_error_of_this_machine_is_not_tried_again_as_one_of_the_network_nor_called_bad_input(monkeypatch):
    full = raises(errno.ENOSPC)
    monkeypatch.setattr(time, "sleep", pytest.fail)
    with pytest.raises(Unreachable, match="No space left on device: mend that"):
        with_exponential_backoff(full, patience=60.0, log=pytest.fail)
    with pytest.raises(OSError, match="No space left"):
        with_retries(full, "https://example.com/a.jsonl")
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        load_tokenizer(".")
