"""The plan says what each budget costs and reaches, by the law alone, and where it does not know."""

import json
import os
import re
import subprocess
import sys

import pytest
from command_lines import blocks
from runs import ROOT

from overnight.planning import scaling_law
from overnight.planning.model_size import iterations_in_all
from overnight.planning.table import by_law
from overnight.recipe.load import load

NIGHT = ROOT / "recipes" / "fineweb_edu_40m.yaml"


def plan(*arguments: str, recipe: str = str(NIGHT), **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "recipes" / "plan.py"), recipe, *arguments]
    nothing = {"cwd": ROOT / "tests"}  # no data is prepared there, whatever this checkout was used for
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False, **nothing)


def planned(*arguments: str, recipe: str = str(NIGHT)) -> dict:
    done = plan("--gpu", "rtx-4070", "--json", *arguments, recipe=recipe)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def night() -> dict:
    return planned()


def test_a_run_with_milestones_has_a_line_of_its_own_and_one_budget_is_no_sweet_spot():
    ladder = plan("--gpu", "rtx-4070", recipe=str(ROOT / "recipes" / "fineweb_edu_40m_ladder.yaml")).stdout
    assert re.search(r"all of its milestones in one run: 26,200 iterations, 3\d\.\d hours, \d\.\d kWh, money", ladder)
    alone = plan("--gpu", "rtx-4070", "--milestones", "8000", WORLD_SIZE="2").stdout
    assert "WARNING   the plan is for one card, and here are 2" in alone and "one card" not in ladder
    assert "No budget here is expected to pass" in alone and "sweet spot" not in alone
    scarce = plan("--gpu", "rtx-4070", "--data.train_tokens", "200000000").stdout
    assert "The sweet spot of those with a prediction is 10,000: " in scarce and "The best of those with" in scarce
    assert "No budget here of those with a prediction is expected" in scarce and "\nbatch " not in scarce


def test_the_disk_of_a_text_without_a_limit_is_said_to_be_at_least(night):
    assert night["data_bounded"]
    unlimited = plan(recipe=str(ROOT / "recipes" / "gpt2_124m.yaml")).stdout
    assert "at least 28.5 GB more" in unlimited and "WARNING   how many tokens the text has is not known" in unlimited
    own = plan(recipe=str(ROOT / "recipes" / "own_text.yaml")).stdout
    assert "for the run; what the data takes is not known before `prepare.py --dry-run`" in own
    assert "tokens; how many there are to train on is not known until the data is prepared\n" in own


def column(found: dict, key: str) -> list:
    return [row[key] for row in found["rows"]]


ADAMW_COSINE = ("--optim.name", "adamw", "--schedule.kind", "cosine")


def test_the_night_has_the_tokens_epochs_losses_and_hours_of_the_facts(night):
    assert column(night, "max_iters") == [6_000, 10_000, 15_000, 20_000]
    assert column(night, "tokens") == pytest.approx([3.146e9, 5.243e9, 7.864e9, 10.486e9], rel=1e-3)
    assert column(night, "epochs") == pytest.approx([0.855, 1.425, 2.137, 2.849], abs=1e-3)
    assert column(night, "loss") == pytest.approx([3.368, 3.290, 3.241, 3.212], abs=0.005)
    stock = planned(*ADAMW_COSINE)
    assert column(stock, "loss") == pytest.approx([3.505, 3.423, 3.372, 3.342], abs=0.005)
    assert all(row["loss_low"] < row["loss"] < row["loss_high"] for row in night["rows"] + stock["rows"])
    assert 4.0 <= night["seconds_per_iteration"] <= 4.6
    for row in night["rows"]:
        assert 4.2 * row["max_iters"] / 3600 < row["hours"] < 4.8 * row["max_iters"] / 3600  # and its validations
        assert row["kwh"] == pytest.approx(row["hours"] * 0.2) and row["nights"] == pytest.approx(row["hours"] / 10)


