"""Adds up the bytes that a step reads and writes: what Inductor says of its kernels, and the operands of operators.

A compiled kernel counts as Inductor counts it: every buffer that it reads or writes, once. An eager operator counts
every tensor that it reads and every one that it writes, once; views are free, and a look-up counts what it looks up. A
cache that holds a tensor between two kernels is not seen, so these are upper bounds.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from unittest import mock

from torch import Tensor
from torch._inductor.runtime.triton_heuristics import CachingAutotuner
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GEMM = re.compile(r"(add|_scaled_|b|badd)?b?mm")
FREE = re.compile(r"(new_)?empty.*|detach|alias|lift_fresh|_unsafe_view|_reshape_alias|_local_scalar_dense")
NOT_READ = re.compile(r"(new_)?(zeros|ones|full)(_like)?|fill_|zero_|nll_loss_backward")  # what their arguments hold
LOOK_UP = re.compile(r"gather|scatter_|scatter_add_|embedding|index|index_select|nll_loss_forward")


class Traffic(TorchDispatchMode):
    """Adds up what the operators and the compiled kernels of a step read and write, in bytes by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.kernels = 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled code stays compiled under this mode, which sees the operators that it calls."""
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        kind = "GEMM" if GEMM.fullmatch(name) else "attention" if "dot_product" in name else "eager"
        self.bytes[kind] += operator_bytes(func, name, args, kwargs or {}, out)
        return out

    def add_kernel(self, meta: dict) -> None:
        """One launch of a compiled kernel."""
        self.kernels += 1
        self.bytes["compiled"] += (meta.get("kernel_num_gb") or 0) * 1e9

    @property
    def moved(self) -> float:
        """Bytes of everything but matrix products and attention."""
        return self.bytes["compiled"] + self.bytes["eager"]


def operator_bytes(func, name: str, args: tuple, kwargs: dict, out: object) -> int:
    """What an operator reads and writes, each tensor once, in bytes."""
    if func.is_view or FREE.fullmatch(name):
        return 0
    given = dict(zip((each.name for each in func._schema.arguments), args, strict=False)) | kwargs
    in_place = [given.get(each.name) for each in func._schema.arguments if each.alias_info and each.alias_info.is_write]
    read = [given.get(each.name) for each in func._schema.arguments if not each.is_out]
    if NOT_READ.fullmatch(name):
        read = []
    elif name == "copy_":
        read = [given["src"]]
    leaves = [leaf for leaf in tree_leaves([read, in_place or out]) if isinstance(leaf, Tensor)]
    sizes = [tensor.numel() * tensor.element_size() for tensor in leaves]
    if LOOK_UP.fullmatch(name):
        sizes = [size for size in sizes if size < max(sizes)]  # all but the table
    return sum(sizes)


def counted(step: Callable[[], object]) -> Traffic:
    """The traffic of a step that has run twice before: compiled, and with gradients to add to."""
    launch = CachingAutotuner.run
    step()
    step()
    with Traffic() as traffic:

        def run(kernel, *args, **kwargs):
            traffic.add_kernel(kernel.inductor_meta)
            return launch(kernel, *args, **kwargs)

        with mock.patch.object(CachingAutotuner, "run", run):
            step()
    return traffic
