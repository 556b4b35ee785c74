"""What an evaluation cannot use is refused with its model, task and item, and what it can is used as lm-eval does."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import BloomConfig, GPT2Config, GPT2LMHeadModel

from overnight.data.tokenizer import train_tokenizer
from overnight.errors import InputError
from overnight.evaluation import tasks
from overnight.evaluation.lm import SharedContextLM, failing_item, ties_as_chance
from overnight.evaluation.loss import text_rows
from overnight.evaluation.models import load_model
from overnight.model.generate import NO_LIMIT, context_of

TEXTS = ["a few words to train on " * 20]


@pytest.fixture
def tokenizer():
    return train_tokenizer(TEXTS, 270)


def test_a_tokenizer_with_more_ids_than_its_model_has_rows_is_refused_where_the_two_meet(tmp_path, tokenizer):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=270, n_positions=16, n_embd=8, n_layer=1, n_head=1))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert load_model(str(tmp_path), torch.device("cpu"), torch.float32).context == 16
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="ids up to 270, and the model 270 rows"):
        load_model(str(tmp_path), torch.device("cpu"), torch.float32)


@pytest.mark.slow
def test_a_hub_that_cannot_be_reached_is_no_fault_of_the_model_or_the_text(tmp_path):
    away = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    model = "from overnight.model.load import load_model; load_model('openai-community/gpt2')"
    texts = "from overnight.evaluation.loss import read_texts; read_texts('someone/texts')"
    for read in (model, texts):
        code = "from overnight import errors\n" + f"try:\n    {read}\nexcept errors.Unreachable as error: print(error)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | away)
        assert "the Hub cannot be reached" in done.stdout and "the same command continues" in done.stdout, done.stderr


def test_a_model_without_a_limit_of_positions_has_lm_evals(tokenizer):
    assert context_of(SimpleNamespace(config=BloomConfig(hidden_size=8, n_head=1)), tokenizer) == NO_LIMIT
    tokenizer.model_max_length = 512
    assert context_of(SimpleNamespace(config=BloomConfig(hidden_size=8, n_head=1)), tokenizer) == 512


def test_a_text_begins_with_the_token_that_the_models_texts_begin_with(tokenizer):
    def first_token():
        of, alone = SimpleNamespace(tokenizer=tokenizer), SimpleNamespace(process_index=0, num_processes=1)
        return text_rows(["a few words"], of, 16, alone, SimpleNamespace(expect=lambda tokens: None))[0].context[0]

    tokenizer.add_special_tokens({"bos_token": "<s>"})
    assert first_token() == tokenizer.bos_token_id
    tokenizer.bos_token = None
    assert first_token() == tokenizer.eos_token_id


def test_a_continuation_without_a_token_of_its_own_is_refused_with_its_text():
    lm = SharedContextLM.__new__(SharedContextLM)
    lm.name, lm.meter = "a model", SimpleNamespace(name="a task")
    with pytest.raises(InputError, match=r"a task: a model cannot be asked for 'c' after 'ab'"):
        lm._loglikelihood_tokens([(("ab", "c"), [1, 2], [])])


def own_task(folder, **changes):
    """A multiple-choice task of one's own with two items."""
    lines = [{"q": "a few", "c": [" words", " on"], "a": 0}, {"q": "to", "c": [" train", " on"], "a": 1}]
    (folder / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    about = {"task": "own", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "items.jsonl"}}}
    about |= {"test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "{{c}}"}
    about |= {"doc_to_target": "{{a}}", "metric_list": [{"metric": "acc"}]} | changes
    (folder / "own.yaml").write_text(yaml.safe_dump(about))
    return tasks.load_benchmarks(["own"], tasks.index_of(["own"], folder), None)[0].tasks[0]


def test_a_mistake_in_a_task_of_ones_own_is_said_of_its_file_and_not_of_the_hub(tmp_path):
    assert failing_item(own_task(tmp_path), None) == ""
    with pytest.raises(InputError, match=r"`--tasks`: own, .*own\.yaml, cannot be used") as caught:
        own_task(tmp_path, doc_to_target="{{b}}")
    assert "Hub" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"dataset_kwargs": {}},
        {"dataset_kwargs": {"data_files": "items.jsonl"}},
        {"dataset_path": "text", "dataset_kwargs": {"data_files": {"test": "/etc/hostname"}}},
        {"metric_list": [{"metric": ["acc"]}]},
        {"task": 5},
        {"task": ["gone"], "group": "own"},
        {"task": ["own"], "group": "own"},
        {"task": [], "group": "own"},
    ],
)
def test_whatever_a_task_file_lacks_is_a_refusal_that_names_the_task(tmp_path, changes):
    with pytest.raises(InputError, match=r"own|which leads out of its folder"):
        own_task(tmp_path, **changes)


def test_a_target_that_is_no_choice_is_refused_and_not_counted_as_wrong(tmp_path):
    task = own_task(tmp_path, doc_to_target="{{a * 5}}")
    with pytest.raises(InputError, match=r"own: 5 is none of the 2 choices of .*train"):
        ties_as_chance(task, task.eval_docs[1], [-1.0, -2.0], {"acc": 0.0})
