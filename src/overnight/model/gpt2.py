"""A GPT-2 whose forward takes (ids, targets) and returns the summed loss, and the plain model that is published of it.

While training the vocabulary is padded to a multiple of 64 rows, attention is `causal_only`, and the logits are made
and used up chunk by chunk. `published` gives the stock GPT2LMHeadModel of the same weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, GPT2Config, GPT2LMHeadModel

from overnight.model.loss import summed_loss
from overnight.planning.model_size import padded_vocabulary
from overnight.recipe.schema import Model


def causal_only(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Causal attention over whole packed rows; query, key and value are (batch, heads, time, head_dim).

    transformers builds no mask for an attention of this name, neither in eager mode nor under torch.compile, where its
    `sdpa` would build one and lose the fused kernel. With a key-value cache `is_causal` would be wrong: refused.
    """
    if query.shape[2] != key.shape[2]:
        raise ValueError("causal_only attends over whole rows and takes no key-value cache")
    out = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True, scale=scaling)
    return out.transpose(1, 2), None  # (batch, time, heads, head_dim)


def gpt2_config(model: Model, eos_token_id: int, *, training: bool) -> GPT2Config:
    """The GPT2Config of a recipe: padded and mask-free while training, plain when published."""
    config = GPT2Config(
        vocab_size=padded_vocabulary(model.vocab_size) if training else model.vocab_size,
        n_positions=model.n_positions,
        n_embd=model.n_embd,
        n_layer=model.n_layer,
        n_head=model.n_head,
        activation_function="gelu_pytorch_tanh",  # gelu_new as one fused operation
        resid_pdrop=model.dropout,
        embd_pdrop=model.dropout,
        attn_pdrop=model.dropout,
        bos_token_id=eos_token_id,
        eos_token_id=eos_token_id,
        use_cache=not training,
    )
    config.n_ctx = model.n_positions  # the older name of it, which llama.cpp's converter reads
    AttentionInterface.register(causal_only.__name__, causal_only)
    config._attn_implementation = causal_only.__name__ if training else "sdpa"
    return config


class LanguageModel(nn.Module):
    """What `Accelerator.prepare` receives: one forward from tokens to the loss, so that autocast and DDP see it all."""

    def __init__(self, model: Model, eos_token_id: int, *, compile: bool):
        super().__init__()
        self.gpt2 = GPT2LMHeadModel(gpt2_config(model, eos_token_id, training=True))
        if not model.bias:
            for name, parameter in self.gpt2.named_parameters():
                parameter.requires_grad_(".ln_" in name or not name.endswith(".bias"))
        self.eos_token_id = eos_token_id
        self.vocab_size = model.vocab_size
        self.compiled = compile
        # static shapes: each micro-batch that is tried gets code of its own, and none the slower code for any size
        self.training_body = torch.compile(self.body, dynamic=False, fullgraph=True) if compile else self.body

    def body(self, ids: Tensor) -> Tensor:
        """(batch, time) token ids to (batch, time, n_embd) hidden states."""
        return self.gpt2.transformer(ids, use_cache=False).last_hidden_state

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """The cross-entropy of `targets` given `ids`, both (batch, time) int64, summed: a float32 scalar in nats.

        In evaluation mode the body is never the compiled one, so that validation's last, shorter row costs no
        recompilation.
        """
        hidden = self.training_body(ids) if self.training else self.body(ids)
        weight = self.gpt2.transformer.wte.weight
        return summed_loss(hidden.flatten(0, 1), weight, targets.flatten(), self.vocab_size, compile=self.compiled)


def published(model: LanguageModel, config: Model) -> GPT2LMHeadModel:
    """The stock model over the same memory: exact vocabulary, `sdpa`, in evaluation mode; nothing is copied."""
    state = {name: tensor.detach() for name, tensor in model.gpt2.transformer.state_dict().items()}
    state["wte.weight"] = state["wte.weight"][: config.vocab_size]
    with torch.device("meta"):
        stock = GPT2LMHeadModel(gpt2_config(config, model.eos_token_id, training=False))
    stock.transformer.load_state_dict(state, assign=True)
    stock.tie_weights()
    return stock.eval()