def test_the_answers_follow_from_the_rows(night):
    assert night["cheapest_below_gpt2"] == 10_000 and night["best"] == 20_000 and night["sweet_spot"] == 15_000
    chances = column(night, "chance_below_gpt2")
    assert chances == sorted(chances) and 0.05 < chances[0] < 0.5 < chances[1] < chances[3] < 0.95
    gains = column(night, "gain")
    assert gains[0] is None and gains[1:] == sorted(gains[1:], reverse=True)
    assert planned(*ADAMW_COSINE)["cheapest_below_gpt2"] is None


def test_another_width_other_data_and_another_card_move_the_rows_as_the_law_says(night):
    wide = planned("--model.n_embd", "768")
    assert wide["rows"][0]["loss"] == pytest.approx(0.961 * (1.2683 + 2.0333 * 8.49347**-0.1278 + 0.3895), abs=2e-3)
    assert wide["rows"][0]["hours"] > 2 * night["rows"][0]["hours"]
    scarce = planned("--data.train_tokens", "1_000_000_000")
    assert column(scarce, "epochs") == pytest.approx([tokens / 1e9 for tokens in column(night, "tokens")])
    assert all(less > more for less, more in zip(column(scarce, "loss"), column(night, "loss"), strict=True))
    assert scarce["rows"][3]["effective_tokens"] < 0.8 * scarce["rows"][3]["tokens"]
    fast = planned("--gpu", "rtx-4090")
    assert column(fast, "loss") == column(night, "loss") and fast["rows"][0]["hours"] < 0.6 * night["rows"][0]["hours"]


def test_the_law_is_the_one_that_its_authors_wrote():
    assert scaling_law.annealed_loss(21_233_664, 3.145728e9, 3.68e9, "fineweb-edu") == pytest.approx(3.5048, abs=5e-4)
    assert scaling_law.effective_tokens(2e9, 4e9) == 2e9
    # Muennighoff et al., section 5: up to four epochs are almost as good as new data, by 40 they are worth little
    assert scaling_law.effective_tokens(4e9, 1e9) == pytest.approx(3.73e9, rel=0.01)
    assert scaling_law.effective_tokens(100e9, 1e9) < 16.5e9


def test_smaller_updates_are_expected_to_use_tokens_better_and_short_runs_gain_most(night):
    """The sweep has 3.926 at 524,288 and 3.736 at 131,072 tokens an update, for AdamW after 0.6B tokens."""
    worth = scaling_law.batch_worth("adamw", 131_072, 6e8)
    losses = [scaling_law.annealed_loss(21e6, 6e8, None, "fineweb-edu", 0.98, each) for each in (1.0, worth)]
    assert losses[0] - losses[1] == pytest.approx(3.926 - 3.736, abs=0.06)
    assert [scaling_law.batch_worth(name, 524_288, 3e9) for name in ("muon", "adamw")] == [1, 1]
    gains = [planned("--milestones", milestone)["gain_of_smaller_batch"] for milestone in ("6000", "20000")]
    assert gains[0] > 2 * gains[1] > 0 and gains[1] == night["gain_of_smaller_batch"]
    small = planned("--batch.tokens_per_iter", "131072", "--milestones", "24000")
    assert small["rows"][0]["loss"] == pytest.approx(night["rows"][0]["loss"] - gains[0])


def test_nothing_is_expected_of_what_the_law_does_not_know():
    quickstart = plan("--gpu", "rtx-4070", recipe=str(ROOT / "recipes" / "quickstart.yaml")).stdout
    assert "loss      nothing is expected: the scaling law covers FineWeb-Edu and FineWeb alone" in quickstart
    assert "GPT-2 124M" not in quickstart and "sweet spot" not in quickstart and "0.00 s" not in quickstart
    assert "WARNING   the hours are a lower bound: so small a model waits" in quickstart
    assert next(line.split() for line in quickstart.splitlines() if re.match(r" +320 ", line))[:7] == [
        "320", "1.31M", "-", "-", "-", "-", "-",
    ]  # fmt: skip
    for other in (["--data.path", "someone/else"], ["--model.vocab_size", "4096"], ["--model.n_embd", "96"]):
        recipe = load(NIGHT, other)
        assert scaling_law.unknown(recipe) and not by_law(recipe, [10_000], None).of


