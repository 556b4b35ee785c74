"""The memory that is said of a training step is the memory that a training step takes."""

import importlib.util
from pathlib import Path

import pytest
import torch

from overnight.model.gpt2 import LanguageModel
from overnight.model.optim import build
from overnight.planning.model_size import beside_the_tensors, peak_memory
from overnight.recipe.schema import Model, Optim

SHAPE = Model(n_layer=2, n_head=2, n_embd=64, n_positions=128, vocab_size=2000)
ROWS, LENGTH, CHUNK = 4, 128, 256


@pytest.fixture(scope="module")
def memory():
    root = Path(__file__).resolve().parents[1]
    spec = importlib.util.spec_from_file_location("memory", root / "benchmarks" / "memory.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def traced(memory):
    """Peaks of the step by (optimizer, rows), traced with fake tensors."""
    asked = [("muon", ROWS), ("adamw", ROWS), ("muon", 2)]
    return {
        (name, rows): memory.traced_peak(lambda name=name: memory.our_step(SHAPE, name), rows, LENGTH, chunk=CHUNK)
        for name, rows in asked
    }


# Under bf16 a CPU adds bf16 to float32 by way of a copy inside the operator, which no trace sees: here 4 %.
@pytest.mark.parametrize(("precision", "within"), [(torch.float32, 0.01), (torch.bfloat16, 0.05)], ids=str)
def test_the_traced_peak_is_that_of_a_real_step(memory, precision, within):
    traced = memory.traced_peak(lambda: memory.our_step(SHAPE, "muon"), ROWS, LENGTH, precision=precision, chunk=CHUNK)
    torch.manual_seed(0)
    model = LanguageModel(SHAPE, 0, compile=False)
    step = memory.Step(model, build(model, Optim()), model)
    with memory.loss_chunk(CHUNK):
        memory.iteration(step, 1, LENGTH, precision)
        peak = memory.allocated_peak(lambda: memory.iteration(step, ROWS, LENGTH, precision))
    tensors = list(model.parameters())
    states = [state for optimizer in step.optimizers for state in optimizer.state.values()]
    tensors += [value for state in states for value in state.values()]
    there = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert peak + there == pytest.approx(traced, rel=within)


def test_the_formula_knows_float32(memory):
    precision = torch.float32
    traced = memory.traced_peak(lambda: memory.our_step(SHAPE, "muon"), ROWS, LENGTH, precision=precision, chunk=CHUNK)
    formula = peak_memory(SHAPE, ROWS, sequence_length=LENGTH, chunk=CHUNK, compiled=False, bf16=False)
    assert formula == pytest.approx(traced, rel=0.01)


@pytest.mark.parametrize(("optimizer", "rows"), [("muon", ROWS), ("adamw", ROWS), ("muon", 2)])
def test_the_formula_gives_the_traced_peak(traced, optimizer, rows):
    formula = peak_memory(SHAPE, rows, sequence_length=LENGTH, optimizer=optimizer, chunk=CHUNK, compiled=False)
    assert formula == pytest.approx(traced[optimizer, rows], rel=0.01)


def test_our_step_fits_twice_the_rows_of_the_stock_step_on_a_12_gb_card(memory):
    shape = Model()
    ours = peak_memory(shape, 32)
    assert ours + sum(beside_the_tensors(ours, compiled=True).values()) < 11 * 2**30
    assert memory.traced_peak(lambda: memory.stock_step(SHAPE), ROWS, LENGTH) > 1.5 * peak_memory(
        SHAPE, ROWS, sequence_length=LENGTH, chunk=CHUNK, compiled=False
    )
