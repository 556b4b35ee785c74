"""Group B of docs/reliability.md: what is not finite never reaches the weights, and what is unusual is told."""

import itertools

import pytest
import torch
from runs import ROOT, losses, records, tiny

from overnight.device.device import resolve_precision
from overnight.errors import EXIT_DIVERGED, InputError
from overnight.model.gpt2 import LanguageModel
from overnight.recipe.load import load
from overnight.training import resume, setup, validation
from overnight.training import train as train_module
from overnight.training.state import SPIKE_FEWEST, SPIKE_WINDOW, LossHistory, spike


@pytest.fixture
def quick(monkeypatch):
    """Runs in which no forward but those of training is counted."""
    monkeypatch.setattr(setup, "check_attention", lambda *given: ("not looked at", 0.0))
    monkeypatch.setattr(validation, "validate", lambda run: 1.0)


@pytest.fixture
def steps(monkeypatch):
    """Of every iteration: whether it updated the weights by its own word, and whether they are as they were."""
    found, real = [], train_module.train_step

    def watched(run):
        before = [parameter.detach().clone() for parameter in run.model.parameters()]
        out = real(run)
        same = all(torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))
        found.append((out[2], same))
        return out

    monkeypatch.setattr(train_module, "train_step", watched)
    return found


def forward_with(monkeypatch, change):
    """Have `change(loss, number of the forward)` make every loss of the model."""
    real, counter = LanguageModel.forward, itertools.count(1)
    monkeypatch.setattr(LanguageModel, "forward", lambda self, *rows: change(real(self, *rows), next(counter)))


ONE_SKIPPED = [(True, False)] * 5 + [(False, True)] + [(True, False)] * 4


def test_b1_an_update_with_a_loss_that_is_no_number_never_reaches_the_weights(in_process, quick, steps, monkeypatch):
    forward_with(monkeypatch, lambda loss, number: loss * float("nan") if number in (11, 12) else loss)
    assert train_module.train(tiny(in_process, "--name", "nan", "--schedule.max_iters", "10")) == 0
    assert steps == ONE_SKIPPED
    (skip,) = [record for record in records(in_process, "nan", "event") if record["event"] == "skipped"]
    assert skip["iteration"] == 6 and skip["loss"] == "nan" and skip["tokens"] == 6 * 1024
    (offsets,) = skip["rows"].values()
    assert len(offsets) == 16 and all(offset % 64 == 0 for offset in offsets)


def test_b1_a_run_that_does_not_come_back_ends_with_4_and_its_last_good_checkpoint(in_process, quick, monkeypatch):
    forward_with(monkeypatch, lambda loss, number: loss * (float("inf") if number > 24 else 1.0))
    assert train_module.train(tiny(in_process, "--name", "diverged")) == EXIT_DIVERGED == 4
    assert records(in_process, "diverged", "event")[-1]["event"] == "diverged"
    assert (in_process / "runs/diverged/checkpoints/iter-000010").is_dir()


def test_b1_updates_left_out_in_a_row_are_counted_across_a_resume(in_process, quick, monkeypatch):
    forward_with(monkeypatch, lambda loss, number: loss * (float("inf") if number > 30 else 1.0))
    real = resume.save_due
    monkeypatch.setattr(train_module, "save_due", lambda run: run.iteration == 20 or real(run))
    real_step = train_module.train_step

    def stops(run):
        out = real_step(run)
        run.stopping = run.iteration == 19
        return out

    monkeypatch.setattr(train_module, "train_step", stops)
    assert train_module.train(tiny(in_process, "--name", "twice-diverged")) == 75
    assert train_module.train(tiny(in_process, "--name", "twice-diverged")) == EXIT_DIVERGED
    assert records(in_process, "twice-diverged", "event")[-1]["iteration"] == 25  # 15 and ten


