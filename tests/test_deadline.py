"""A run that is given hours: at any pace its model is there in time, and the next night continues from the trunk."""

import json
import re
import signal
import time
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from runs import finished, losses_by_decay, records, start, tiny, train

from overnight.errors import InputError
from overnight.recipe.schedule import branch_point, lr_at, towards
from overnight.run_dir.layout import saved_iterations
from overnight.training import time_limit
from overnight.training import train as train_module
from overnight.training.state import KeptLimit, TimeLimit
from overnight.training.time_limit import longest_in_time, next_time

LONG = ("--schedule.max_iters", "100000", "--validation.every", "50", "--checkpoint.every", "100")
LONG += ("--logging.every", "5", "--validation.prompts", "[]")


def night_of(seconds: float, recipe, pace, monkeypatch, killed: tuple[int, ...] = ()) -> tuple[list[int], float]:
    """Go through a whole night on a clock of our own: the budgets that were chosen, and when the model was there.

    `pace` gives the seconds of an iteration at an iteration. A session that is `killed` there is gone on with from its
    last hundred iterations, ten minutes later, with what `night.json` keeps.
    """
    now = 0.0
    monkeypatch.setattr(time_limit.time, "monotonic", lambda: now)
    monkeypatch.setattr(time_limit.time, "clock_gettime", lambda clock: now)
    limit = TimeLimit(KeptLimit("", "", seconds), ends=seconds, export_seconds=20.0)
    told, spent = SimpleNamespace(all_validations=0.0, validation_seconds=0.0), []
    run = SimpleNamespace(recipe=recipe, iteration=0, throughput=told)
    kills = list(killed)
    while run.iteration < (limit.target_iters or recipe.schedule.max_iters):
        if run.iteration in kills:
            kills.remove(run.iteration)
            run.iteration -= run.iteration % 100
            now += 600.0
            told.all_validations = told.validation_seconds = 0.0
            limit = TimeLimit(limit.kept, ends=seconds, export_seconds=20.0)
        now += pace(run.iteration)
        run.iteration += 1
        if run.iteration % recipe.validation.every == 0 or run.iteration == limit.target_iters:
            now += 10.0
            told.all_validations, told.validation_seconds = told.all_validations + 10.0, 10.0
        point = branch_point(towards(recipe.schedule, limit.target_iters or recipe.schedule.max_iters))
        if run.iteration % 10 == 0 and run.iteration <= point:
            budget = longest_in_time(run, limit)
            if budget is not None:
                limit.kept = KeptLimit("", "", seconds, budget)
                spent.append(budget)
    return spent, now + 20.0


@pytest.mark.parametrize("killed", [(), (250, 2_650, 4_030)])
@pytest.mark.parametrize(
    "pace",
    [
        lambda i: 4.4,
        lambda i: 6.0 if i < 200 else 4.4,  # cold at first
        lambda i: 4.4 if i < 3_000 else 6.6,  # slower in the middle of the night
        lambda i: 4.4 + 0.5 * (i % 7),
    ],
)
def test_whatever_the_pace_the_model_is_there_in_time_and_the_night_is_used(root, pace, monkeypatch, killed):
    from overnight.recipe.load import load

    recipe = load(root / "recipes" / "fineweb_edu_40m.yaml")
    chosen, over = night_of(36_000, recipe, pace, monkeypatch, killed)
    assert 0.9 * 36_000 < over < 1.05 * 36_000
    assert chosen and chosen[-1] % 10 == 0 and len(chosen) < 20


def test_a_night_too_short_for_anything_ends_with_the_shortest_budget(root, monkeypatch):
    from overnight.recipe.load import load

    recipe = load(root / "recipes" / "fineweb_edu_40m.yaml", ["--schedule.warmup_iters", "50"])
    chosen, _ = night_of(60, recipe, lambda i: 4.4, monkeypatch)
    assert chosen[-1] in (62, 63)  # it begins to decay when the warmup is over


