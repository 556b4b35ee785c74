"""An update is made as a whole or not at all: wherever memory runs out in it, it is made again with the same tokens."""

import copy
import sys

import pytest
import torch
from accelerate import Accelerator
from runs import set_up, tiny
from torch.utils._python_dispatch import TorchDispatchMode

from overnight.training import train as train_module
from overnight.training.train import train_step


class Memory(TorchDispatchMode):
    """Counts the operators that take memory once `counting`, and fails at one of them."""

    def __init__(self, fails_at=None):
        super().__init__()
        self.fails_at, self.taken, self.counting = fails_at, 0, False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        fresh = [r for r in function._schema.returns if "Tensor" in str(r.type) and r.alias_info is None]
        if self.counting and fresh:
            self.taken += 1
            if self.taken == self.fails_at:
                self.counting = False
                raise torch.cuda.OutOfMemoryError("boom")
        return function(*args, **(kwargs or {}))


@pytest.fixture
def run(in_process):
    """A run of some updates, two rows at once."""
    shape = ("--batch.tokens_per_iter", "128", "--batch.micro_batch", "2", "--model.n_layer", "1", "--threads", "1")
    run = set_up(tiny(in_process, "--name", "updated", *shape))
    for _ in range(3):
        train_step(run)
        run.iteration += 1
    return run


def test_a_training_step_is_read_in_five_files(run):
    entered = set()

    def note(frame, event, _):
        if event == "call" and "/src/overnight/" in frame.f_code.co_filename:
            entered.add(frame.f_code.co_filename.rpartition("/")[2])

    sys.setprofile(note)
    train_step(run)
    sys.setprofile(None)
    assert entered == {"train.py", "batches.py", "gpt2.py", "loss.py", "optim.py"}


def state_of(run):
    """Weights and the optimizers' state."""
    moments = [value for optimizer in run.optimizers for state in optimizer.state.values() for value in state.values()]
    return [tensor.detach() for tensor in (*run.model.parameters(), *moments)]


def put_back(run, before, micro_batch):
    for tensor, old in zip(state_of(run), before, strict=True):
        tensor.copy_(old)
    run.iteration, run.micro_batch = 3, micro_batch


def two_updates(run, memory):
    """Losses and state after two updates, of which the first meets `memory` behind its backward."""
    with memory:
        first = train_step(run)
    run.iteration += 1
    return [first, train_step(run)], copy.deepcopy(state_of(run))


def counted_from_the_backward_on(monkeypatch, memory):
    """Up to where the processes tell each other of their loss, and of their memory."""
    real, reduce = train_module.accumulate, Accelerator.reduce

    def accumulate(run):
        loss = real(run)
        memory.counting = memory.taken == 0  # not again in the repetition
        return loss

    def told(self, *arguments):
        memory.counting = False
        return reduce(self, *arguments)

    monkeypatch.setattr(train_module, "accumulate", accumulate)
    monkeypatch.setattr(Accelerator, "reduce", told)


def test_a9_out_of_memory_anywhere_in_clipping_or_the_optimizers_changes_no_bit(run, monkeypatch):
    before = copy.deepcopy(state_of(run))
    whole = Memory()
    counted_from_the_backward_on(monkeypatch, whole)
    two_updates(run, whole)
    monkeypatch.undo()
    put_back(run, before, micro_batch=1)
    expected = two_updates(run, Memory())
    assert whole.taken > 30
    for point in range(1, whole.taken + 1):
        put_back(run, before, micro_batch=2)
        with monkeypatch.context() as patched:
            memory = Memory(fails_at=point)
            counted_from_the_backward_on(patched, memory)
            losses, state = two_updates(run, memory)
        assert memory.taken == point and run.micro_batch == 1  # it was met, and the update made again in halves
        assert losses == expected[0], point
        assert all(torch.equal(a, b) for a, b in zip(state, expected[1], strict=True)), point


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_what_changes_weights_and_state_takes_no_memory_from_the_first_update_on(in_process, name):
    run = set_up(tiny(in_process, "--name", f"first-{name}", "--optim.name", name))
    _, _, changes = train_module.prepare_update(run)
    before = copy.deepcopy(state_of(run))
    with Memory() as memory:
        memory.counting = True
        for change in changes:
            change()
    assert memory.taken == 0
    assert not all(torch.equal(a, b) for a, b in zip(state_of(run), before, strict=True))


def test_the_state_that_is_made_before_the_first_update_is_the_one_that_torch_would_make(in_process):
    run = set_up(tiny(in_process, "--name", "fresh", "--optim.name", "adamw"))
    weight = torch.nn.Parameter(torch.ones(3, 4))
    weight.grad = torch.ones(3, 4)
    theirs = torch.optim.AdamW([weight], fused=True)
    theirs.step()
    (adamw,) = run.optimizers
    for parameter, state in adamw.state.items():
        assert state.keys() == theirs.state[weight].keys()
        for key, value in state.items():
            assert value.dtype == theirs.state[weight][key].dtype and not value.any()
            assert value.shape == (() if key == "step" else parameter.shape)
