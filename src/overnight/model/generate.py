"""Text from a model: samples while it trains, and continuations of a finished one."""

from __future__ import annotations

from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from overnight.core.console import plain
from overnight.model.load import load_model

POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "seq_length")
NO_LIMIT = 2048  # tokens, for a model that has none (ALiBi, a state-space model): lm-eval's


def context_of(model: Any, tokenizer: Any) -> int:
    """Tokens that a model can be given at once: its configuration's limit, under whatever name, or its tokenizer's."""
    config = model.config.get_text_config().to_dict()
    limits = [config[name] for name in POSITIONS if isinstance(config.get(name), int)]
    if not limits and tokenizer.model_max_length < 10**9:  # transformers has 1e30 where nobody said it
        limits = [int(tokenizer.model_max_length)]
    return limits[0] if limits else NO_LIMIT


class Writer:
    """A stock causal language model and its tokenizer, continuing prompts."""

    def __init__(self, model: Any, tokenizer: Any):
        self.model, self.tokenizer = model, tokenizer

    @classmethod
    def load(cls, name: str) -> Writer:
        """The model in a folder or on the Hub, on the best device; raises as `load_model` does."""
        disable_progress_bar()
        model, _, tokenizer = load_model(name)
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
