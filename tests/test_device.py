"""What a device is asked for on the way to training, and what a machine is told whose GPU cannot be used."""

import inspect
import re
from types import SimpleNamespace

import accelerate.utils.dataclasses
import accelerate.utils.launch
import pynvml
import pytest
import torch
from accelerate import Accelerator
from runs import ROOT, set_up, tiny

from overnight import cli
from overnight.core import nvml
from overnight.core.console import Console
from overnight.core.nvml import DetectedGpu, Driver
from overnight.device import device, launch
from overnight.device.device import Device, keep_large_blocks_whole
from overnight.doctor import unusable_gpu
from overnight.errors import InputError
from overnight.model.gpt2 import LanguageModel
from overnight.recipe.load import load
from overnight.training import setup
from overnight.training import train as train_module

RTX_4070 = DetectedGpu("NVIDIA GeForce RTX 4070", free_gib=11, total_gib=12, capability=(8, 9))
OLD = Driver("550.54", (12, 4), (RTX_4070,))
NEW = Driver("580.95", (13, 0), (RTX_4070,))


def raises(error):
    raise error


def lost(*arguments):
    raise torch.AcceleratorError("CUDA error: unspecified launch failure")


def test_all_that_accelerates_launcher_tells_beside_the_devices_is_overruled():
    source = inspect.getsource(accelerate.utils.launch) + inspect.getsource(accelerate.utils.dataclasses)
    names = set(re.findall(r"[\"']((?:ACCELERATE|FSDP|XLA|PARALLELISM_CONFIG|MEGATRON_LM)_[A-Z0-9_]+)[\"']", source))
    assert len(names) > 40
    told = dict.fromkeys(names, "true") | {"MEGATRON_LM_TP_DEGREE": "2", "CUDA_VISIBLE_DEVICES": "0"}
    (line,) = launch.take_over_environment(told)
    assert "use_megatron_lm true" in line and "use_fsdp true" in line and "use_deepspeed true" in line
    assert set(told) <= {*launch.OF_THE_DEVICES, "CUDA_VISIBLE_DEVICES"}


def test_a_rank_that_was_left_in_a_shell_makes_no_group_and_silences_nothing(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert cli.exit_code(lambda: raises(InputError("refused"))) == 2
    assert capsys.readouterr().err == "refused\n"
    told = {"RANK": "1", "LOCAL_RANK": "0"}
    assert "RANK, LOCAL_RANK in the environment is ignored" in launch.take_over_environment(told)[0]
    assert not told


def test_a_tracker_that_would_ask_for_a_key_is_refused_before_the_first_step(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)
    with pytest.raises(InputError, match="WANDB_MODE=offline"):
        launch.require_wandb_key({})
    launch.require_wandb_key({"WANDB_MODE": "offline"})
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password x")
    (tmp_path / ".netrc").chmod(0o600)
    launch.require_wandb_key({})


@pytest.fixture
def card(monkeypatch):
    """One CUDA device without NVML, as far as `Device` asks, and what its memory was capped at."""
    capped = []

    def set_fraction(share, device):
        if device.index is None:  # as torch has it
            raise ValueError(f"Expected a torch.device with a specified index or an integer, but got:{device}")
        capped.append(share)

    properties = SimpleNamespace(total_memory=12 * 2**30, uuid="0")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 4070")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (6 * 2**30, 12 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2**30)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", set_fraction)
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda uuid: uuid)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetTotalEnergyConsumption", lambda handle: 5000)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetPowerUsage", lambda handle: 168_000)
    return capped


def test_the_process_is_kept_below_the_memory_that_is_free_on_the_device_that_accelerate_names_without_a_number(card):
    assert Device(torch.device("cuda")).cap_memory() == pytest.approx(0.9 * 6 + 1)
    assert card == [pytest.approx(6.4 / 12)]


@pytest.mark.parametrize(
    "theirs", [{"PYTORCH_ALLOC_CONF": "expandable_segments:True"}, {"PYTORCH_CUDA_ALLOC_CONF": "x"}]
)
def test_the_allocator_cuts_no_large_block_unless_the_user_has_set_it_up_otherwise(theirs):
    nothing, theirs_before = {}, dict(theirs)
    keep_large_blocks_whole(nothing)
    keep_large_blocks_whole(theirs)
    assert nothing == {"PYTORCH_ALLOC_CONF": "max_split_size_mb:180"} and theirs == theirs_before


def test_power_and_energy_are_nvmls_and_without_it_or_its_counter_are_not_measured(card, monkeypatch):
    def measured():
        power = Device(torch.device("cuda")).power
        return power.watts(), power.joules()

    assert measured() == (168, 0)
    old, none = pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_LIBRARY_NOT_FOUND
    monkeypatch.setattr(pynvml, "nvmlDeviceGetTotalEnergyConsumption", lambda card: raises(pynvml.NVMLError(old)))
    assert measured() == (168, None)  # before Volta
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: raises(pynvml.NVMLError(none)))
    assert measured() == (None, None)


