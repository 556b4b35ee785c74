"""The ways to make the head's cross-entropy that loss.py compares: all take (hidden, weight, targets, vocabulary).

`hidden` (n, width) and `weight` (vocabulary, width) are float32, and only ours takes a `weight` with more rows. The
products are in autocast's type. The result is the sum over the targets, float32, in nats.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from overnight.model.loss import summed_loss
from overnight.planning import model_size

Loss = Callable[[Tensor, Tensor, Tensor, int], Tensor]
OURS, EAGER, WHOLE, COMPILED = "ours", "chunked, eager", "whole logits", "whole logits, compiled"
LIGER, TORCH = "Liger's fused linear cross-entropy", "torch's linear_cross_entropy"


def whole_logits(hidden: Tensor, weight: Tensor, targets: Tensor, vocabulary: int) -> Tensor:
    """As it is written down: the logits whole."""
    return F.cross_entropy((hidden @ weight.T).float(), targets, reduction="sum")


def chunked_eager(hidden: Tensor, weight: Tensor, targets: Tensor, vocabulary: int) -> Tensor:
    """Chunk by chunk, one operator after the other over float32 logits: what ours was before it was compiled."""
    return ChunkedEager.apply(hidden, weight, targets, vocabulary)


class ChunkedEager(torch.autograd.Function):
    """The gradients are made in the forward; the gradient of a chunk's logits stands in the logits' memory."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, vocabulary):
        dtype = in_type(hidden)
        rows, matrix = hidden.to(dtype), weight.to(dtype)
        loss, grad_hidden, grad_weight = hidden.new_zeros(()), torch.empty_like(hidden), torch.zeros_like(weight)
        size = model_size.LOSS_CHUNK[hidden.device.type, False]
        buffer = rows.new_empty(min(size, len(rows)), len(matrix))
        in_float32 = torch.empty_like(buffer, dtype=torch.float32)
        for start in range(0, len(rows), size):
            chunk, target = rows[start : start + size], targets[start : start + size, None]
            made = torch.mm(chunk, matrix.T, out=buffer[: len(chunk)])
            logits = made if dtype == torch.float32 else in_float32[: len(chunk)].copy_(made)
            logits[:, vocabulary:] = -torch.inf
            own, (largest, place) = logits.gather(1, target), logits.max(dim=1, keepdim=True)
            torch.softmax(logits, 1, out=logits)
            loss += (largest - logits.gather(1, place).log() - own).sum()
            logits.scatter_add_(1, target, logits.new_full(target.shape, -1.0))
            error = logits.to(dtype)
            grad_hidden[start : start + size] = error @ matrix
            if dtype == torch.float32:
                grad_weight.addmm_(error.T, chunk)
            else:
                grad_weight += error.T @ chunk
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden.mul_(grad_loss), grad_weight.mul_(grad_loss), None, None


def in_type(tensor: Tensor) -> torch.dtype:
    """Autocast's type, or the tensor's own."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def torch_chunked(hidden: Tensor, weight: Tensor, targets: Tensor, vocabulary: int) -> Tensor:
    """PyTorch's own chunked loss, new in 2.13. It does not know of autocast."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=model_size.LOSS_CHUNK[hidden.device.type, False])
    hidden, weight = hidden.to(in_type(hidden)), weight.to(in_type(weight))
    return F.linear_cross_entropy(hidden, weight, targets, reduction="sum", options=options).float()


def of_liger(module: ModuleType) -> Loss:
    """Liger's fused linear cross-entropy, whose chunks are as wide as the vocabulary is wider than the rows."""

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor, vocabulary: int) -> Tensor:
        loss = module.LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32)
        return loss(weight.to(in_type(weight)), hidden.to(in_type(hidden)), targets).float()

    return loss


def sides(device: str, dtype: torch.dtype) -> dict[str, Loss | str]:
    """Every side by its name, or why it is not run. Ours is compiled as in training, and on a CPU in bf16 too."""
    return {
        OURS: partial(summed_loss, compile=device == "cuda" or dtype != torch.float32),
        EAGER: chunked_eager,
        WHOLE: whole_logits,
        COMPILED: torch.compile(whole_logits, dynamic=False, fullgraph=True),
        TORCH: torch_chunked if hasattr(F, "linear_cross_entropy") else "new in PyTorch 2.13",
        LIGER: liger(device),
    }


def liger(device: str) -> Loss | str:
    """Liger's, where it is installed: its kernels are Triton's."""
    if device != "cuda":
        return "needs CUDA"
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    return of_liger(importlib.import_module("liger_kernel.transformers"))