@pytest.mark.parametrize("evening", ["2026-03-28 23:00", "2026-10-24 23:00"])
def test_the_next_time_that_a_clock_shows_is_the_clocks_where_summer_time_begins_or_ends(monkeypatch, evening):
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    end = next_time("07:30", datetime.strptime(evening, "%Y-%m-%d %H:%M").astimezone())
    shown = datetime.fromtimestamp(end.timestamp())
    monkeypatch.undo()
    time.tzset()
    assert shown.strftime("%H:%M") == "07:30"


def test_the_next_time_that_a_clock_shows():
    evening = datetime(2026, 11, 25, 22, 30).astimezone()
    assert next_time("07:30", evening) == evening + timedelta(hours=9)
    assert next_time("23:00", evening) == evening + timedelta(minutes=30)
    for wrong in ("7", "24:00", "07:60", "soon"):
        with pytest.raises(InputError, match=f"`--until {wrong}`: a time of day such as 07:30 would work"):
            next_time(wrong, evening)


@pytest.mark.parametrize(
    ("overrides", "until", "said"),
    [
        (("--schedule.hours", "1", "--schedule.milestones", "[20]"), None, "finds the one budget that fits"),
        (("--schedule.hours", "0"), None, "greater than 0"),
        (("--schedule.hours", "1"), "07:30", "are both given"),
        (("--schedule.milestones", "[20]"), "07:30", "no `schedule.milestones`"),
        (("--schedule.kind", "cosine"), "07:30", r"`--until` needs `schedule.kind: wsd`"),
    ],
)
def test_nights_that_cannot_be_are_refused(in_process, overrides, until, said):
    with pytest.raises(InputError, match=said):
        train_module.train(tiny(in_process, "--name", "refused", *overrides), until=until)
    assert not Path("runs/refused").exists()


@pytest.mark.slow
def test_two_nights_make_two_models_from_one_trunk(in_process, monkeypatch, capsys):
    monkeypatch.setattr(time_limit, "EXPORT_SECONDS", 1.0)
    monkeypatch.setattr(time_limit.psutil.Process, "create_time", lambda process: time.time())

    def night() -> int:
        recipe = tiny(in_process, "--name", "nights", *LONG, "--schedule.hours", str(12 / 3600))
        assert train_module.train(recipe) == 0
        return finished(in_process, "nights")[-1]

    first = night()
    said = capsys.readouterr().out
    schedule = towards(tiny(in_process, *LONG).schedule, first)
    assert f"continues from the trunk at iteration {branch_point(schedule):,}" in said
    assert lr_at(first, schedule) == 0 and (Path("runs/nights/models") / f"iter-{first:06d}").is_dir()
    assert json.loads(Path("runs/nights/night.json").read_text())["budget"] == first
    second = night()
    assert f"resumes at iteration {branch_point(schedule)} from" in capsys.readouterr().out
    assert second > first
    trunk = {i: loss for (decay, i), loss in losses_by_decay(in_process, "nights").items() if decay is None}
    assert max(trunk) >= branch_point(towards(schedule, second)) - 5
    assert branch_point(schedule) in saved_iterations(Path("runs/nights/checkpoints"))


@pytest.mark.slow
def test_killed_in_between_a_night_keeps_its_end(workplace):
    """That a night which keeps its end is over in time is shown above, on a clock that no other test slows down."""
    command = ("tiny.yaml", "--name", "killed-night", *LONG, "--schedule.max_iters", "400", "--schedule.hours", "0.5")
    process = start(workplace, *command)
    for line in process.stdout:
        if "iterations fit into" in line:
            process.kill()
            break
    assert process.wait() == -signal.SIGKILL
    night = workplace / "runs" / "killed-night" / "night.json"
    chosen = json.loads(night.read_text())
    assert chosen["budget"]
    again = train(workplace, *command)
    assert again.returncode == 0, again.stderr
    assert json.loads(night.read_text())["until"] == chosen["until"]
    assert re.search(f"the night ends in .*, on {datetime.fromisoformat(chosen['until']):%a %H:%M}", again.stdout)
    (budget,) = finished(workplace, "killed-night")
    assert records(workplace, "killed-night", "train")[-1]["iteration"] == budget
