"""Our log-likelihoods = those of lm-eval's own `hf` model, choice by choice, with shared contexts and without."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from benchmarks_on_disk import make_tasks
from lm_eval.models.huggingface import HFLM
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from overnight.core.console import Console
from overnight.data.tokenizer import load_tokenizer
from overnight.evaluation.cache import ResponseCache
from overnight.evaluation.lm import SharedContextLM, answer_items
from overnight.evaluation.models import EvalModel, eval_model
from overnight.evaluation.progress import Meter
from overnight.evaluation.scoring import Request, batches_of
from overnight.evaluation.tasks import index_of, load_benchmarks

VOCABULARY, CONTEXT = 500, 96
SHAPE = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=64, n_layer=2, n_head=4, initializer_range=0.3)
    ),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(**SHAPE, intermediate_size=128, max_position_embeddings=CONTEXT, initializer_range=0.2)
    ),
    "neox": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(**SHAPE, intermediate_size=128, max_position_embeddings=CONTEXT, initializer_range=0.2)
    ),
    "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=64, n_layer=2, n_head=4)),
}


def make(architecture: str, workplace: Path) -> EvalModel:
    torch.manual_seed(7)
    tokenizer = load_tokenizer(str(workplace / "data" / "tokenizer"))
    return eval_model(architecture, MODELS[architecture](), tokenizer, torch.device("cpu"), torch.float32)


def items_of(lm: HFLM, folder: Path, names: list[str]) -> dict[str, list[dict]]:
    found = load_benchmarks(names, index_of(names, folder))
    return {benchmark.name: answer_items(lm, benchmark.tasks[0], None) or [] for benchmark in found}


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "neox")]


@pytest.mark.parametrize("architecture", ["gpt2", "bloom", *SLOW])
def test_every_choice_has_the_log_likelihood_that_lm_eval_gives(architecture: str, workplace: Path, tmp_path: Path):
    names, model = make_tasks(tmp_path / "tasks"), make(architecture, workplace)
    assert model.scorer.reads_trees == (architecture != "bloom")  # alibi takes no positions
    meter = Meter(Console(quiet=True))
    lm = SharedContextLM(model, ResponseCache(tmp_path / "journal"), Accelerator(cpu=True), meter)
    upstream = HFLM(pretrained=model.model, tokenizer=model.tokenizer, batch_size=4, max_length=lm.max_length)
    ours, theirs = (items_of(each, tmp_path / "tasks", names) for each in (lm, upstream))
    for name in names:
        assert len(ours[name]) == 24
        for mine, other in zip(ours[name], theirs[name], strict=True):
            assert mine["loglikelihoods"] == pytest.approx(other["loglikelihoods"], abs=1e-3)
            assert mine["greedy"] == other["greedy"]
            if name != "on_whole_texts":
                assert mine["metrics"].keys() == other["metrics"].keys()
                assert {k: v for k, v in mine["metrics"].items() if k.startswith("acc")} == {
                    k: v for k, v in other["metrics"].items() if k.startswith("acc")
                }
    assert len({tuple(item["loglikelihoods"]) for item in ours["on_choices"]}) == 24
    assert lm.cut > 0 or architecture == "bloom"  # some items are longer than the context


def test_shared_beginnings_go_through_the_model_once():
    context = tuple(range(100, 160))
    requests = [Request(context, (1, 2, number)) for number in range(3, 7)]
    [[tree]], cut = batches_of(requests, 1024, 2048)
    assert (len(tree), cut) == (62, 0)  # the context, and twice one token; the last is only predicted
    forest = [Request((9, *context[: 40 - number]), tuple(range(number + 2))) for number in range(5)]
    batches, _ = batches_of(forest, 1024, 2048)
    assert sorted(n for trees in batches for tree in trees for n in tree.numbers) == list(range(5))


def test_a_token_sees_its_own_beginning_and_nothing_else():
    [[tree]], _ = batches_of([Request((5, 6, 7), (1, 2, 3)), Request((5, 6, 7), (4, 2))], 16, 64)
    size = len(tree)
    mask, tokens = tree.attends(size + 1), [*tree.tokens, 0]
    seen = [[tokens[at] for at in np.flatnonzero(row)] for row in mask]
    assert seen == [[5], [5, 6], [5, 6, 7], [5, 6, 7, 1], [5, 6, 7, 1, 2], [5, 6, 7, 4], [0]]
    assert tree.positions == [0, 1, 2, 3, 4, 3]


def test_what_is_too_long_keeps_its_end_and_is_counted():
    requests = [Request(tuple(range(50)), (1, 2)), Request((3,), (1,))]
    batches, cut = batches_of(requests, 10, 64)
    longest = max((tree for trees in batches for tree in trees), key=len)
    assert cut == 1 and longest.tokens == [*range(41, 50), 1]
    with pytest.raises(ValueError, match="continuation of 11 tokens in a context of 10"):
        batches_of([Request((1,), tuple(range(11)))], 10, 64)