def test_repeated_text_is_warned_of_from_four_epochs_and_nothing_is_expected_beyond_forty():
    few = plan("--gpu", "rtx-4070", "--data.train_tokens", "2000000000").stdout
    assert "WARNING   20,000 iterations are 5.2 epochs: from 4 on" in few
    assert "a lower bound" not in few and "does not fit" not in few
    many = planned("--data.train_tokens", "100000000")
    assert many["sweet_spot"] is None
    assert [loss is None for loss in column(many, "loss")] == [False, True, True, True]
    assert "nothing beyond 40 epochs" in many["losses"]


def test_a_machine_without_a_gpu_is_planned_as_no_card_unless_one_is_named():
    here = json.loads(plan("--json").stdout)
    assert here["gpu"] is None and here["memory"] is None
    assert not any(row[key] for row in here["rows"] for key in ("hours", "kwh", "cost"))
    said = plan().stdout
    assert "`--gpu rtx-4070` plans for the card" in said and "the start measures" not in said


def test_hours_that_are_given_have_a_row():
    rows = planned("--schedule.hours", "10")["rows"]
    (row,) = [row for row in rows if row["max_iters"] not in (6_000, 10_000, 15_000, 20_000)]
    assert 9.99 < row["hours"] <= 10
    assert column(planned("--schedule.hours", "40"), "max_iters")[-2:] == [15_000, 20_000]
    short = planned("--schedule.hours", "0.01", "--batch.micro_batch", "256")
    assert column(short, "max_iters") == [6_000, 10_000, 15_000, 20_000]
    told = [each for each in short["caveats"] if each.startswith("`")]
    assert told[0].startswith("`schedule.hours` 0.01 is too short for any budget: the shortest, 312 iterations, takes")
    assert told[1].startswith("`batch.micro_batch` 256 does not fit the 12 GiB of rtx-4070, by the formula: 32 does")
    few = ("--schedule.max_iters", "3", "--schedule.warmup_iters", "1")
    assert column(planned(*few), "max_iters") == [1, 2, 3]


COLUMNS = "dataset,params_nonembedding_millions,unique_tokens_billions,annealed,tokens_billions,val_loss\n"


def test_measured_runs_shift_the_law_and_narrow_its_intervals(night, tmp_path):
    mine = tmp_path / "runs.csv"
    ours = night["rows"][0]
    mine.write_text(COLUMNS + f"fineweb-edu,21.233664,3.68,yes,3.145728,{ours['loss'] + 0.05}\n")
    shifted = planned("--calibrate", str(mine))
    assert column(shifted, "loss") == pytest.approx([loss + 0.05 for loss in column(night, "loss")])
    width = [row["loss_high"] - row["loss_low"] for row in (shifted["rows"][0], ours)]
    assert width[0] == pytest.approx(width[1] / 3)


BAD_TABLES = {
    "dataset,val_loss\nfineweb-edu,3\n": "no column annealed, params_nonembedding_millions",
    COLUMNS + "fineweb,21,3.68,yes,3,3.4\n": "no row with `dataset` fineweb-edu and `annealed` yes",
    COLUMNS + "fineweb-edu,21,3.68,yes,3,low\n": "could not convert string to float: 'low'",
    "": "no column",
}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--throughput nan", "`--throughput nan`: tokens a second"),
        ("--throughput -1", "119500 would work"),
        ("--hours-per-night 0", "`--hours-per-night 0`"),
        ("--price-kwh nan", "`--price-kwh nan`"),
        ("--gpu rtx-9999", "`--gpu rtx-9999` is not known; a plan is for one of rtx-3060-12gb, rtx-3060-8gb"),
        ("--gpu all --plot x.png", "`--plot` draws the losses of one card"),
        ("--milestones 6k,10k", "iterations with commas between would work"),
        ("--milestones 0", "iterations with commas between would work"),
        ("--calibrate nowhere.csv", "No such file"),
        ("--probe-file nowhere.json", "not what `--probe --probe-file` writes"),
        *BAD_TABLES.items(),
    ],
)
def test_bad_input_ends_with_2_and_one_message(arguments, said, tmp_path):
    given = arguments.split()
    if arguments in BAD_TABLES:
        (tmp_path / "runs.csv").write_text(arguments)
        given = ["--calibrate", str(tmp_path / "runs.csv")]
    done = plan(*given)
    assert done.returncode == 2 and done.stdout == ""
    assert said in done.stderr and len(done.stderr.splitlines()) == 1


