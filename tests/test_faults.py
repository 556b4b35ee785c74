"""What torch, CUDA and the libraries around them say of a device, and what is taken for which fault."""

from functools import partial

import pytest
import torch

from overnight import cli
from overnight.device import faults
from overnight.device.faults import lost, out_of_memory, until_memory_runs_out

MEMORY = [
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB."),
    torch.cuda.OutOfMemoryError("boom"),
    torch.AcceleratorError("CUDA error: out of memory\nCompile with ..."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("backend='inductor' raised:\nOutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 MiB."),
]
LOST = [
    torch.AcceleratorError("CUDA error: unspecified launch failure\nSearch for `cudaErrorLaunchFailure' in ..."),
    torch.AcceleratorError("CUDA error: unknown error"),  # WSL after a sleep
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx( handle, ...)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_INTERNAL_ERROR when calling `cublasLtMatmul( ltHandle, ...)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_MAPPING_ERROR"),
    RuntimeError("CUDA driver error: unspecified launch failure"),
    RuntimeError("backend='inductor' raised:\nAcceleratorError: CUDA error: unspecified launch failure"),
    RuntimeError("Triton Error [CUDA]: unspecified launch failure"),
    RuntimeError("NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled cuda error"),
]
MISTAKES = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)"),
    RuntimeError("Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"),
    torch.AcceleratorError("CUDA error: device-side assert triggered\n"),  # a token outside of the vocabulary
    torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device"),
    RuntimeError("CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling `cublasSgemm( handle, ...)`"),
    RuntimeError("Triton Error [CUDA]: invalid argument"),
    torch.AcceleratorError("CUDA error: invalid device function"),
    RuntimeError("CUDA driver error: the provided PTX was compiled with an unsupported toolchain."),
    torch.AcceleratorError("CUDA error: invalid configuration argument"),
    ValueError("CUDA driver error: unspecified launch failure"),
    ValueError("CUDA out of memory. Tried to allocate 8.00 GiB."),
]


@pytest.mark.parametrize("error", MEMORY, ids=str)
def test_memory_that_runs_out_is_known_in_every_form_in_which_it_is_said(error):
    assert out_of_memory(error) and not lost(error)
    with until_memory_runs_out():
        raise error


@pytest.mark.parametrize("error", LOST, ids=str)
def test_a_lost_device_is_known_in_every_form_and_ends_a_script_with_one_line_and_75(error, capsys):
    assert lost(error) and not out_of_memory(error)
    assert cli.exit_code(partial(fail, error)) == 75
    (said,) = capsys.readouterr().err.splitlines()
    assert str(error).splitlines()[0] in said and "the same command continues" in said


@pytest.mark.parametrize("error", MISTAKES, ids=str)
def test_a_mistake_of_the_program_is_no_fault_of_the_device_and_stays_a_traceback(error, capsys):
    assert not lost(error) and not out_of_memory(error)
    with pytest.raises(type(error)), until_memory_runs_out():
        raise error
    with pytest.raises(type(error)):
        cli.exit_code(partial(fail, error))
    assert capsys.readouterr().err == ""


def fail(error: Exception) -> int:
    raise error


class Device:
    """Counts how often memory was given back."""

    released = 0

    def release(self):
        self.released += 1


def test_what_runs_out_of_memory_is_tried_once_more_with_all_of_it_given_back():
    device, calls = Device(), []

    def act(fails):
        calls.append(device.released)
        if len(calls) <= fails:
            raise torch.cuda.OutOfMemoryError("boom")
        return "done"

    assert faults.with_room(device, lambda: act(1)) == "done" and calls == [0, 1]
    calls.clear()
    with pytest.raises(torch.cuda.OutOfMemoryError):
        faults.with_room(device, lambda: act(9))
    assert len(calls) == 2
