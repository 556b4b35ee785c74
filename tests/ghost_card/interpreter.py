"""What Triton's interpreter lacks to run the kernels that Inductor makes."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
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


def install() -> None:
    """Take functions of CUDA's libdevice from Triton itself, and have its atomics read broadcast operands rightly.

    Triton 3.7's interpreter reads a broadcast operand as if it lay contiguous: only its first column is added.
    """
    from torch._inductor.runtime import triton_helpers
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    triton_helpers.libdevice = SimpleNamespace(tanh=tanh, rsqrt=rsqrt, exp=exp, log=log, sqrt=sqrt)
    atomic = InterpreterBuilder.create_atomic_rmw

    def contiguous(handle: TensorHandle) -> TensorHandle:
        return TensorHandle(np.ascontiguousarray(handle.data), handle.dtype)

    def create_atomic_rmw(self, operation, pointer, value, mask, *rest):
        return atomic(self, operation, contiguous(pointer), contiguous(value), contiguous(mask), *rest)

    InterpreterBuilder.create_atomic_rmw = create_atomic_rmw
