"""Whatever the card does in whatever phase: the run continues, or one line says why not and the same command does."""

from __future__ import annotations

from pathlib import Path

import pytest
from ghost import USUAL, note, run_on, train_on
from runs import final_sums, finished, losses, records

TINY = ("tiny.yaml", "--precision", "fp32", "--compile", "false", "--threads", "1", "--schedule.max_iters", "12")
SHORT = (*TINY, "--schedule.decay_fraction", "0.5", "--validation.every", "6", "--checkpoint.every", "3")
GOES_ON, AGAIN = 0, 75
FAULTS = {
    "lost": "the device is lost",
    "full": "memory runs out once",
    "taken": "another process takes the memory",
}

# Where each phase of such a run begins, as `arm` takes it.
WHEN = {
    "the trial of micro-batches": "trial:1",
    "the first iteration": "iteration:1",
    "an accumulation": "backward:12",
    "an optimizer's step": "optimizer:4",
    "the change of the weights": "change:4",
    "a validation": "validation:2",
    "a sample": "samples:2",
    "a checkpoint's copy": "checkpoint:2",
    "the decay": "iteration:9",
    "the export": "export:1",
}


@pytest.fixture(scope="module")
def undisturbed_on_card(workplace: Path) -> str:
    done = train_on(workplace, *SHORT, "--name", "whole")
    assert done.returncode == 0, done.stdout + done.stderr
    return "whole"


def assert_told(done, phase: str, fault: str) -> None:
    """The fault came, no traceback after it, and what came of it is kept for the table."""
    said = done.stdout + done.stderr
    assert "ghost card: " in done.stderr and "Traceback" not in said, said
    goes_on = (
        "its tokens again" if "its tokens again" in said else "without it" if "is said once" in said else "continues"
    )
    note("faults", case=f"{phase} x {fault}", outcome=f"code {done.returncode}" if done.returncode else goes_on)


@pytest.mark.parametrize("phase", WHEN)
def test_a_lost_device_is_one_line_and_the_same_command_ends_with_the_same_bits(workplace, undisturbed_on_card, phase):
    name = f"lost-{WHEN[phase].replace(':', '-')}"
    done = train_on(workplace, *SHORT, "--name", name, fault=f"lost@{WHEN[phase]}")
    assert_told(done, phase, FAULTS["lost"])
    assert done.returncode == AGAIN, done.stdout + done.stderr
    again = train_on(workplace, *SHORT, "--name", name)
    assert again.returncode == GOES_ON, again.stdout + again.stderr
    assert final_sums(workplace, name, 12) == final_sums(workplace, undisturbed_on_card, 12)
    assert losses(workplace, name) == losses(workplace, undisturbed_on_card)


@pytest.mark.parametrize("phase", WHEN)
def test_memory_that_runs_out_for_a_moment_ends_nothing(workplace, undisturbed_on_card, phase):
    name = f"full-{WHEN[phase].replace(':', '-')}"
    done = train_on(workplace, *SHORT, "--name", name, fault=f"full@{WHEN[phase]}")
    assert_told(done, phase, FAULTS["full"])
    assert done.returncode == GOES_ON, done.stdout + done.stderr
    assert finished(workplace, name) == [12]
    assert losses(workplace, name) == pytest.approx(losses(workplace, undisturbed_on_card), rel=1e-3)


@pytest.mark.parametrize("phase", WHEN)
def test_memory_that_another_process_takes_costs_no_more_than_a_restart(workplace, undisturbed_on_card, phase):
    name = f"taken-{WHEN[phase].replace(':', '-')}"
    done = train_on(workplace, *SHORT, "--name", name, fault=f"taken@{WHEN[phase]}")
    assert_told(done, phase, FAULTS["taken"])
    if done.returncode != GOES_ON:
        assert done.returncode in (2, AGAIN) and "memory" in done.stderr + done.stdout
        done = train_on(workplace, *SHORT, "--name", name)
    assert done.returncode == GOES_ON, done.stdout + done.stderr
    assert losses(workplace, name) == pytest.approx(losses(workplace, undisturbed_on_card), rel=1e-3)


def test_a_device_that_is_lost_to_a_compiled_kernel_is_one_line(workplace):
    compiled = ("tiny.yaml", "--threads", "1", "--name", "lost-compiled")
    done = train_on(workplace, *compiled, computes="small", fault="lost-at-launch@forward:20")
    assert_told(done, "a compiled kernel", FAULTS["lost"])
    assert done.returncode == AGAIN, done.stdout + done.stderr


def test_a_host_without_page_locked_memory_saves_and_trains_all_the_same(workplace, undisturbed_on_card):
    done = train_on(workplace, *SHORT, "--name", "unlocked", fault="no-host-memory@iteration:1")
    assert done.returncode == GOES_ON, done.stdout + done.stderr
    assert final_sums(workplace, "unlocked", 12) == final_sums(workplace, undisturbed_on_card, 12)


@pytest.mark.parametrize("nvml", ["missing", "raises", "no energy"])
def test_a_card_that_tells_no_power_trains_all_the_same(workplace, undisturbed_on_card, nvml):
    name = f"nvml-{nvml.replace(' ', '-')}"
    done = train_on(workplace, *SHORT, "--name", name, GHOST_NVML=nvml)
    assert done.returncode == GOES_ON, done.stdout + done.stderr
    assert "not measured" in done.stdout.partition("energy")[2]
    assert losses(workplace, name) == losses(workplace, undisturbed_on_card)
    assert (records(workplace, name, "train")[-1]["watts"] is None) == (nvml != "no energy")


@pytest.mark.parametrize("fault", FAULTS)
def test_an_evaluation_is_one_line_or_goes_on(workplace, undisturbed_on_card, fault):
    model = str(workplace / "runs" / "whole" / "models" / "iter-000012")
    arguments = [model, "--against", "unigram", "--tasks", "none", "--texts", "none", "--out", f"evaluation-{fault}"]
    kept = str(workplace / fault)  # two batches try each of the models, two are timed, then come the validation's
    done = run_on(USUAL, workplace, "eval.py", *arguments, fault=f"{fault}@evaluation:8", XDG_CACHE_HOME=kept)
    assert_told(done, "an evaluation", FAULTS[fault])
    assert done.returncode == (AGAIN if fault == "lost" else GOES_ON), done.stdout + done.stderr
    again = run_on(USUAL, workplace, "eval.py", *arguments, XDG_CACHE_HOME=kept)
    assert again.returncode == GOES_ON, again.stdout + again.stderr
