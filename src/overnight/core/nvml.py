"""NVML, NVIDIA's library about its cards and their driver, where this machine has it."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType


@dataclass(frozen=True)
class DetectedGpu:
    """A GPU of this machine."""

    name: str
    free_gib: float
    total_gib: float
    capability: tuple[int, int]


@dataclass(frozen=True)
class Driver:
    """The NVIDIA driver: its version, the newest CUDA it can run, and its GPUs."""

    version: str
    cuda: tuple[int, int]
    gpus: tuple[DetectedGpu, ...]


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


def driver() -> Driver | None:
    """The driver and its GPUs; None where there is none, as in some containers, or no answer."""
    pynvml = nvml()
    if pynvml is None:
        return None
    try:
        cuda = pynvml.nvmlSystemGetCudaDriverVersion_v2()
        gpus = tuple(_gpu(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount()))
        return Driver(pynvml.nvmlSystemGetDriverVersion(), (cuda // 1000, cuda % 1000 // 10), gpus)
    except pynvml.NVMLError:
        return None


def _gpu(pynvml: ModuleType, index: int) -> DetectedGpu:
    card = pynvml.nvmlDeviceGetHandleByIndex(index)
    memory = pynvml.nvmlDeviceGetMemoryInfo(card)
    capability = tuple(pynvml.nvmlDeviceGetCudaComputeCapability(card))
    return DetectedGpu(pynvml.nvmlDeviceGetName(card), memory.free / 2**30, memory.total / 2**30, capability)
