"""Memory runs out and the run continues as if nothing had happened; before it starts, the fastest size is found."""

import dataclasses
import gc
import itertools
import json
import sys
from functools import partial

import pytest
import torch
from runs import ROOT, losses, records, set_up, tiny, train, two_processes

from overnight.cli import recipe_command
from overnight.data import batches
from overnight.device import launch
from overnight.device.device import Device
from overnight.errors import EXIT_INPUT, InputError
from overnight.model.gpt2 import LanguageModel
from overnight.planning.model_size import derive, memory_gib, next_divisor
from overnight.recipe.load import load
from overnight.training import micro_batch, setup
from overnight.training import train as train_module
from overnight.training.micro_batch import Trial, choose, search
from overnight.training.state import COLD_ITERATIONS, RATE_WINDOW, Throughput

TOLERANCE = 1e-5  # of a loss in nats


@pytest.fixture
def full_memory(monkeypatch):
    """Makes the training forwards of these numbers, counted from 1, run out of memory; collects the rows of each."""
    fails, rows, real = set(), [], LanguageModel.forward

    def forward(self, ids, targets):
        if self.training:
            rows.append(len(ids))
            if len(rows) in fails:
                raise torch.cuda.OutOfMemoryError("boom")
        return real(self, ids, targets)

    monkeypatch.setattr(setup, "check_attention", lambda *given: ("not looked at", 0.0))
    monkeypatch.setattr(LanguageModel, "forward", forward)
    return fails, rows


# An iteration of tiny.yaml is 16 rows, 8 at once: forwards 13 and 14 are those of iteration 7.
@pytest.mark.parametrize(
    ("fails", "sizes"),
    [({13}, [8, 4]), ({14}, [8, 4]), ({13, 14, 16}, [8, 4, 2, 1])],
    ids=["in the first micro-batch", "in a later micro-batch", "again in the repetitions"],
)
def test_a9_out_of_memory_in_an_iteration_repeats_it_with_the_same_tokens(
    in_process, undisturbed, full_memory, capsys, fails, sizes
):
    full_memory[0].update(fails)
    name = f"full-{len(sizes)}-{min(fails)}"
    assert train_module.train(tiny(in_process, "--name", name)) == 0
    assert set(full_memory[1]) == set(sizes)
    events = [record for record in records(in_process, name, "event") if record["event"] == "out of memory"]
    changes = [(event["iteration"], event["micro_batch"], event["next_micro_batch"]) for event in events]
    assert changes == [(7, before, after) for before, after in itertools.pairwise(sizes)]
    assert "iteration 7: out of memory with 8 rows at once; its tokens again with 4 rows" in capsys.readouterr().out
    expected, found = losses(in_process, "tiny"), losses(in_process, name)
    assert found.keys() == expected.keys()
    assert max(abs(found[iteration] - expected[iteration]) for iteration in expected) < TOLERANCE