def test_tf32_on_cuda_leaves_the_products_of_the_cpu_exact():
    exact = torch.backends.mkldnn.matmul.fp32_precision
    device.allow_tf32()
    try:
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
        assert torch.backends.mkldnn.matmul.fp32_precision == exact != "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = "none"


class Queue(Device):
    """A device that does what it is given only when it is waited for, a second for each forward."""

    now = queued = 0

    def synchronize(self):
        self.now, self.queued = self.now + self.queued, 0


def test_the_clock_of_a_micro_batch_begins_when_the_device_has_done_what_it_was_given_before(in_process, monkeypatch):
    run = set_up(tiny(in_process, "--name", "clocked"))
    run.device, real = Queue(torch.device("cpu")), LanguageModel.forward

    def forward(self, ids, targets):
        run.device.queued += 1
        return real(self, ids, targets)

    monkeypatch.setattr(LanguageModel, "forward", forward)
    monkeypatch.setattr(setup.time, "monotonic", lambda: run.device.now)
    assert setup.first_steps(run)[1] == 1


@pytest.fixture
def beside_a_gpu(monkeypatch):
    """A machine whose PyTorch, built for CUDA 13.0, sees no device, and whose driver is the one that is given."""

    def make(driver, cuda="13.0"):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(unusable_gpu, "driver", lambda: driver)
        monkeypatch.setattr(torch.version, "cuda", cuda)

    return make


NIGHT, QUICKSTART = (load(ROOT / "recipes" / f"{name}.yaml") for name in ("fineweb_edu_40m", "quickstart"))


def test_weeks_on_the_cpu_beside_a_gpu_whose_driver_is_too_old_are_refused_with_the_driver_that_is_needed(
    beside_a_gpu, monkeypatch
):
    beside_a_gpu(OLD)
    monkeypatch.setattr(train_module, "open_data", lost)  # before anything else is looked at
    with pytest.raises(InputError) as caught:
        train_module.train(NIGHT)
    for part in ("NVIDIA GeForce RTX 4070", "driver 550.54", "needs driver 580 or newer", "days", "ubuntu-drivers"):
        assert part in str(caught.value)
    assert "`CUDA_VISIBLE_DEVICES=` before the command" in str(caught.value)
    beside_a_gpu(NEW)  # whatever the reason
    with pytest.raises(InputError, match="does not see the NVIDIA GeForce RTX 4070"):
        unusable_gpu.mind_unusable_gpu(NIGHT, Accelerator(cpu=True), Console())
    assert train_module.train(NIGHT, dry_run=True) == 0


@pytest.mark.parametrize(
    ("recipe", "driver", "cuda", "asked", "said"),
    [
        (QUICKSTART, OLD, "13.0", {}, "needs driver 580 or newer; this trains on the CPU"),  # minutes
        (NIGHT, OLD, "13.0", {"CUDA_VISIBLE_DEVICES": ""}, ""),
        (NIGHT, OLD, "13.0", {"ACCELERATE_USE_CPU": "true"}, ""),
        (NIGHT, OLD, None, {}, "built for CPUs, but here is a GPU (NVIDIA GeForce RTX 4070)"),  # not by mistake
        (NIGHT, None, "13.0", {}, ""),
    ],
)
def test_a_cpu_that_is_fast_enough_asked_for_or_all_there_is_trains_and_the_gpu_is_named(
    beside_a_gpu, monkeypatch, capsys, recipe, driver, cuda, asked, said
):
    beside_a_gpu(driver, cuda)
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    unusable_gpu.mind_unusable_gpu(recipe, Accelerator(cpu=True), Console())
    out = capsys.readouterr().out
    assert said in out and bool(said) == bool(out)


def test_a_card_that_is_older_than_the_kernels_of_pytorch_is_refused_before_anything_is_computed(card, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_120"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA GeForce GTX 1080")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (7 * 2**30, 8 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (6, 1))
    accelerator = SimpleNamespace(device=torch.device("cuda"), num_processes=1)
    with pytest.raises(InputError, match=r"GTX 1080, .*compute capability 6\.1; this PyTorch begins at 7\.5"):
        unusable_gpu.mind_unusable_gpu(QUICKSTART, accelerator, Console())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    unusable_gpu.mind_unusable_gpu(QUICKSTART, accelerator, Console())


@pytest.mark.parametrize("call", ["nvmlInit", "nvmlSystemGetCudaDriverVersion_v2", "nvmlDeviceGetMemoryInfo"])
def test_a_driver_that_does_not_answer_is_none(monkeypatch, call):
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlSystemGetCudaDriverVersion_v2", lambda: 13000)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 1)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index)
    monkeypatch.setattr(pynvml, call, lambda *handle: raises(pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)))
    assert nvml.driver() is None


def test_the_default_recipe_is_the_nights_also_where_the_card_does_not_answer(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lost)
    assert cli.default_recipe().name == "fineweb_edu_40m.yaml"
    assert "does not answer (CUDA error: unspecified launch failure)" in capsys.readouterr().out
