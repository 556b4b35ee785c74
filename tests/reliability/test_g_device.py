"""Group G of docs/reliability.md: a device that is lost or full, and what only informs, in every phase of a run."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import ROOT, TRAIN, environment, finished, losses, records, slow, tiny, train, two_processes
from test_a_interruptions import goes_on_to_the_same_bits

from overnight.cli import recipe_command
from overnight.errors import EXIT_DIVERGED, EXIT_INTERRUPTED
from overnight.model import checkpoint, generate, optim
from overnight.model.gpt2 import LanguageModel
from overnight.training import finish, validation
from overnight.training import train as train_module

TOLERANCE = 1e-5  # of a loss in nats


def lost():
    return torch.AcceleratorError("CUDA error: unspecified launch failure\nCUDA kernel errors might be reported later")


def full():
    return torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


def mistaken():
    return torch.AcceleratorError("CUDA error: device-side assert triggered")


def failing(real, fails, error):
    """`real`, but for the calls with these numbers, counted from 1, which raise what `error` makes."""
    calls = []

    def act(*arguments, **options):
        calls.append(1)
        if len(calls) in fails:
            raise error()
        return real(*arguments, **options)

    return act


def break_at(monkeypatch, place, name, fails, error=lost):
    monkeypatch.setattr(place, name, failing(getattr(place, name), fails, error))


def typed(folder, monkeypatch, name, *overrides):
    """The exit code of the trainer's command line, in this process."""
    monkeypatch.setattr(sys, "argv", ["train.py", "tiny.yaml", "--name", name, *overrides])
    return recipe_command("", lambda recipe, options: train_module.train(recipe))


def last_event(folder, name):
    """The last event of a run, of whose records every one is JSON as the standard has it."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [r for r in (json.loads(line, parse_constant=refuse) for line in lines) if r["kind"] == "event"][-1]


# An iteration of tiny.yaml is two forwards of training, a validation five others; three forwards try the device.
PHASES = {
    "the first micro-batch": (LanguageModel, "forward", {1}),
    "the first validation": (LanguageModel, "forward", {5}),
    "accumulation": (LanguageModel, "forward", {3 + 5 + 2 * 25}),
    "clipping": (torch.nn.utils, "clip_grad_norm_", {25}),
    "the optimizer": (optim, "prepared", {25}),
    "a change of the weights": (torch.optim.AdamW, "step", {25}),
    "validation": (validation, "summed_losses", {2}),
    "samples": (generate.Writer, "after", {2}),
    "a checkpoint's copy": (checkpoint.Saver, "_copied", {2}),
    "the decay": (optim, "prepared", {36}),
    "export": (finish, "export", {1, 2}),
}
QUICK = ("accumulation", "a checkpoint's copy")


@pytest.mark.parametrize("phase", [phase if phase in QUICK else slow(phase) for phase in PHASES])
def test_g1_a_device_that_is_lost_ends_with_one_line_and_75_and_the_same_command_goes_on_to_the_same_bits(
    in_process, undisturbed, monkeypatch, capsys, phase
):
    name = "gone-" + phase.replace(" ", "-").replace("'", "")
    with monkeypatch.context() as broken:
        break_at(broken, *PHASES[phase])
        broken.setattr("accelerate.Accelerator.end_training", failing(None, {1}, lost))  # nor can anything be ended
        assert typed(in_process, broken, name) == EXIT_INTERRUPTED
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "the device was lost" in line]
    assert "(CUDA error: unspecified launch failure)" in said and "the same command" in said
    if phase != "the first micro-batch":  # nothing was written by then
        assert last_event(in_process, name)["event"] in ("device failed", "failed")
    goes_on_to_the_same_bits(in_process, name)


@pytest.mark.parametrize("phase", ["accumulation", slow("validation")])
def test_g1_a_mistake_of_the_program_is_no_lost_device(in_process, monkeypatch, phase):
    place, name, fails = PHASES[phase]
    break_at(monkeypatch, place, name, fails, mistaken)
    with pytest.raises(torch.AcceleratorError):
        typed(in_process, monkeypatch, f"mistaken-{phase}")


ONE_OF_TWO = """\
import os, sys, torch
from overnight.model import optim
from overnight.training import train
from overnight.cli import recipe_command

