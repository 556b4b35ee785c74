"""Ways to make the head's cross-entropy and its gradients, beside float64 in value and beside each other in cost.

Errors are of the loss (of itself) and of the two gradients (the largest difference, of the largest element). Bytes a
logit are those that move beside the matrix products: every operator reads its arguments and writes its results once,
a kernel of Inductor is one operator by Inductor's own account, and of all these only logits are counted. Times are
medians of rounds in which all take turns in one process, in ms: CPU time on a CPU, else time. MiB at once are what is
allocated beyond what was there.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch._inductor.config
import torch._inductor.virtualized
from loss_sides import OURS, WHOLE, Loss, sides  # the script beside this one
from memory import allocated_peak
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from overnight.planning.model_size import padded_vocabulary

ROWS = {"cpu": 2048, "cuda": 32 * 1024}
VALUES = 512  # rows of the comparison with float64
COUNTED = {"cpu": 250, "cuda": 2000}  # rows whose traffic is counted: one chunk, and no other side of a tensor
ONLY_WRITTEN = ("copy_", "fill_", "zero_", "nll_loss_backward")  # operators that do not read their first argument
OF_A_FEW = ("gather", "scatter_", "scatter_add_", "nll_loss_forward", "new_empty", "new_full", "empty_like", "set_")


class Inputs:
    """Hidden states, the head's matrix with and without its padding, targets, and where gradients are left."""

    def __init__(self, args: argparse.Namespace, rows: int):
        torch.manual_seed(0)
        self.device, self.dtype, self.vocabulary = args.device, getattr(torch, args.dtype), args.vocabulary
        self.hidden = torch.randn(rows, args.width).to(args.device).requires_grad_()
        padded = torch.randn(padded_vocabulary(args.vocabulary), args.width) * args.width**-0.5
        self.exact = padded[: args.vocabulary].clone().to(args.device).requires_grad_()
        self.padded = padded.to(args.device).requires_grad_()
        self.targets = torch.randint(args.vocabulary, (rows,)).to(args.device)

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def run(self, name: str, loss: Loss) -> tuple[Tensor, ...]:
        """A forward and backward: the loss, the gradients of the hidden states and of the exact vocabulary's rows."""
        self.hidden.grad = self.padded.grad = self.exact.grad = None
        weight = self.padded if name == OURS else self.exact
        with self.autocast():
            value = loss(self.hidden, weight, self.targets, self.vocabulary)
        value.backward()
        assert self.hidden.grad is not None and weight.grad is not None
        return value.detach(), self.hidden.grad, weight.grad[: self.vocabulary]

    def in_float64(self) -> tuple[Tensor, ...]:
        """The same by the whole logits in float64, on the CPU."""
        hidden, weight = (tensor.detach().cpu().double().requires_grad_() for tensor in (self.hidden, self.exact))
        logits = hidden @ weight.T
        loss = torch.nn.functional.cross_entropy(logits, self.targets.cpu(), reduction="sum")
        return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))


