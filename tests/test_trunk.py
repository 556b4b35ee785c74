"""One trunk, several finished models: each budget is the run that had its length from the start, to the last bit."""

import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from runs import final_sums, losses_by_decay, model_sums, records, start, tiny

from overnight.errors import EXIT_INTERRUPTED, InputError
from overnight.recipe.schedule import branch_points, goals, iterations_left, lr_at, towards
from overnight.recipe.schema import Schedule
from overnight.run_dir.layout import saved_iterations
from overnight.training import finish
from overnight.training import train as train_module
from overnight.training.setup import seconds_left
from overnight.training.state import Throughput

LADDER = ("--schedule.milestones", "[20, 30]")


def run(folder: Path, name: str, *overrides: str, **how) -> int:
    return train_module.train(tiny(folder, "--name", name, *overrides), **how)


def losses_of(folder: Path, name: str, cooldown: int | None = None, kind: str = "train") -> dict[int, float]:
    return {i: loss for (decay, i), loss in losses_by_decay(folder, name, kind).items() if decay == cooldown}


def after_each_budget(monkeypatch, act) -> None:
    """Have `act(run)` called when a budget was finished, before the run goes back to its trunk."""
    real = finish.finish

    def finish_and_act(run):
        code = real(run)
        act(run)
        return code

    monkeypatch.setattr(finish, "finish", finish_and_act)


@pytest.fixture(scope="module")
def alone(workplace):
    """Runs of 20, 30 and 40 iterations on their own, made by whichever test asks first."""
    return {}


@pytest.fixture
def each_alone(in_process, undisturbed, alone):
    for length in (20, 30):
        if length not in alone:
            assert run(in_process, f"alone-{length}", "--schedule.max_iters", str(length)) == 0
            alone[length] = f"alone-{length}"
    return alone | {40: "tiny"}


@pytest.fixture
def ladder(in_process, each_alone, alone):
    """The run that finishes 20 and 30 on its way to 40."""
    if "ladder" not in alone:
        assert run(in_process, "ladder", *LADDER) == 0
        alone["ladder"] = "ladder"
    return "ladder"


def test_a_milestone_is_the_run_of_its_length_and_the_trunk_goes_on_as_if_there_were_none(
    in_process, each_alone, ladder
):
    for length, name in each_alone.items():
        assert model_sums(ladder, length) == model_sums(name, length)
        assert final_sums(in_process, ladder, length) == final_sums(in_process, name, length)
        assert losses_of(in_process, ladder, length) == losses_of(in_process, name, length)
        assert losses_of(in_process, ladder, length, "val") == losses_of(in_process, name, length, "val")
    assert losses_of(in_process, ladder) == losses_of(in_process, "tiny")  # the trunk's: iterations 1 to 32
    ends = [r for r in records(in_process, ladder, "event") if r["event"] == "finished"]
    assert [r["iteration"] for r in ends] == [20, 30, 40]
    kept = set(saved_iterations(Path("runs/ladder/checkpoints")))
    assert {16, 24, 32} <= kept


def test_a_cooldown_later_is_the_one_in_line(in_process, ladder, capsys):
    shutil.rmtree("runs/later", ignore_errors=True)
    assert run(in_process, "later", "--schedule.branches", "[30]") == 0
    before = losses_of(in_process, "later"), losses_of(in_process, "later", 40)
    capsys.readouterr()
    assert run(in_process, "later", cooldown=30) == 0
    assert "resumes at iteration 24 from" in (said := capsys.readouterr().out)
    assert " | eta " in said and ", of all " not in said
    assert model_sums("later", 30) == model_sums(ladder, 30)
    assert losses_of(in_process, "later", 30) == losses_of(in_process, ladder, 30)
    assert (losses_of(in_process, "later"), losses_of(in_process, "later", 40)) == before
    assert run(in_process, "later", cooldown=30) == 0
    assert "runs/later is finished" in capsys.readouterr().out
    with pytest.raises(
        InputError, match=r"35 iterations cannot be finished: .* of iteration 28, .* 25, 30, 38 and 40 can"
    ):
        run(in_process, "later", cooldown=35)
    with pytest.raises(InputError, match="20 iterations cannot be finished"):
        run(in_process, "later", *LADDER)


