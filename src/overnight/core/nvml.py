"""NVML, NVIDIA's library about its cards and their driver, where this machine has it."""

from __future__ import annotations

from types import ModuleType


def nvml() -> ModuleType | None:
    """`pynvml`, ready for calls; None without nvidia-ml-py (the extra `gpu`), the library, or a driver under it.

    Any call on it may raise its `NVMLError`.
    """
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # no driver, or a container without one
        return None
    return pynvml
