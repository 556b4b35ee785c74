"""What is there: device, driver, versions, the order in which SDPA tries its kernels. Ends with 2 where no card is."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend

from overnight.core.files import atomic_write
from overnight.core.nvml import nvml
from overnight.device.device import Device
from overnight.doctor.machine import environment

OTHERS = ("triton", "pyarrow", "tokenizers", "fastokens", "liger-kernel", "lm_eval")


def card() -> dict[str, Any]:
    """What CUDA and the driver say of the first card."""
    found = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info()
    return {
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "total_gib": total / 2**30,
        "free_gib": free / 2**30,
        "cudnn": torch.backends.cudnn.version(),
        "sdpa_order": [SDPBackend(each).name for each in torch._C._get_sdp_priority_order()],
        "driver": driver(),
    }


def driver() -> dict[str, Any] | str:
    """NVML's own words, or why there are none."""
    pynvml = nvml()
    if pynvml is None:
        return "no NVML: nvidia-ml-py is not installed, or there is no driver under it"
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        return {
            "version": pynvml.nvmlSystemGetDriverVersion(),
            "power_limit_watts": pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000,
            "sm_clock_mhz": pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM),
        }
    except pynvml.NVMLError as error:
        return str(error)


def versions() -> dict[str, str | None]:
    """Of the packages that environment.json does not name; None where one is not installed."""
    installed = {
        each.metadata["Name"].lower().replace("_", "-"): each.version for each in importlib.metadata.distributions()
    }
    return {name: installed.get(name.replace("_", "-")) for name in OTHERS}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    chosen = parser.parse_args()
    if chosen.device == "cuda" and not torch.cuda.is_available():
        print("there is no CUDA device here; `make doctor` says what is missing", file=sys.stderr)
        return 2
    found = {"device": Device(torch.device(chosen.device)).name, "date": datetime.date.today().isoformat()}
    found |= environment() | {"others": versions()} | (card() if chosen.device == "cuda" else {})
    atomic_write(chosen.json, json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
