"""Text from a model: samples while it trains, and continuations of a finished one."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from overnight.core.console import plain
from overnight.core.sums import damage
from overnight.errors import DamagedData
from overnight.model.load import load_model
from overnight.model.unannealed import write_model
from overnight.run_dir.layout import model_at, recipe_of, run_around

POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "seq_length")
NO_LIMIT = 2048  # tokens, for a model that has none (ALiBi, a state-space model): lm-eval's


def context_of(model: Any, tokenizer: Any) -> int:
    """Tokens that a model can be given at once: its configuration's limit, under whatever name, or its tokenizer's."""
    config = model.config.get_text_config().to_dict()
    limits = [config[name] for name in POSITIONS if isinstance(config.get(name), int)]
    if not limits and tokenizer.model_max_length < 10**9:  # transformers has 1e30 where nobody said it
        limits = [int(tokenizer.model_max_length)]
    return limits[0] if limits else NO_LIMIT


def model_of(name: str, scratch: Path) -> str:
    """The model folder or Hub name that is meant: of a run its newest finished model, of its checkpoint the weights.

    A checkpoint's are written into `scratch`. Raises as `model_at` does, and `DamagedData`.
    """
    name = model_at(name)
    folder = Path(os.path.abspath(name))
    run = run_around(folder)
    if run is None or not (folder / "state.json").is_file():
        return name
    if reason := damage(folder):
        raise DamagedData(f"{name} is damaged: {reason}")
    write_model(folder, recipe_of(run), scratch)
    return str(scratch)


class Writer:
    """A stock causal language model and its tokenizer, continuing prompts."""

    def __init__(self, model: Any, tokenizer: Any):
        self.model, self.tokenizer = model, tokenizer

    @classmethod
    def load(cls, name: str) -> Writer:
        """What `model_of` finds, on the best device; raises as it and `load_model` do."""
        disable_progress_bar()
        with TemporaryDirectory() as scratch:
            model, _, tokenizer = load_model(model_of(name, Path(scratch)))
        return cls(model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer)

    @torch.no_grad()
    def after(self, prompt: str, *, tokens: int, temperature: float, top_k: int, seed: int) -> str:
        """What follows `prompt`, at most `tokens` tokens; `temperature` 0 is greedy.

        What does not fit the model's context is cut from the prompt's front. Control characters are taken out.
        """
        context = context_of(self.model, self.tokenizer)
        ids = self.tokenizer(prompt or self.tokenizer.eos_token, return_tensors="pt").input_ids.to(self.model.device)
        ids = ids[:, -max(1, context - tokens) :]
        how = (
            {"do_sample": True, "temperature": temperature, "top_k": top_k} if temperature > 0 else {"do_sample": False}
        )
        torch.manual_seed(seed)
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=min(tokens, context - ids.shape[1]),
            pad_token_id=self.tokenizer.eos_token_id,
            **how,
        )
        return plain(self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
