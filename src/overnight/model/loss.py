"""The head's cross-entropy, summed: logits are made, turned into their own gradient and used up, chunk by chunk.

The logits are by far the largest tensor of a step, so what counts is how often their bytes move. Between the matrix
products a chunk of them is read and overwritten once, by one kernel where it is compiled.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from overnight.planning import model_size


def summed_loss(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, *, compile: bool = False) -> Tensor:
    """Cross-entropy of `targets` (n,) under `hidden` (n, n_embd) @ `weight` (padded, n_embd).T: a float32 sum in nats.

    Columns from `vocab_size` on do not take part. The products are in autocast's type, all else in float32. With
    `compile` a process compiles once for the first number of rows that a chunk has and once for any other, apart for
    training and for validation; a chunk of a single row is one more case.
    """
    if torch.is_grad_enabled():
        return _SummedLoss.apply(hidden, weight, targets, vocab_size, compile)
    return _loss_and_gradients(hidden, weight, targets, vocab_size, compile, gradients=False)[0]


class _SummedLoss(torch.autograd.Function):
    """The loss with its gradients made in the forward, while a chunk's logits are at hand: nothing is recomputed."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, vocab_size, compile):
        loss, *gradients = _loss_and_gradients(hidden, weight, targets, vocab_size, compile, gradients=True)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden.mul_(grad_loss), grad_weight.mul_(grad_loss), None, None, None


def _loss_and_gradients(hidden, weight, targets, vocab_size, compile, *, gradients):
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    rows, matrix = hidden.to(dtype), weight.to(dtype)
    loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
    grad_hidden = torch.zeros_like(hidden if gradients else hidden[:0])
    grad_weight = torch.zeros_like(weight if gradients else weight[:0])
    size = model_size.LOSS_CHUNK[device, compile]
    buffer = rows.new_empty(min(size, len(rows)), len(matrix))  # for all chunks: fresh memory costs a CPU page faults
    to_softmax = compiled_softmax() if compile else softmax_
    for start in range(0, len(rows), size):
        chunk, target = rows[start : start + size], targets[start : start + size, None]
        logits = torch.mm(chunk, matrix.T, out=buffer[: len(chunk)])  # (chunk, padded)
        own = logits.gather(1, target).float()
        log_sum_exp = to_softmax(logits, vocab_size, gradients)
        loss += (log_sum_exp - own).sum()
        if gradients:
            logits.scatter_(1, target, torch.expm1(own - log_sum_exp).to(dtype))  # and so the gradient of the logits
            add_product(grad_hidden[start : start + size], logits, matrix)
            add_product(grad_weight, logits.T, chunk)
    return loss, grad_hidden, grad_weight


def softmax_(logits: Tensor, vocab_size: int, keep: bool) -> Tensor:
    """The log of each row's sum of exponentials, (n, 1) float32; if `keep`, `logits` (n, padded) become their softmax.

    Columns from `vocab_size` on count as minus infinity. In float32 inside, and rounded once. What is not kept is lost.
    """
    values = logits.float()  # float32 logits themselves, and a copy of others
    values[:, vocab_size:] = -torch.inf
    largest = values.amax(1, keepdim=True)
    torch.softmax(values, 1, out=values)
    if keep:
        logits.copy_(values)
    return largest - values.amax(1, keepdim=True).log()  # the largest probability is one over the sum: no underflow


def softmax_to_compile_(logits: Tensor, vocab_size: int, keep: bool) -> Tensor:
    """`softmax_` in the operations of which Inductor makes one kernel: it reads a row twice in turn and writes it once.

    By its count 4 bytes move for each bf16 logit, 2 without `keep`; 2 more where the cache is too small for the rows in
    hand.
    """
    values = logits.float()
    values[:, vocab_size:] = -torch.inf
    largest = values.amax(1, keepdim=True)
    values = (values - largest).exp()
    total = values.sum(1, keepdim=True)
    if keep:
        logits.copy_(values / total)
    return largest + total.log()


@functools.cache
def compiled_softmax() -> Callable[[Tensor, int, bool], Tensor]:
    """The compiled form, one for the process."""
    return torch.compile(softmax_to_compile_, fullgraph=True)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add `left` @ `right` to `total` in the type of `total`, on CUDA inside of the GEMM; its factors may be bf16."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif left.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += left @ right  # rounded: a CPU has no GEMM of two types