def test_b2_one_gradient_that_is_not_finite_is_an_update_left_out(in_process, quick, steps, monkeypatch):
    real, counter = train_module.accumulate, itertools.count(1)

    def poisoned(run):
        loss = real(run)
        if next(counter) == 6:
            next(iter(run.model.parameters())).grad.view(-1)[3] = float("inf")
        return loss

    monkeypatch.setattr(train_module, "accumulate", poisoned)
    assert train_module.train(tiny(in_process, "--name", "inf", "--schedule.max_iters", "10")) == 0
    assert steps == ONE_SKIPPED
    (skip,) = [record for record in records(in_process, "inf", "event") if record["event"] == "skipped"]
    assert skip["grad_norm"] in ("inf", "nan") and skip["loss"] != "nan"


def spikes_of(folder, name):
    return [record["iteration"] for record in records(folder, name, "event") if record["event"] == "spike"]


def test_b3_a_spike_is_told_and_its_history_survives_a_resume(in_process, quick, monkeypatch, capsys):
    def tripled(loss, number):  # in iterations 26 and 36: two micro-batches each
        return loss * 3 if number in (51, 52, 71, 72) else loss

    forward_with(monkeypatch, tripled)
    assert train_module.train(tiny(in_process, "--name", "spikes")) == 0
    assert spikes_of(in_process, "spikes") == [26, 36]
    assert "above its median: a spike begins" in capsys.readouterr().out

    real_step = train_module.train_step

    def stops(run):
        out = real_step(run)
        run.stopping = run.iteration == 29
        return out

    monkeypatch.undo()
    monkeypatch.chdir(in_process)
    monkeypatch.setattr(setup, "check_attention", lambda *given: ("not looked at", 0.0))
    monkeypatch.setattr(validation, "validate", lambda run: 1.0)
    monkeypatch.setattr("overnight.model.export.verify_export", lambda *arguments: None)
    forward_with(monkeypatch, tripled)
    monkeypatch.setattr(train_module, "train_step", stops)
    assert train_module.train(tiny(in_process, "--name", "spikes-again")) == 75
    monkeypatch.setattr(train_module, "train_step", real_step)
    assert train_module.train(tiny(in_process, "--name", "spikes-again")) == 0
    # ten iterations are too few to call anything a spike: the losses before the resume were still known
    assert spikes_of(in_process, "spikes-again") == [26, 36]
    assert losses(in_process, "spikes-again") == losses(in_process, "spikes")


def test_b3_a_spike_stands_out_of_the_noise_and_needs_something_to_stand_out_of():
    noise = [3.0 + 0.02 * (number % 5) for number in range(SPIKE_WINDOW)]
    assert spike(noise, 3.1) is None and spike(noise, 3.2) is None
    assert spike(noise, 3.9) == pytest.approx(0.86)
    assert spike(noise[: SPIKE_FEWEST - 1], 9.0) is None
    assert spike([4.0 - 0.01 * number for number in range(SPIKE_WINDOW)], 3.99) is None  # a falling loss has no spikes
    assert spike([3.0] * SPIKE_WINDOW, 3.04) is None  # and so has one without noise


def test_b3_a_spike_is_told_once_and_the_window_is_bounded():
    history = LossHistory()
    told = [history.add(loss, finite=True) for loss in [3.0] * 40 + [9.0] * 3 + [3.0, 9.0] + [3.0] * 99]
    assert [number for number, rise in enumerate(told) if rise] == [40, 44]
    assert len(history.losses) == SPIKE_WINDOW
    assert LossHistory.from_json(history.as_json()) == history


def test_b8_precision_auto_takes_float32_without_a_gpu_and_bf16_by_name_is_refused():
    quickstart = load(ROOT / "recipes" / "quickstart.yaml")
    assert resolve_precision(quickstart, cuda=False, bf16=False) == "fp32"
    for override in (["--precision", "bf16"], ["--compile", "true"]):
        with pytest.raises(InputError, match="has no CUDA device"):
            resolve_precision(load(ROOT / "recipes" / "quickstart.yaml", override), cuda=False, bf16=False)
