"""Operators of the ghost card, computed by the CPU's own kernels: its memory is the host's, so they work in place.

What the CPU has no kernel for stays a launch, and the card refuses it: a value is never left out in silence.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

# These make a tensor, or another view of one; they compute nothing.
BOOKKEEPING = {
    *("empty", "empty_strided", "as_strided", "set_", "resize_", "view", "_reshape_alias", "record_stream"),
    *("is_pinned", "_pin_memory", "detach", "alias", "_efficientzerotensor", "lift", "lift_fresh"),
    *("_resize_output_", "_local_scalar_dense"),
}
# These have no CUDA kernel of their own: they launch those of others.
COPIES = ["copy_", "_to_copy"]
FACTORIES = [
    *("zeros_like", "ones_like", "full_like", "zeros", "ones", "full", "arange", "linspace", "randint", "rand"),
    *("randn", "randperm", "scalar_tensor", "new_zeros", "new_ones", "new_full"),
]
UNSEEN = ThreadPoolExecutor(1)  # a profiler records its own thread: it sees the card's attention, not the host's
UNKNOWN = 1.0  # a small result of what is too large to compute: finite, and no one's loss


def on_host(value: Any) -> Any:
    """The same memory as a CPU tensor; what is no tensor of the card is returned as it is."""
    if not isinstance(value, Tensor) or value.device.type != "cuda":
        return value
    storage = value.untyped_storage()
    if not storage.nbytes():
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    raw = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    return torch.empty(0, dtype=value.dtype).set_(raw, value.storage_offset(), value.shape, value.stride())


def on_card(value: Any) -> Any:
    """A copy of a CPU tensor in the card's memory, laid out as it is."""
    if not isinstance(value, Tensor) or value.device.type != "cpu":
        return value
    there = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")
    on_host(there).copy_(value)
    return there


class OnHost:
    """One operator of the card, computed by the CPU's kernel of the same operator.

    With a `limit`, only where no tensor has more elements: larger results are then memory that nobody wrote.
    """

    def __init__(self, operator: Any, limit: int | None):
        self.operator, self.limit = operator, limit
        arguments = operator._schema.arguments
        written = [(i, a) for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]
        self.written = (written[0][0], written[0][1].name) if written else None
        self.outputs = [argument.name for argument in arguments if argument.is_out]
        self.returns = bool(operator._schema.returns)

    def __call__(self, *args, **kwargs):
        if lost():
            torch.cuda.synchronize()  # raises, as the launch would
        if self.limit is not None and self.too_large(args, kwargs):
            return self.left_out(args, kwargs)
        here = {key: self.place(key, value) for key, value in kwargs.items()}
        result = self.operator(*tree_map(on_host, args), **here)
        for name in self.outputs:  # one that was given empty has been resized, which the card's own has to be as well
            if isinstance(kwargs.get(name), Tensor) and kwargs[name].shape != here[name].shape:
                kwargs[name].resize_(here[name].shape)
                on_host(kwargs[name]).copy_(here[name])
        if not self.returns or torch.device(kwargs.get("device") or "cuda").type != "cuda":
            return result if self.returns else None
        return self.given(args, kwargs) if self.written else tree_map(on_card, result)

    def too_large(self, args: tuple, kwargs: dict) -> bool:
        """Whether a tensor has more elements than the limit; what crosses to or from the host is always copied."""
        values = tree_flatten((args, kwargs))[0]
        tensors = [value for value in values if isinstance(value, Tensor)]
        crosses = kwargs.get("device") == torch.device("cpu") or any(tensor.is_cpu for tensor in tensors)
        return not crosses and any(tensor.numel() > self.limit for tensor in tensors)

    def place(self, key: str, value: Any) -> Any:
        """A keyword argument for the CPU's kernel."""
        if key == "device":
            return torch.device("cpu")
        if key in self.outputs and isinstance(value, Tensor) and not value.numel():
            return torch.empty(0, dtype=value.dtype)
        return tree_map(on_host, value)

    def given(self, args: tuple, kwargs: dict) -> Any:
        """What an operator returns that writes into its arguments."""
        if len(self.outputs) > 1:
            return tuple(kwargs[name] for name in self.outputs)
        assert self.written
        at, name = self.written
        return kwargs[name] if name in kwargs else args[at]

    def left_out(self, args: tuple, kwargs: dict) -> Any:
        """Results of the right shape; the small ones are `UNKNOWN`, so that a host's decision finds a number."""
        if not self.returns:
            return None
        if self.written:
            return self.given(args, kwargs)
        shapes = {key: torch.device("meta") if key == "device" else to_meta(value) for key, value in kwargs.items()}
        return tree_map(self.unwritten, self.operator(*tree_map(to_meta, args), **shapes))

    def unwritten(self, shape: Any) -> Any:
        """A tensor of the card with the shape of a meta tensor."""
        if not isinstance(shape, Tensor):
            return shape
        made = torch.empty_strided(shape.shape, shape.stride(), dtype=shape.dtype, device="cuda")
        if self.limit is not None and made.numel() <= self.limit:
            on_host(made).fill_(UNKNOWN)
        return made


def to_meta(value: Any) -> Any:
    """A tensor without memory in place of one with it."""
    return tree_map(lambda each: each.to("meta") if isinstance(each, Tensor) else each, value)


def lost() -> bool:
    """Whether a test has taken the device away."""
    return bool(ghost().card_is_lost())


def ghost() -> ctypes.CDLL:
    """The card's library, whose functions arm faults and tell what happened."""
    return ctypes.CDLL(None)


