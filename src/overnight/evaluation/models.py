"""The models of a comparison: loaded without running code or pickles, or made from a run for scale."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from overnight.data.batches import TrainingBatches
from overnight.data.ngrams import seen_tokens, unigram
from overnight.data.shards import Shards
from overnight.data.tokenizer import fingerprint as tokenizer_fingerprint
from overnight.errors import InputError
from overnight.evaluation.scoring import Request, Scorer, batches_of
from overnight.model import load
from overnight.model.generate import context_of
from overnight.model.gpt2 import LanguageModel, published
from overnight.recipe.schema import Recipe

UNTRAINED, UNIGRAM = "untrained", "unigram"  # names that an opponent may have beside a folder's or the Hub's
WORTH_TELLING_APART = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")  # of a configuration: not these


@dataclass
class EvalModel:
    """A model with its tokenizer, ready to be scored."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    scorer: Scorer
    fingerprint: str

    @property
    def context(self) -> int:
        """Tokens that the model can be given at once."""
        return context_of(self.model, self.tokenizer)

    @property
    def facts(self) -> dict[str, Any]:
        """What is said of it in results.json."""
        return {
            "name": self.name,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "context": self.context,
            "vocabulary": len(self.tokenizer),
            "fingerprint": self.fingerprint,
            "shares contexts": self.scorer.reads_trees,
        }


def load_model(name: str, device: torch.device, dtype: torch.dtype) -> EvalModel:
    """The model of a folder or a Hub name. Raises as `load.load_model` does, and for a slow tokenizer."""
    model, _, tokenizer = load.load_model(name, dtype=dtype)
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or tokenizer.eos_token_id is None:
        raise InputError(f"{name}: its tokenizer has no tokenizer.json, or no end-of-text token to begin a text with")
    embedding: Any = model.get_input_embeddings()
    if (largest := max(tokenizer.get_vocab().values())) >= embedding.num_embeddings:
        raise InputError(
            f"{name}: its tokenizer has ids up to {largest:,}, and the model {embedding.num_embeddings:,} rows:"
            " they are not of one model"
        )
    return eval_model(name, model, tokenizer, device, dtype)


def eval_model(
    name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, device: torch.device, dtype: torch.dtype
) -> EvalModel:
    """`model` on its device in its arithmetic."""
    torch.nn.Module.to(model, device=device, dtype=dtype)
    return EvalModel(name, model, tokenizer, Scorer(model), fingerprint_of(model, tokenizer))


def fingerprint_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 of what decides a model's answers: weights, configuration, tokenizer, arithmetic."""
    digest = hashlib.sha256(f"{torch.__version__} {model.device.type} {model.dtype}".encode())
    config = {key: value for key, value in model.config.to_dict().items() if key not in WORTH_TELLING_APART}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    digest.update(tokenizer_fingerprint(tokenizer).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def untrained(recipe: Recipe, shards: Shards) -> GPT2LMHeadModel:
    """The model of a recipe as it is before the first iteration."""
    set_seed(recipe.seed)
    return published(LanguageModel(recipe.model, shards.manifest.eos_id, compile=False), recipe.model)


def unigram_model(recipe: Recipe, shards: Shards, iterations: int) -> GPT2LMHeadModel:
    """The unigram distribution of the tokens of a run's first iterations, with add-one smoothing, as a GPT-2.

    One embedding column holds the log-probabilities; the last norm turns every hidden state into the unit vector of
    that column.
    """
    rows = seen_tokens(TrainingBatches(shards.train, recipe.batch, recipe.seed), iterations)
    shares = unigram(rows, recipe.model.vocab_size)
    eos = shards.manifest.eos_id
    config = GPT2Config(
        vocab_size=recipe.model.vocab_size,
        n_positions=recipe.model.n_positions,
        n_embd=8,
        n_layer=1,
        n_head=1,
        bos_token_id=eos,
        eos_token_id=eos,
    )
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.transformer.ln_f.bias[0] = 1.0
        model.transformer.wte.weight[:, 0] = torch.from_numpy(np.log(shares)).float()
    return model


def tokens_per_second(eval_model: EvalModel) -> float:
    """Tokens a second of a full batch, the second of two."""
    length = min(64, eval_model.context)
    rows = eval_model.scorer.budget // length
    tokens = np.random.default_rng(0).integers(0, len(eval_model.tokenizer), (rows, length))
    requests = [Request(tuple(row[: -length // 4].tolist()), tuple(row[-length // 4 :].tolist())) for row in tokens]
    [trees], _ = batches_of(requests, eval_model.context, eval_model.scorer.budget)
    for _ in range(2):
        started = time.monotonic()
        eval_model.scorer.score(trees)  # its answers are read on the host, so the device has finished
    return sum(map(len, trees)) / (time.monotonic() - started)