real, calls = optim.prepared, []


def prepared(optimizers):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 7:
        raise {"full": torch.cuda.OutOfMemoryError, "lost": torch.AcceleratorError}[os.environ["FAULT"]]("boom")
    return real(optimizers)


optim.prepared = prepared
sys.exit(recipe_command("", lambda recipe, options: train.train(recipe)))
"""


@pytest.fixture
def one_of_two(workplace, tmp_path):
    """Runs two processes, of which the second meets a fault in the optimizer of iteration 7."""
    script = tmp_path / "one_of_two.py"
    script.write_text(ONE_OF_TWO)

    def run(fault):
        arguments = ("tiny.yaml", "--name", f"one-of-two-{fault}", "--threads", "1", "--batch.micro_batch", "4")
        return train(workplace, *arguments, launcher=two_processes(), script=str(script), FAULT=fault)

    return run


@pytest.mark.slow
def test_g1_where_one_of_two_processes_loses_its_device_both_end(one_of_two):
    result = one_of_two("lost")
    assert result.returncode != 0
    assert "the device was lost (boom)" in result.stderr


@pytest.mark.slow
def test_g2_where_one_of_two_processes_has_no_memory_for_the_optimizer_both_repeat_the_iteration(
    one_of_two, workplace, undisturbed
):
    result = one_of_two("full")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "iteration 7: out of memory with 4 rows at once; its tokens again with 2 rows at once" in result.stdout
    expected, found = losses(workplace, "tiny"), losses(workplace, "one-of-two-full")
    assert max(abs(found[iteration] - expected[iteration]) for iteration in range(1, 21)) < TOLERANCE


def test_g2_out_of_memory_in_a_validation_measures_the_same_tokens_again(in_process, undisturbed, monkeypatch, capsys):
    forwards, real = [], LanguageModel.forward

    def forward(self, ids, targets):
        if not self.training:
            forwards.append(len(ids))
            if len(forwards) in (8, 10):  # of the second validation, twice
                raise full()
        return real(self, ids, targets)

    monkeypatch.setattr(LanguageModel, "forward", forward)
    assert train_module.train(tiny(in_process, "--name", "full-validation")) == 0
    assert "validation at iteration 20: out of memory with 8 rows at once; its tokens again" in capsys.readouterr().out
    halved = [r for r in records(in_process, "full-validation", "event") if r["event"] == "out of memory"]
    assert [(r["iteration"], r["micro_batch"], r["next_micro_batch"]) for r in halved] == [(20, 8, 4), (20, 4, 2)]
    validations = [[r["loss"] for r in records(in_process, name, "val")] for name in ("full-validation", "tiny")]
    assert validations[0] == pytest.approx(validations[1], abs=TOLERANCE)


@pytest.mark.parametrize("phase", ["a checkpoint's copy", slow("export")])
def test_g2_what_has_no_smaller_pieces_is_tried_once_more_and_then_ends_with_75(
    in_process, undisturbed, monkeypatch, capsys, phase
):
    place, name, _ = PHASES[phase]
    run = "full-" + phase.replace(" ", "-").replace("'", "")
    with monkeypatch.context() as broken:
        break_at(broken, place, name, {1}, full)
        assert typed(in_process, broken, f"{run}-once") == 0
    with monkeypatch.context() as broken:
        break_at(broken, place, name, {1, 2}, full)
        assert typed(in_process, broken, run) == EXIT_INTERRUPTED
    assert "out of memory (CUDA out of memory." in capsys.readouterr().err
    goes_on_to_the_same_bits(in_process, run)


def test_g2_out_of_memory_in_the_first_micro_batch_takes_a_smaller_one(in_process, monkeypatch, capsys):
    break_at(monkeypatch, LanguageModel, "forward", {2}, full)
    assert typed(in_process, monkeypatch, "full-at-first", "--schedule.max_iters", "10") == 0
    assert "out of memory with 8 rows at once; its tokens again with 4 rows at once" in capsys.readouterr().out


class Broken:
    """A function that always fails."""

    def __init__(self, error=RuntimeError):
        self.error = error

    def __call__(self, *arguments, **options):
        raise self.error("boom")


# What only informs: by its name in the line that says so, what is broken, and options under which it is used.
INFORMS = {
    "power": ("overnight.core.nvml.PowerMeter.watts", []),
    "memory": ("overnight.device.device.Device.used_gib", []),
    "energy": ("overnight.core.nvml.PowerMeter.joules", []),
    "trackers": ("accelerate.Accelerator.log", []),
    "the trackers' end": ("accelerate.Accelerator.end_training", []),
    "samples": ("overnight.model.generate.Writer.after", []),
    "the forecast": ("overnight.training.stopping.outlook_of", []),
    "n-gram baselines": ("overnight.training.log.ngram_losses", ["--validation.ngram_baselines", "true"]),
    "the line of an iteration": ("overnight.training.log.step_line", []),
    "the line of a validation": ("overnight.training.log.duration", []),
    "benchmarks of a milestone": ("overnight.training.finish.QuickEval", ["--evaluation.at_milestones", "5"]),
    "the results": ("overnight.training.log.print_finished", []),
}
QUICK_INFORMS = ("power", "the forecast")


@pytest.mark.parametrize("what", [what if what in QUICK_INFORMS else slow(what) for what in INFORMS])
def test_g3_what_only_informs_is_told_once_when_it_fails_and_the_run_ends_as_ever(
    in_process, undisturbed, monkeypatch, capsys, what
):
    broken, options = INFORMS[what]
    monkeypatch.setattr(broken, Broken())
    name = "informed-" + "".join(letter if letter.isalpha() else "-" for letter in what)
    assert typed(in_process, monkeypatch, name, *options) == 0
    said = capsys.readouterr()
    assert said.out.count(f"{what}: failed (RuntimeError: boom); the run continues without") == 1, said.out
    failures = [record for record in records(in_process, name, "event") if record["event"] == "failed"]
    assert {"what": what, "problem": "RuntimeError: boom"}.items() <= failures[-1].items()
    assert len(failures) == 1
    if what != "the line of an iteration":
        assert losses(in_process, name) == losses(in_process, "tiny")
    assert records(in_process, name, "val")[-1]["loss"] == records(in_process, "tiny", "val")[-1]["loss"]


@pytest.mark.slow
def test_g3_a_tracker_that_does_not_begin_is_told_and_the_run_is_trained(in_process, monkeypatch, capsys):
    pytest.importorskip("tensorboard")
    monkeypatch.setattr("accelerate.Accelerator.init_trackers", Broken())
    options = ("--logging.trackers", "[tensorboard]", "--schedule.max_iters", "10")
    assert typed(in_process, monkeypatch, "untracked", *options) == 0
    assert "trackers: failed (RuntimeError: boom)" in capsys.readouterr().out


def test_g3_samples_for_which_there_is_no_memory_are_left_out(in_process, monkeypatch, capsys):
    monkeypatch.setattr(generate.Writer, "after", Broken(torch.cuda.OutOfMemoryError))
    assert typed(in_process, monkeypatch, "unsampled", "--schedule.max_iters", "10") == 0
    assert capsys.readouterr().out.count("samples: failed (OutOfMemoryError: boom)") == 1
    assert [record["samples"] for record in records(in_process, "unsampled", "val")] == [[], []]


def test_g3_a_screen_without_the_letters_of_a_sample_shows_the_others(workplace):
    prompt = ("--validation.prompts", "[Größe — 数]", "--schedule.max_iters", "10")
    result = train(workplace, "tiny.yaml", "--name", "ascii", *prompt, script=str(ASCII))
    assert result.returncode == 0, result.stderr
    assert "  Gr??e ? ? >" in result.stdout


def test_g3_a_reader_that_leaves_does_not_end_the_run(workplace):
    arguments = [sys.executable, TRAIN, "tiny.yaml", "--name", "unread", "--schedule.max_iters", "10"]
    piped = f"{shlex.join(arguments)} | head -n 3; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", piped], cwd=workplace, env=environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert finished(workplace, "unread") == [10]


def test_g3_a_script_whose_reader_has_left_ends_with_its_own_code(workplace):
    for words, code in (
        (["prepare.py", "tiny.yaml"], 0),
        (["prepare.py", "no.yaml"], 2),
        (["plan.py", "tiny.yaml"], 0),
    ):
        command = shlex.join([sys.executable, str(ROOT / "recipes" / words[0]), *words[1:]])
        shell = f"({command} 2>&1; echo $? > code) | true"
        subprocess.run(["bash", "-c", shell], cwd=workplace, env=environment(), check=True)
        assert int((workplace / "code").read_text()) == code


OPENS = "import os, sys; from overnight.core.console import outlets; outlets(); os._exit(open('x', 'w').fileno() <= 2)"


def test_g3_a_closed_output_is_no_number_for_a_file_of_the_run(tmp_path):
    command = f"{shlex.join([sys.executable, '-c', OPENS])} <&- >&- 2>&-"
    assert subprocess.run(["bash", "-c", command], cwd=tmp_path, check=False).returncode == 0


ASCII = Path(__file__).with_name("ascii_screen.py")


def not_finite(real, numbers, value=float("nan")):
    calls = []

    def forward(self, ids, targets):
        calls.append(self.training)
        loss = real(self, ids, targets)
        return loss * value if numbers(self.training, sum(calls), len(calls)) else loss

    return forward


UNUSUAL = {"the line of an update that was left out": float("nan"), "the line of a spike": 9.0}


@pytest.mark.parametrize("what", [slow(what) for what in UNUSUAL])
def test_g3_what_is_told_of_an_unusual_update_ends_no_run(in_process, monkeypatch, capsys, what):
    of_iteration_30 = 3 + 2 * 30
    forward = not_finite(
        LanguageModel.forward, lambda training, step, _: training and step == of_iteration_30, UNUSUAL[what]
    )
    monkeypatch.setattr(LanguageModel, "forward", forward)
    monkeypatch.setattr("overnight.data.batches.TrainingBatches.places", Broken())
    assert typed(in_process, monkeypatch, f"unusual-{UNUSUAL[what]}") == 0
    assert capsys.readouterr().out.count(f"{what}: failed (RuntimeError: boom); the run continues without") == 1


def models_of(folder, name):
    return list((folder / "runs" / name / "models").iterdir())


@pytest.mark.parametrize("every_update", [True, False], ids=["every update", "the last validation"])
def test_g4_what_is_not_finite_is_never_finished_with(in_process, monkeypatch, capsys, every_update):
    numbers = (
        (lambda training, step, call: training and step > 3) if every_update else (lambda training, *_: not training)
    )
    monkeypatch.setattr(LanguageModel, "forward", not_finite(LanguageModel.forward, numbers))
    name = f"not-finite-{every_update}"
    assert (
        typed(in_process, monkeypatch, name, "--schedule.max_iters", "8", "--schedule.warmup_iters", "2")
        == EXIT_DIVERGED
    )
    said = capsys.readouterr().out
    assert ("all 8 updates were not finite" if every_update else "the validation loss at the end is not finite") in said
    assert "is finished" not in said and models_of(in_process, name) == []
    assert last_event(in_process, name)["event"] == "diverged"


def test_g4_a_validation_on_the_way_that_is_not_finite_is_told_and_the_run_goes_on(in_process, monkeypatch, capsys):
    forwards = not_finite(LanguageModel.forward, lambda training, step, call: not training and 3 < step < 83)
    monkeypatch.setattr(LanguageModel, "forward", forwards)
    assert typed(in_process, monkeypatch, "once-not-finite") == 0
    assert "validation loss nan at iteration 20: not finite" in capsys.readouterr().out
    assert last_event(in_process, "once-not-finite")["event"] == "finished"
    assert [record["iteration"] for record in records(in_process, "once-not-finite", "val")] == [0, 40]
    assert models_of(in_process, "once-not-finite")