def rows_first(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """(batch, heads, time, width) on the card, laid out as (batch, time, heads, width) as CUDA's attention does."""
    return on_card(tensor.to(dtype).transpose(1, 2).contiguous().transpose(1, 2))


def attend(query, key, value, dropout, causal, scale, mask=None):
    """Output and log-sum-exp by the CPU's flash attention in float32."""
    q, k, v = (on_host(tensor).float() for tensor in (query, key, value))
    mask = None if mask is None else on_host(mask).float()
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = UNSEEN.submit(kernel, q, k, v, dropout, causal, attn_mask=mask, scale=scale).result()
    return rows_first(out, query.dtype), on_card(lse.contiguous())


def attend_backward(grad, query, key, value, out, lse, dropout, causal, scale, mask=None):
    """The gradients of query, key and value."""
    tensors = [on_host(tensor).float() for tensor in (grad, query, key, value, out)]
    mask = None if mask is None else on_host(mask).float()
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    gradients = UNSEEN.submit(kernel, *tensors, on_host(lse), dropout, causal, attn_mask=mask, scale=scale).result()
    return tuple(rows_first(gradient, query.dtype) for gradient in gradients)


def nothing(dtype: torch.dtype = torch.int64, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def flash(query, key, value, dropout=0.0, causal=False, debug=False, *, scale=None):
    out, lse = attend(query, key, value, dropout, causal, scale)
    time = query.shape[2]
    return out, lse, Tensor(), Tensor(), time, time, nothing(torch.uint64, 2), nothing(), nothing(query.dtype, 0)


def flash_backward(
    grad, query, key, value, out, lse, cum_q, cum_k, max_q, max_k, dropout, causal, seed, offset, *, scale=None
):
    return attend_backward(grad, query, key, value, out, lse, dropout, causal, scale)


def cudnn(query, key, value, bias, with_lse, dropout=0.0, causal=False, debug=False, *, scale=None):
    return flash(query, key, value, dropout, causal, debug, scale=scale)


def cudnn_backward(
    grad, query, key, value, out, lse, seed, offset, bias, cum_q, cum_k, max_q, max_k, dropout, causal, *, scale=None
):
    return attend_backward(grad, query, key, value, out, lse, dropout, causal, scale)


def cudnn_left_out(query, key, value, bias, with_lse, dropout=0.0, causal=False, debug=False, *, scale=None):
    """What cuDNN's attention returns, laid out as it does and left unwritten: cuDNN cannot be opened on this card."""
    batch, heads, time, width = query.shape
    out = nothing(query.dtype, batch, time, heads, width).transpose(1, 2)
    log_sum_exp = nothing(torch.float32, batch, heads, time, 1)
    return out, log_sum_exp, Tensor(), Tensor(), time, time, nothing(), nothing(), Tensor()


def cudnn_left_out_backward(grad, query, key, value, *rest, scale=None):
    return tuple(map(torch.empty_like, (query, key, value)))


def efficient(query, key, value, bias, with_lse, dropout=0.0, causal=False, *, scale=None):
    return *attend(query, key, value, dropout, causal, scale, bias), nothing(), nothing()


def efficient_backward(
    grad, query, key, value, bias, out, lse, seed, offset, dropout, wanted, causal=False, *, scale=None
):
    gradients = attend_backward(grad, query, key, value, out, lse, dropout, causal, scale, bias)
    return *gradients, nothing(query.dtype, 0)


def addmm_in_another_type(added, left, right, out_dtype, *, beta=1, alpha=1, out):
    product = on_host(left).to(out_dtype) @ on_host(right).to(out_dtype)
    on_host(out).copy_(beta * on_host(added).to(out_dtype) + alpha * product)
    return out


# What the CPU has under another name, or not at all.
BY_HAND: dict[str, Callable] = {
    "_scaled_dot_product_flash_attention": flash,
    "_scaled_dot_product_flash_attention_backward": flash_backward,
    "_scaled_dot_product_cudnn_attention": cudnn,
    "_scaled_dot_product_cudnn_attention_backward": cudnn_backward,
    "_scaled_dot_product_efficient_attention": efficient,
    "_scaled_dot_product_efficient_attention_backward": efficient_backward,
    "addmm.dtype_out": addmm_in_another_type,
}
# What is no launch that does nothing, where nothing large is computed.
LEFT_OUT: dict[str, Callable] = {
    "_scaled_dot_product_cudnn_attention": cudnn_left_out,
    "_scaled_dot_product_cudnn_attention_backward": cudnn_left_out_backward,
}


def install(limit: int | None = None) -> torch.library.Library:
    """Put the CPU's kernels in place of the card's, for as long as the result lives.

    Without a `limit` on the elements of a tensor every launch that is left is refused.
    """
    library = torch.library.Library("aten", "IMPL")
    for qualified in torch._C._dispatch_get_registrations_for_dispatch_key("CUDA"):
        namespace, _, name = qualified.partition("::")
        packet, _, overload = name.partition(".")
        if namespace != "aten" or packet in BOOKKEEPING or name in BY_HAND:
            continue
        if torch._C._dispatch_has_computed_kernel_for_dispatch_key(qualified, "CPU"):
            operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
            library.impl(name, OnHost(operator, limit), "CUDA", allow_override=True)
    for packet in COPIES if limit else COPIES + FACTORIES:
        for overload in getattr(torch.ops.aten, packet).overloads():
            operator = getattr(getattr(torch.ops.aten, packet), overload)
            taken = {argument.name for argument in operator._schema.arguments} & {"names", "generator"}
            if "out" not in overload and not taken:
                name = packet if overload == "default" else f"{packet}.{overload}"
                library.impl(name, OnHost(operator, limit), "CUDA", allow_override=True)
    for name, function in (LEFT_OUT if limit else BY_HAND).items():
        library.impl(name, function, "CUDA", allow_override=True)
    if limit is None:
        ghost().ghost_refuse_launches()
    return library
