"""What Triton's interpreter lacks to run the kernels that Inductor makes."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
import triton
import triton.language as tl


@triton.jit
def tanh(x):
    small = tl.exp(-2.0 * tl.abs(x))
    positive = (1.0 - small) / (1.0 + small)
    return tl.where(x < 0, -positive, positive)


@triton.jit
def rsqrt(x):
    return 1.0 / tl.sqrt(x)


@triton.jit
def exp(x):
    return tl.exp(x)


@triton.jit
def log(x):
    return tl.log(x)


@triton.jit
def sqrt(x):
    return tl.sqrt(x)


@triton.jit
def largest(x, dim):
    return tl.max(x, dim)


def install() -> None:
    """Take functions of CUDA's libdevice from Triton itself, and have its atomics and its bf16 be as on a card."""
    from torch._inductor.runtime import triton_helpers

    triton_helpers.libdevice = SimpleNamespace(tanh=tanh, rsqrt=rsqrt, exp=exp, log=log, sqrt=sqrt)
    triton_helpers.max2 = largest  # Inductor's own goes element by element here, for the sake of nan
    read_broadcast_operands()
    round_to_nearest()


def read_broadcast_operands() -> None:
    """Triton 3.7's atomics read a broadcast operand as if it lay contiguous: only its first column would be added."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    atomic = InterpreterBuilder.create_atomic_rmw

    def contiguous(handle: TensorHandle) -> TensorHandle:
        return TensorHandle(np.ascontiguousarray(handle.data), handle.dtype)

    def create_atomic_rmw(self, operation, pointer, value, mask, *rest):
        return atomic(self, operation, contiguous(pointer), contiguous(value), contiguous(mask), *rest)

    InterpreterBuilder.create_atomic_rmw = create_atomic_rmw


def round_to_nearest() -> None:
    """Triton 3.7 cuts float32 off to bf16, which errs by a whole last bit to one side; a card rounds, ties to even."""
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(values: np.ndarray, given: tl.dtype, wanted: tl.dtype, mode) -> np.ndarray:
        if (given, wanted) != (tl.float32, tl.bfloat16):
            return convert(values, given, wanted, mode)
        return torch.tensor(values).bfloat16().view(torch.uint16).numpy()

    interpreter._convert_float = rounded
