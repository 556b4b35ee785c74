"""Times ways to make the head's cross-entropy and its gradients: ours, the stock one, torch's chunked one, checkpoints.

Forward and backward in float32 on the CPU, taking turns in one process; CPU-seconds, medians. The memory is what the
operators allocate at once at most. Only ours has its vocabulary padded.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from memory import allocated_peak  # the script beside this one
from torch import Tensor
from torch.nn import LinearCrossEntropyOptions
from torch.utils.checkpoint import checkpoint

from overnight.model import summed_loss
from overnight.plan import LOSS_CHUNK, padded_vocabulary

Loss = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def stock(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """The logits whole."""
    return F.cross_entropy(hidden @ weight.T, targets, reduction="sum")


def torch_chunked(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """PyTorch's own chunked loss, new in 2.13."""
    options = LinearCrossEntropyOptions(batch_chunk_size=LOSS_CHUNK["cpu"])
    return F.linear_cross_entropy(hidden, weight, targets, reduction="sum", options=options)


def checkpointed(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """A loop over chunks whose logits are made again in the backward."""
    loss = hidden.new_zeros(())
    for rows, wanted in zip(hidden.split(LOSS_CHUNK["cpu"]), targets.split(LOSS_CHUNK["cpu"]), strict=True):
        loss = loss + checkpoint(stock, rows, weight, wanted, vocab_size, use_reentrant=False)
    return loss


SIDES: dict[str, Loss] = {
    "ours": summed_loss,
    "stock cross-entropy": stock,
    "torch's linear_cross_entropy": torch_chunked,
    "checkpointed chunks": checkpointed,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--vocabulary", type=int, default=50_257)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    hidden = torch.randn(args.rows, args.width).requires_grad_()
    weight = (torch.randn(padded_vocabulary(args.vocabulary), args.width) * 0.02).requires_grad_()
    exact = weight[: args.vocabulary].detach().clone().requires_grad_()
    targets = torch.randint(args.vocabulary, (args.rows,))

    def once(loss: Loss) -> float:
        hidden.grad = weight.grad = exact.grad = None
        started = time.process_time()
        loss(hidden, weight if loss is summed_loss else exact, targets, args.vocabulary).backward()
        return time.process_time() - started

    peaks = {name: allocated_peak(lambda loss=loss: once(loss)) / 2**20 for name, loss in SIDES.items()}
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    for number in range(args.rounds):
        for name in list(SIDES)[:: 1 if number % 2 == 0 else -1]:
            seconds[name].append(once(SIDES[name]))
    print(f"{args.rows} rows, vocabulary {args.vocabulary:,}, width {args.width}, chunks of {LOSS_CHUNK['cpu']} rows,")
    print(f"{args.threads} threads, medians of {args.rounds}")
    print(f"{'':30} {'CPU-seconds':>11} {'of stock':>9} {'MiB at once':>12}")
    base = statistics.median(seconds["stock cross-entropy"])
    for name, values in seconds.items():
        middle = statistics.median(values)
        print(f"{name:30} {middle:11.2f} {middle / base:9.2f} {peaks[name]:12,.0f}")


if __name__ == "__main__":
    main()
