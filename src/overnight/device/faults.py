"""What a device does beside computing: its memory runs out, or it is lost. Which it was, and what is done about it."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from overnight.device.device import Device
from overnight.errors import EXIT_INTERRUPTED, first_line

T = TypeVar("T")

# In the words of CUDA, and of torch, Triton and its libraries, which pass them on in errors of several types.
OUT_OF_MEMORY = re.compile(
    r"CUDA out of memory|(CUDA|driver) error: out of memory|\[CUDA\]: out of memory|STATUS_ALLOC_FAILED"
)
LOST = re.compile(
    r"AcceleratorError|Triton Error \[CUDA\]|CUDA driver error|NCCL error"
    r"|(CUBLAS|CUDNN)_STATUS_(NOT_INITIALIZED|EXECUTION_FAILED|INTERNAL_ERROR|MAPPING_ERROR)"
)
# The same again each time, and so mistakes of the program.
MISTAKE = re.compile(
    r"invalid argument|invalid configuration|invalid device function|no kernel image|unsupported toolchain"
    r"|device-side assert"
)


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that the device's memory ran out."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(OUT_OF_MEMORY.search(str(error)))


def lost(error: Exception) -> bool:
    """Whether an error says that this process can compute nothing more on its device, and another one might.

    After a driver update, an Xid, a laptop's sleep, or WSL's, every call fails. A mistake of the program is none of it.
    """
    if not isinstance(error, RuntimeError) or out_of_memory(error) or MISTAKE.search(str(error)):
        return False
    return isinstance(error, torch.AcceleratorError) or bool(LOST.search(str(error)))


@contextlib.contextmanager
def until_memory_runs_out() -> Iterator[None]:
    """Leave the block, and nothing more, when memory runs out in it: what follows must find out whether it was done."""
    try:
        yield
    except RuntimeError as error:
        if not out_of_memory(error):
            raise


def with_room(device: Device, act: Callable[[], T]) -> T:
    """What `act` returns; out of memory, it is tried once more when all memory was given back that holds nothing."""
    with until_memory_runs_out():
        return act()
    device.release()
    return act()


def told(error: Exception) -> str:
    """One line on what happened to the device; raises `error` again where nothing did."""
    if out_of_memory(error):
        return f"out of memory ({first_line(error)}): `nvidia-smi` shows what else holds the device's memory"
    if lost(error):
        return f"the device was lost ({first_line(error)}): a sleep, the driver, or the hardware took it away"
    raise error


def end(
    error: RuntimeError, goes_on: str = "what was done so far is kept, and the same command continues from there"
) -> int:
    """Say what happened to the device and how to continue, and return 75; raises `error` again where nothing happened.

    Where other processes wait for this one, only its end releases them, and an orderly one would wait for them.
    """
    print(f"{told(error)}; {goes_on}", file=sys.stderr, flush=True)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os._exit(EXIT_INTERRUPTED)
    return EXIT_INTERRUPTED