def test_a9_out_of_memory_with_a_single_row_ends_with_code_2_and_advice(in_process, full_memory, monkeypatch, capsys):
    full_memory[0].update(range(17, 1000))  # from iteration 2 on
    arguments = ["train.py", "tiny.yaml", "--name", "too-full", "--batch.micro_batch", "1"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert recipe_command("", lambda recipe, options: train_module.train(recipe)) == EXIT_INPUT == 2
    said = capsys.readouterr().err
    assert "out of memory with a single row of `batch.sequence_length` 64 tokens" in said and "nvidia-smi" in said
    assert "Traceback" not in said


ONE_OF_TWO = """\
import os, sys, torch
from overnight.training import setup, train
from overnight.cli import recipe_command
from overnight.model.gpt2 import LanguageModel

setup.check_attention = lambda *given: ("not looked at", 0.0)
real, calls = LanguageModel.forward, []


def forward(self, ids, targets):
    calls.append(self.training)
    if os.environ["RANK"] == "1" and self.training and sum(calls) == int(os.environ["FAILS"]):
        raise torch.cuda.OutOfMemoryError("boom")
    return real(self, ids, targets)


LanguageModel.forward = forward
sys.exit(recipe_command("", lambda recipe, options: train.train(recipe)))
"""


@pytest.mark.slow
def test_when_one_of_two_processes_runs_out_of_memory_both_repeat_the_iteration(workplace, undisturbed, tmp_path):
    script = tmp_path / "one_of_two.py"
    script.write_text(ONE_OF_TWO)
    arguments = ("tiny.yaml", "--name", "one-of-two", "--threads", "1", "--batch.micro_batch", "4")
    result = train(workplace, *arguments, launcher=two_processes(), script=str(script), FAILS="13")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "iteration 7: out of memory with 4 rows at once; its tokens again with 2 rows at once" in result.stdout
    expected, found = losses(workplace, "tiny"), losses(workplace, "one-of-two")
    assert max(abs(found[iteration] - expected[iteration]) for iteration in range(1, 21)) < TOLERANCE


@pytest.mark.slow
def test_out_of_memory_while_processes_exchange_gradients_ends_the_run_with_advice(workplace, tmp_path):
    script = tmp_path / "one_of_two.py"
    script.write_text(ONE_OF_TWO)
    arguments = ("tiny.yaml", "--name", "too-late", "--threads", "1", "--batch.micro_batch", "4")
    result = train(workplace, *arguments, launcher=two_processes(), script=str(script), FAILS="14")
    assert result.returncode != 0
    assert "`--batch.micro_batch 2` would work" in result.stderr


@pytest.mark.parametrize("rows", [512, 480, 15, 7, 1])
def test_every_size_divides_the_rows_and_is_at_most_half_of_the_one_before(rows):
    sizes = [next_divisor(rows, 64)]
    while sizes[-1]:
        sizes.append(next_divisor(rows, sizes[-1] // 2))
    assert sizes[-2:] == [1, 0]  # it ends with single rows, never before
    assert all(rows % size == 0 for size in sizes[:-1])
    assert all(after <= before / 2 for before, after in itertools.pairwise(sizes))


def measured(rows_per_second: dict[int, float], gib: dict[int, float]):
    """What `attempt` would find on a card of these figures; sizes without a rate run out of memory."""
    return lambda rows: Trial(rows, rows / rows_per_second[rows], gib[rows]) if rows in rows_per_second else None


@pytest.mark.parametrize(
    ("rows_per_second", "tried", "chosen"),
    [
        ({32: 118, 16: 115, 8: 110, 4: 100}, [32, 16], 32),
        ({32: 50, 16: 115, 8: 110, 4: 100}, [32, 16, 8], 16),  # the largest spills, or was compiled worse
        ({32: 100, 16: 110, 8: 120, 4: 130}, [32, 16, 8], 8),  # three are enough
        ({64: 999, 16: 115, 8: 110}, [16, 8], 16),  # 64 is over the limit, 32 runs out
        ({2: 10, 1: 12}, [2, 1], 1),
        ({}, [], 0),
    ],
)
def test_the_size_with_the_most_tokens_a_second_of_those_that_fit_is_chosen(rows_per_second, tried, chosen):
    gib = {rows: 0.3 * rows for rows in rows_per_second}
    trials = search(64, 512, 10.0, measured(rows_per_second, gib), trials=3)
    assert [trial.rows for trial in trials] == tried
    assert choose(trials) == chosen


def test_a_size_that_was_asked_for_is_tried_alone_when_it_fits():
    found = measured({8: 1, 4: 2, 2: 3}, {8: 9, 4: 5, 2: 3})
    assert [trial.rows for trial in search(8, 512, 10.0, found, trials=1)] == [8]
    assert [trial.rows for trial in search(8, 512, 6.0, found, trials=1)] == [4]


class Card(Device):
    """A CPU that says it is a card of 10 GiB."""

    cuda = property(lambda self: True, lambda self, value: None)

    def __init__(self, limit=10.0):
        self.torch, self.name, self.total_gib, self.limit_gib = torch.device("cpu"), "a card", 12.0, limit

    def cap_memory(self):
        return self.limit_gib

    def release(self):
        pass

    def synchronize(self):
        pass

    def used_gib(self):
        return 5.0


def test_measuring_runs_real_micro_batches_and_leaves_nothing_behind(in_process, full_memory):
    run = set_up(tiny(in_process, "--name", "measured"))
    before = [parameter.detach().clone() for parameter in run.model.parameters()]
    full_memory[0].add(1)
    full_memory[1].clear()
    run.device = Card()
    run.derived = dataclasses.replace(run.derived, first_micro_batch=16, measured=True)
    said = micro_batch.measure(run)
    assert full_memory[1][:2] == [16, 8]
    steps = micro_batch.WARM_STEPS + micro_batch.TIMED_STEPS
    assert all(full_memory[1].count(size) == steps for size in set(full_memory[1]) - {16})
    assert run.micro_batch in (8, 4, 2) and run.micro_batch * run.grad_accum == 16
    assert said.startswith(f"{run.micro_batch} rows; measured in 10.0 GiB: 8 rows ")
    assert all(torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in run.model.parameters())


def test_the_micro_batch_of_a_run_stands_in_its_environment(in_process, full_memory):
    run = set_up(tiny(in_process, "--name", "recorded"))
    assert '"micro-batch": "8 rows"' in (run.directory.path / "environment.json").read_text()


def test_trying_begins_at_the_largest_size_that_the_formula_puts_at_most_15_percent_above_the_limit(in_process):
    run = set_up(tiny(in_process, "--name", "begun"))
    run.recipe = load(ROOT / "recipes" / "fineweb_edu_40m.yaml")
    run.derived = derive(run.recipe, "cuda", 1, None)
    begun = {limit: micro_batch.largest_to_try(run, limit) for limit in (3.0, 6.9, 10.5, 21.0, 70.0)}
    in_float32 = partial(memory_gib, run.recipe, compiled=False, bf16=False)  # as a CPU trains; in bf16 twice fits
    assert (begun[6.9], begun[10.5], begun[21.0], begun[70.0]) == (16, 32, 64, 64)
    for limit, rows in begun.items():
        assert in_float32(rows) <= 1.15 * limit
        assert rows == 64 or in_float32(2 * rows) > 1.15 * limit
    assert micro_batch.largest_to_try(run, 0.5) == 0


def test_a_card_on_which_by_the_formula_no_row_fits_is_refused_before_anything_is_compiled(in_process, full_memory):
    run = set_up(tiny(in_process, "--name", "hopeless"))
    run.device, run.derived = Card(limit=0.01), dataclasses.replace(run.derived, measured=True)
    full_memory[1].clear()
    with pytest.raises(InputError, match="out of memory with a single row"):
        micro_batch.measure(run)
    assert full_memory[1] == []


@pytest.fixture
def restarted(in_process, full_memory):
    """A run on a card whose environment.json says 4 rows of an earlier session under `limit` GiB; its forwards."""

    def make(name, limit, **other):
        run = set_up(tiny(in_process, "--name", name))
        run.device = Card(limit)
        run.derived = dataclasses.replace(run.derived, first_micro_batch=16, measured=True)
        run.micro_batch = 4
        measured = micro_batch.measured(run)
        measured["circumstances"] |= other
        (run.directory.path / "environment.json").write_text(json.dumps({"measured": measured}))
        run.micro_batch = 16
        full_memory[1].clear()
        return run, full_memory[1]

    return make


def test_a_restart_takes_the_size_that_was_measured_before_without_trying_any(restarted):
    run, forwards = restarted("restarted", limit=10.0)
    run.device.limit_gib = 10.3  # about as much
    assert micro_batch.measure(run) == "4 rows, as an earlier session measured on the same device with as much memory"
    assert (run.micro_batch, forwards) == (4, [])


@pytest.mark.parametrize(
    ("other", "now"),
    [({"torch": "2.0.0"}, 10.0), ({"device": "another card"}, 10.0), ({"compiled": None}, 10.0), ({}, 8.0), ({}, 12.0)],
    ids=["another torch", "another device", "not compiled", "less memory", "more memory"],
)
def test_a_restart_under_other_circumstances_measures_again(restarted, other, now):
    run, forwards = restarted("restarted-" + "-".join([*other, f"{now:g}"]), limit=10.0, **other)
    run.device.limit_gib = now
    assert "measured in" in micro_batch.measure(run)
    assert forwards[0] == 16


def test_the_size_of_a_session_stands_in_its_environment_for_the_next(in_process, full_memory, monkeypatch):
    monkeypatch.setattr(setup, "Device", lambda device: Card())
    monkeypatch.setattr(setup, "allow_tf32", lambda: None)
    recipe = tiny(in_process, "--name", "remembered", "--compile", "false")
    monkeypatch.setattr(launch, "resolve_precision", lambda *given, **how: "fp32")
    rows = set_up(recipe).micro_batch
    gc.collect()  # and with the run its lock
    assert full_memory[1]
    full_memory[1].clear()
    assert set_up(recipe).micro_batch == rows
    assert full_memory[1] == []


def test_a_copy_goes_on_without_page_locked_memory(monkeypatch):
    def no_memory(tensor):
        raise RuntimeError("CUDA error: out of memory")

    tokens = torch.arange(6)
    monkeypatch.setattr(torch.Tensor, "pin_memory", no_memory)
    assert batches.page_locked(tokens) is tokens


def test_a_rate_that_falls_by_a_third_is_told_once_and_one_slow_iteration_is_not():
    throughput, told = Throughput(), []
    for seconds in [9.0] * COLD_ITERATIONS + [1.0] * RATE_WINDOW + [30.0] + [1.2] * 20 + [1.6] * 20 + [3.0] * 20:
        throughput.add(seconds)
        told.append(throughput.fell_by())
    said = [(iteration, fall) for iteration, fall in enumerate(told) if fall is not None]
    assert len(said) == 1
    assert said[0][1] == pytest.approx(1 - 1 / 1.6, abs=0.1)
    assert said[0][0] >= COLD_ITERATIONS + RATE_WINDOW + 21
