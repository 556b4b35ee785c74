"""A GPT-2 whose forward takes (ids, targets) and returns the summed loss, and the plain model that is published of it.

While training the vocabulary is padded to a multiple of 64 rows, attention is attention.py's, and the logits are made
and used up chunk by chunk. `published` gives the stock GPT2LMHeadModel of the same weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from overnight.attention import causal_only
from overnight.plan import LOSS_CHUNK, padded_vocabulary
from overnight.recipe import Model


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
    config._attn_implementation = causal_only.__name__ if training else "sdpa"
    return config


class LanguageModel(nn.Module):
    """What `Accelerator.prepare` receives: one forward from tokens to the loss, so that autocast and DDP see it all."""

    def __init__(self, model: Model, eos_token_id: int, *, compile: bool):
        super().__init__()
        self.gpt2 = GPT2LMHeadModel(gpt2_config(model, eos_token_id, training=True))
        self.eos_token_id = eos_token_id
        self.vocab_size = model.vocab_size
        # static shapes: each micro-batch that is tried gets code of its own, and none the slower code for any size
        self.training_body = torch.compile(self.body, dynamic=False) if compile else self.body

    def body(self, ids: Tensor) -> Tensor:
        """(batch, time) token ids to (batch, time, n_embd) hidden states."""
        return self.gpt2.transformer(ids, use_cache=False).last_hidden_state

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """The cross-entropy of `targets` given `ids`, both (batch, time) int64, summed: a float32 scalar in nats.

        In evaluation mode the body is never the compiled one, so that validation's last, shorter row costs no
        recompilation.
        """
        hidden = self.training_body(ids) if self.training else self.body(ids)
        return summed_loss(hidden.flatten(0, 1), self.gpt2.transformer.wte.weight, targets.flatten(), self.vocab_size)


def summed_loss(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Cross-entropy of `targets` (n,) under `hidden` (n, n_embd) @ `weight` (padded, n_embd).T, summed, in float32.

    Columns from `vocab_size` on do not take part. The (n, padded) logits are never held whole.
    """
    if torch.is_grad_enabled():
        return _ChunkedLoss.apply(hidden, weight, targets, vocab_size)
    return _loss_and_gradients(hidden, weight, targets, vocab_size, gradients=False)[0]


class _ChunkedLoss(torch.autograd.Function):
    """The loss with its gradients made in the forward, while a chunk's logits are at hand: nothing is recomputed."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, vocab_size):
        loss, *gradients = _loss_and_gradients(hidden, weight, targets, vocab_size, gradients=True)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden.mul_(grad_loss), grad_weight.mul_(grad_loss), None, None


def _loss_and_gradients(hidden, weight, targets, vocab_size, *, gradients):
    compute = torch.get_autocast_dtype(hidden.device.type) if torch.is_autocast_enabled(hidden.device.type) else None
    rows, matrix = hidden.to(compute or hidden.dtype), weight.to(compute or weight.dtype)
    loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
    grad_hidden = torch.empty_like(hidden if gradients else hidden[:0])
    grad_weight = torch.zeros_like(weight if gradients else weight[:0])
    size = LOSS_CHUNK[hidden.device.type]
    buffer = rows.new_empty(min(size, len(rows)), len(matrix))  # for all chunks: fresh memory costs a CPU page faults
    buffer_float = None if buffer.dtype == torch.float32 else torch.empty_like(buffer, dtype=torch.float32)
    for start in range(0, len(rows), size):
        chunk, target = rows[start : start + size], targets[start : start + size, None]
        logits = torch.mm(chunk, matrix.T, out=buffer[: len(chunk)])  # (chunk, padded)
        logits[:, vocab_size:] = -torch.inf
        if buffer_float is not None:
            logits = buffer_float[: len(chunk)].copy_(logits)
        own = logits.gather(1, target)
        largest, place = logits.max(dim=1, keepdim=True)
        error = torch.softmax(logits, 1, out=logits)  # in the same memory
        loss += (largest - error.gather(1, place).log() - own).sum()  # the largest share is at least 1 / padded
        if gradients:
            error.scatter_add_(1, target, error.new_full(target.shape, -1.0))  # the gradient of the logits
            error = error.to(rows.dtype)
            grad_hidden[start : start + size] = error @ matrix
            if error.dtype == grad_weight.dtype:
                grad_weight.addmm_(error.T, chunk)
            else:
                grad_weight += error.T @ chunk
    return loss, grad_hidden, grad_weight


def published(model: LanguageModel, config: Model) -> GPT2LMHeadModel:
    """The stock model over the same memory: exact vocabulary, `sdpa`, in evaluation mode; nothing is copied."""
    state = {name: tensor.detach() for name, tensor in model.gpt2.transformer.state_dict().items()}
    state["wte.weight"] = state["wte.weight"][: config.vocab_size]
    with torch.device("meta"):
        stock = GPT2LMHeadModel(gpt2_config(config, model.eos_token_id, training=False))
    stock.transformer.load_state_dict(state, assign=True)
    stock.tie_weights()
    return stock.eval()