@pytest.mark.slow
def test_killed_in_a_milestone_the_run_goes_on_there_to_the_same_bits(in_process, ladder, capsys):
    shutil.rmtree("runs/killed-ladder", ignore_errors=True)
    process = start(in_process, "tiny.yaml", "--name", "killed-ladder", "--checkpoint.every", "2", *LADDER)
    for line in process.stdout:
        if line.startswith("iter 28/30"):
            process.kill()
            break
    assert process.wait() == -signal.SIGKILL
    assert run(in_process, "killed-ladder", *LADDER) == 0
    assert "cooldown-000030/iter-0000" in capsys.readouterr().out
    for length in (20, 30, 40):
        assert model_sums("killed-ladder", length) == model_sums(ladder, length)
        assert losses_of(in_process, "killed-ladder", length) == losses_of(in_process, ladder, length)
    assert losses_of(in_process, "killed-ladder") == losses_of(in_process, ladder)


@pytest.mark.slow
def test_interrupted_while_a_milestone_is_exported_the_run_stops_after_it(in_process, ladder, monkeypatch):
    shutil.rmtree("runs/exporting", ignore_errors=True)
    after_each_budget(monkeypatch, lambda run: signal.raise_signal(signal.SIGTERM) if run.iteration == 20 else None)
    assert run(in_process, "exporting", *LADDER) == EXIT_INTERRUPTED
    assert not Path("runs/exporting/models/iter-000030").exists()
    assert run(in_process, "exporting", *LADDER) == 0
    assert model_sums("exporting", 40) == model_sums(ladder, 40)
    assert losses_of(in_process, "exporting") == losses_of(in_process, ladder)


@pytest.mark.slow
def test_a_trunk_that_is_damaged_at_the_branch_point_is_not_left_with_decayed_weights(in_process, ladder, monkeypatch):
    shutil.rmtree("runs/no-way-back", ignore_errors=True)

    def damage(run):
        for path in saved_iterations(run.directory.checkpoints).values():
            (path / "model.safetensors").write_bytes(b"")

    after_each_budget(monkeypatch, damage)
    with pytest.raises(InputError, match="no checkpoint is left to continue from"):
        run(in_process, "no-way-back", *LADDER)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("--schedule.milestones", "[50]"), "`schedule.milestones` holds 50; one below `schedule.max_iters` 40"),
        (("--schedule.milestones", "[5]"), "`schedule.milestones` holds 5"),
        (("--schedule.milestones", "[20]", "--schedule.kind", "cosine"), "needs `schedule.kind: wsd`"),
        (("--schedule.milestones", "[0]"), "greater than 0"),
    ],
)
def test_milestones_that_cannot_be_are_refused(workplace, overrides, said):
    with pytest.raises(InputError) as caught:
        tiny(workplace, *overrides)
    assert said in str(caught.value)


def test_a_cosine_has_no_trunk(in_process):
    with pytest.raises(InputError, match=r"`--cooldown 20` needs `schedule\.kind: wsd`"):
        run(in_process, "cosine", "--schedule.kind", "cosine", cooldown=20)


def test_what_is_left_is_of_the_budgets_that_the_command_makes_from_where_the_run_stands():
    ladder = Schedule(max_iters=20_000, milestones=[6_000, 10_000, 15_000])
    assert iterations_left(ladder, 0, goals(ladder)) == 26_200
    assert iterations_left(ladder, 8_000, [10_000]) == 2_000
    assert iterations_left(ladder, 9_000, [10_000, 20_000]) == 1_000 + 12_000


def test_the_estimated_end_leaves_out_what_is_done_and_has_the_validations(workplace):
    recipe, cut = tiny(workplace), {"micro_batch": 8, "grad_accum": 2, "targets": [30]}
    parts = {
        "directory": SimpleNamespace(resumable=lambda schedule: [Path("iter-000024")]),
        "shards": SimpleNamespace(val=SimpleNamespace(tokens=40 * 64)),
        "accelerator": SimpleNamespace(num_processes=1),
    }
    for measured, validation in ((0.0, 40 / 8 / 3), (10.0, 10.0)):  # a third of training where none was measured
        run = SimpleNamespace(recipe=recipe, schedule=None, throughput=Throughput(measured), **cut, **parts)
        assert seconds_left(run, 1.0) == pytest.approx(6 * (2 + validation / 20))


def test_up_to_its_branch_point_a_budget_has_the_learning_rates_of_any_longer_one():
    schedule = Schedule(max_iters=100, warmup_iters=10, decay_fraction=0.2, milestones=[40, 60], branches=[80])
    assert goals(schedule) == [40, 60, 100] and branch_points(schedule) == {32, 48, 64, 80}
    short = towards(schedule, 40)
    assert [lr_at(i, short) for i in range(33)] == [lr_at(i, schedule) for i in range(33)]
    shorter = schedule.model_copy(update={"max_iters": 50, "milestones": [40], "branches": [5, 60]})
    assert branch_points(shorter) == {32, 40}  # branches that it cannot have are left out
    assert lr_at(36, short) == 0.5 and lr_at(40, short) == 0 and lr_at(36, schedule) == 1