def errors(found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> list[float]:
    """The largest difference of each from float64, of the largest element."""
    return [float((a.cpu().double() - b).abs().max() / b.abs().max()) for a, b in zip(found, exact, strict=True)]


class Traffic(TorchDispatchMode):
    """Counts the bytes of logits, tensors of `shapes`, that operators and Inductor's kernels move."""

    def __init__(self, shapes: set[tuple[int, int]]):
        super().__init__()
        self.shapes, self.bytes = shapes, 0

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True  # torch.compile compiles under it

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        to_itself = name == "copy_" and args[0].data_ptr() == args[1].data_ptr()
        if "mm" not in name and name not in OF_A_FEW and not function.is_view and not to_itself:
            read = args[1:] if name in ONLY_WRITTEN else args
            moved = [each for each in tree_leaves((read, results)) if isinstance(each, Tensor)]
            self.bytes += sum(each.nbytes for each in moved if tuple(each.shape) in self.shapes)
        return results

    def of_kernels(self, nodes: list) -> list:
        """Inductor's kernels, as it is about to write them."""
        graph = torch._inductor.virtualized.V.graph
        for node in nodes:
            shapes = [tuple(graph.get_buffer(dep.name).get_size()) for dep in node.read_writes.reads_and_writes()]
            if not node.is_extern() and self.shapes & set(shapes):
                self.bytes += node.get_read_write_buffers_sizes()
        return nodes


def bytes_a_logit(args: argparse.Namespace, name: str, loss: Loss) -> float:
    """Bytes that move for each logit, by `Traffic`; 0 where all is one operator of PyTorch's."""
    inputs = Inputs(args, COUNTED[args.device])
    rows, columns = len(inputs.hidden), len(inputs.padded) if name == OURS else args.vocabulary
    traffic = Traffic({(rows, columns)})
    torch.compiler.reset()
    with torch._inductor.config.patch(_post_fusion_custom_pass=traffic.of_kernels, force_disable_caches=True), traffic:
        inputs.run(name, loss)
    torch.compiler.reset()
    return traffic.bytes / (rows * columns)


def seconds(device: str, run: Callable[[], object]) -> float:
    """CPU-seconds on a CPU, else the seconds until the device is done."""
    if device == "cpu":
        started = time.process_time()
        run()
        return time.process_time() - started
    torch.cuda.synchronize()
    started = time.monotonic()
    run()
    torch.cuda.synchronize()
    return time.monotonic() - started


def peak(device: str, run: Callable[[], object]) -> int:
    """Bytes that `run` had allocated at once, beyond what was there."""
    if device == "cpu":
        return allocated_peak(run)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def take_turns(args: argparse.Namespace, losses: dict[str, Loss]) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds and MiB at once of each; the first run of each, which compiles, is not timed."""
    inputs = Inputs(args, args.rows)
    times: dict[str, list[float]] = {name: [] for name in losses}
    mib = {}
    for name, loss in losses.items():
        inputs.run(name, loss)
        mib[name] = peak(args.device, lambda name=name, loss=loss: inputs.run(name, loss)) / 2**20
    for number in range(args.rounds):
        for name in list(losses)[:: 1 if number % 2 == 0 else -1]:
            times[name].append(seconds(args.device, lambda name=name: inputs.run(name, losses[name])))
    return {name: statistics.median(each) for name, each in times.items()}, mib


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=ROWS, default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rows", type=int, help="2,048 on a CPU, 32 x 1,024 on CUDA")
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--vocabulary", type=int, default=50_257)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    args.rows = args.rows or ROWS[args.device]
    torch.set_num_threads(args.threads)
    every = sides(args.device, getattr(torch, args.dtype))
    losses = {name: side for name, side in every.items() if not isinstance(side, str)}
    inputs = Inputs(args, min(args.rows, VALUES))
    exact = inputs.in_float64()
    wrong = {name: errors(inputs.run(name, loss), exact) for name, loss in losses.items()}
    moved = {name: bytes_a_logit(args, name, loss) for name, loss in losses.items()}
    middle, mib = take_turns(args, losses)
    where = f"{args.threads} threads" if args.device == "cpu" else torch.cuda.get_device_name()
    print(f"{args.dtype} on {where}: {args.rows} rows, vocabulary {args.vocabulary:,}, width {args.width},")
    print(f"errors at {len(inputs.hidden)} rows; medians of {args.rounds}")
    columns = f"{'error: loss':>11} {'hidden':>8} {'weight':>8} {'B/logit':>8} {'ms':>8} {'of whole':>9} {'MiB':>7}"
    print(f"{'':34} {columns}")
    for name, side in every.items():
        if isinstance(side, str):
            print(f"{name:34} not run: {side}")
            continue
        said = "".join(f"{each:{width}.1e} " for each, width in zip(wrong[name], (11, 8, 8), strict=True))
        counted = f"{moved[name]:8.1f}" if moved[name] else f"{'unseen':>8}"
        took = f"{1000 * middle[name]:8.1f} {middle[name] / middle[WHOLE]:9.2f}"
        print(f"{name:34} {said}{counted} {took} {mib[name]:7,.0f}")


if __name__ == "__main__":
    main()