def test_milestones_a_throughput_of_your_own_and_a_figure(tmp_path):
    file = tmp_path / "plan.svg"
    found = planned("--milestones", "8000,2000", "--throughput", "100000", "--price-kwh", "0.5", "--plot", str(file))
    assert column(found, "max_iters") == [2_000, 8_000]
    assert found["seconds_per_iteration"] == pytest.approx(5.24288) and found["speed"]["source"] == "as you say"
    assert found["rows"][0]["cost"] == pytest.approx(found["rows"][0]["kwh"] * 0.5)
    words = set(re.findall("<!-- (.*) -->", file.read_text()))  # what matplotlib writes beside the shapes of a text
    assert {"hours", "2,000 iterations", "4.19B tokens", "90 % interval"} <= words
    assert "GPT-2 124M's published loss on fineweb-edu: 3.2924" in words


PROBE = {"device": "NVIDIA GeForce RTX 4070", "tokens_per_second": 1e5, "micro_batch": 16, "peak_gib": 3.94}


@pytest.mark.parametrize(
    ("formula", "memory"),
    [
        (4.73, "memory    3.9 GiB with 16 rows at once, by PyTorch's allocator, measured on NVIDIA GeForce RTX 4070"),
        (None, "memory    7.4 GiB with 32 rows at once, by the formula; not measured"),  # a CPU was probed
    ],
)
def test_memory_that_a_probe_measured_is_said_in_place_of_the_formula(tmp_path, formula, memory):
    file = tmp_path / "probe.json"
    file.write_text(json.dumps(PROBE | {"formula_gib": formula}))
    done = plan("--gpu", "rtx-4070", "--probe-file", str(file))
    assert done.returncode == 0, done.stderr
    said = next(line for line in done.stdout.splitlines() if line.startswith("memory"))
    assert said.startswith(memory) and ("not measured" in said) == (formula is None)
    assert "100k tokens a second, 5.24 s an iteration; measured on NVIDIA" in done.stdout


def test_the_documents_have_the_hours_and_the_memory_that_the_plan_prints(night):
    said = plan("--gpu", "rtx-4070").stdout
    [block] = [text for text in blocks(ROOT / "docs" / "operations.md", "text") if "iterations  tokens" in text]
    assert block.strip() == said[said.index("fineweb_edu_40m on") :].strip()
    memory = [planned("--batch.micro_batch", str(rows))["memory"]["peak_gib"] for rows in (8, 16, 32)]
    eight, sixteen, thirty_two = (f"{gib:.1f}" for gib in memory)
    hours = " / ".join(f"{hours:.1f}" for hours in column(night, "hours"))
    readme, status = ((ROOT / name).read_text() for name in ("README.md", "docs/status.md"))
    assert f"| {eight} / {sixteen} / {thirty_two} GiB |" in status and f"| {hours} |" in status
    assert f"| {column(night, 'hours')[-1]:.1f}; {thirty_two} GiB |" in readme
    operations = (ROOT / "docs" / "operations.md").read_text()
    assert f"needs {eight}, {sixteen} and {thirty_two} GiB" in operations
    run, data = f"{night['disk_gb']:.1f} GB", f"{night['data_gb']:.1f} GB"
    assert f"about {run} for the run folder" in readme and f"| a run folder | about {run} at most |" in operations
    assert f"the recipe needs about {run}" in operations and f"the recipe needs about {data}" in operations


RECIPES = ["fineweb_edu_40m", "fineweb_edu_40m_ladder", "practitioner_40m", "gpt2_124m", "own_text"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_table_of_recipes_has_the_hours_of_their_iterations(recipe):
    file = ROOT / "recipes" / f"{recipe}.yaml"
    hours = planned(recipe=str(file))["seconds_per_iteration"] * iterations_in_all(load(file).schedule) / 3600
    table = (ROOT / "recipes" / "README.md").read_text().splitlines()
    [row] = [line for line in table if line.startswith(f"| [{recipe}.yaml]")]
    assert row.split(" | ")[3] == f"{hours:.1f}"
