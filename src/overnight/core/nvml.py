"""NVML, NVIDIA's library about its cards and their driver, where this machine has it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any


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


def nvml() -> Any | None:
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
    """The driver and its GPUs, at least one; None where there is none, as in some containers, or no answer."""
    pynvml = nvml()
    if pynvml is None:
        return None
    try:
        cuda = pynvml.nvmlSystemGetCudaDriverVersion_v2()
        gpus = tuple(_gpu(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount()))
        version = pynvml.nvmlSystemGetDriverVersion()
        return Driver(version, (cuda // 1000, cuda % 1000 // 10), gpus) if gpus else None
    except pynvml.NVMLError:
        return None


def _gpu(pynvml: Any, index: int) -> DetectedGpu:
    card = pynvml.nvmlDeviceGetHandleByIndex(index)
    memory = pynvml.nvmlDeviceGetMemoryInfo(card)
    capability = tuple(pynvml.nvmlDeviceGetCudaComputeCapability(card))
    return DetectedGpu(pynvml.nvmlDeviceGetName(card), memory.free / 2**30, memory.total / 2**30, capability)


class PowerMeter:
    """What the board of a card takes; nothing is known without a card and NVML, and no energy before Volta.

    Any reading may raise NVML's errors.
    """

    def __init__(self, uuid: str | None):
        self._nvml: Any = nvml() if uuid else None
        self._card, self._before = None, None
        if self._nvml:
            with suppress(self._nvml.NVMLError):
                self._card = self._nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
                self._before = self._counter()

    def _counter(self) -> float:
        """Joules since the driver was loaded."""
        return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._card) / 1000

    def watts(self) -> float | None:
        """Board power now."""
        return self._nvml.nvmlDeviceGetPowerUsage(self._card) / 1000 if self._card is not None else None

    def joules(self) -> float | None:
        """Energy since this object was made."""
        return None if self._before is None else self._counter() - self._before
