"""A recipe is read strictly, and everything wrong with it is said at once."""

import re
import shlex
from pathlib import Path

import pytest

from overnight.cli import key_help
from overnight.core.scripts import recipe_file
from overnight.errors import InputError
from overnight.recipe.load import OPTIONS, load

ROOT = Path(__file__).parents[1]


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(InputError) as caught:
        load(path, list(overrides))
    return caught.value.problems


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_of_the_project_loads_under_its_own_name(path):
    assert load(path, []).name == path.stem


def test_a_home_folder_is_known_in_every_path_of_a_recipe(monkeypatch):
    monkeypatch.setenv("HOME", "/elsewhere/someone")
    keys = ("data.dir", "data.tokenizer", "evaluation.tasks_dir", "data.path")
    given = [f"--{key}=~/there" for key in keys]
    given += ["--evaluation.texts=[~/there]", "--evaluation.against=[~/there]", "--data.source=files"]
    recipe = load(ROOT / "recipes" / "quickstart.yaml", given)
    found = [recipe.data.dir, recipe.data.tokenizer, recipe.data.path, recipe.evaluation.tasks_dir]
    assert {*found, *recipe.evaluation.texts, *recipe.evaluation.against} == {"/elsewhere/someone/there"}


def test_three_problems_make_one_message_with_the_three(tmp_path):
    path = written(tmp_path, "speed: fast\noptim: {lr: high}\nbatch: {tokens_per_iter: 1000}\n")
    found = problems(path)
    assert len(found) == 3
    assert any("`speed` is not a key" in problem for problem in found)
    assert any("`optim.lr` is 'high'" in problem and "0.003 would work" in problem for problem in found)
    assert any("tokens_per_iter` 1000" in problem and "1024 would work" in problem for problem in found)
    assert all(str(path) in problem for problem in found)


def test_a_number_may_be_written_with_an_exponent_and_a_date_is_text(tmp_path):
    recipe = load(written(tmp_path, "name: 2024-06-01\noptim: {lr: 1e-3}"), ["--optim.weight_decay=2E-1"])
    assert (recipe.name, recipe.optim.lr, recipe.optim.weight_decay) == ("2024-06-01", 1e-3, 0.2)


TYPED = ["*.jsonl", "[x].jsonl", "%x", "@x", "{a}.jsonl", "2024-06-01", "87e4310", "a: b # c", "12:30", "yes", "'"]


@pytest.mark.parametrize("text", [*TYPED, "[" * 9])
def test_what_is_typed_for_a_key_that_takes_text_is_that_text(text):
    assert load(ROOT / "recipes" / "quickstart.yaml", ["--data.revision", text]).data.revision == text


def test_what_is_typed_may_still_be_null_a_list_or_quoted():
    given = ["--data.source=files", "--data.path=[a, b]", "--data.revision='1e5'", "--data.files=null", "--compile=no"]
    recipe = load(ROOT / "recipes" / "quickstart.yaml", given)
    assert recipe.data.path == ["a", "b"] and recipe.data.revision == "1e5" and recipe.data.files is None
    assert recipe.compile is False


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("data: {revision: 87e4310}", "`data.revision` is inf: .* text in quotes"),
        ("validation: {prompts: [2024]}", "`validation.prompts` is 2024: .* text in quotes"),
        ("optim: {lr: .inf}", "`optim.lr` is inf"),
        ("1: 2", "line 1: `1` is no name for a key"),
        ("a: b\nnull: 2", "line 2: `None` is no name for a key"),
        ("seed: !!bool foo", "line 1: `foo` cannot be read"),
        ("seed: !!int ''", "line 1: `` cannot be read"),
        ("name: !!timestamp foo", "line 1: `foo` cannot be read"),
        ("schedule: {hours: 7:30}", "`schedule.hours` is '7:30'"),
        ("seed: 010", "`seed` is '010'"),
        ('validation: {prompts: ["\\ud83d"]}', "`validation.prompts` is .* no text in UTF-8"),
        ("data: {dir: ''}", "`data.dir` is ''"),
        ("optim: {lr: {}}", "`optim.lr` is {}"),
        ("optim: {lr: 1, lr.x: 2}", "`optim.lr.x` is"),
        ("optim.lr: 1.0\noptim: {lr: 2.0}", "`optim.lr`: dots are for the command line"),
        ("seed: " + "9" * 6000, "line 1: `9{100}...` cannot be read"),
        ("x: " + "[" * 5000, "line 1: nested deeper"),
        ("compute_environment: LOCAL_MACHINE", "configuration of accelerate, not a recipe; .* --config_file"),
    ],
)
def test_whatever_yaml_makes_of_a_recipe_is_refused_with_its_key_or_line(tmp_path, text, said):
    (found,) = problems(written(tmp_path, text))
    assert re.search(said, found), found


def test_a_suggested_command_has_the_overrides_and_is_quoted_for_a_shell(tmp_path):
    path = written(tmp_path, "seed: 1")
    said = load(path, ["--data.dir", "$(touch x)"]).command("prepare.py")
    assert shlex.split(said) == ["python", "recipes/prepare.py", str(path), "--data.dir", "$(touch x)"]
    assert "'$(touch x)'" in said


def test_the_help_of_a_recipe_has_its_values_by_section():
    lines = key_help("quickstart").splitlines()
    assert lines.index("model:") < lines.index("  --model.n_positions  (256)") < lines.index("batch:")


@pytest.mark.parametrize(
    ("override", "ours"),
    [
        ("--batch_size=12", "batch.micro_batch"),
        ("--max_iters=40", "schedule.max_iters"),
        ("--output_dir=x", "name"),
        ("--per_device_train_batch_size=8", "batch.micro_batch"),
        ("--resume_from_checkpoint=x", "the same command again resumes"),
        ("--push_to_hub", "hub.repo_id"),
        ("--hub.token", "hf auth login"),
        ("--optim.learning_rate=1", "optim.lr"),
        ("--schedule.max_itres=40", "schedule.max_iters"),
        ("--shedule.hours=8", "schedule.hours"),
        ("--model.max_itres=40", "schedule.max_iters"),
    ],
)
def test_the_keys_of_other_tools_are_answered_with_ours(override, ours):
    (found,) = problems(ROOT / "recipes" / "quickstart.yaml", override)
    assert "is not a key of a recipe" in found and ours in found


@pytest.mark.parametrize("name", ["../x", "/abs", "a b", "a\nb", ".hidden", ""])
def test_e6_a_name_that_could_leave_the_runs_folder_is_refused(name):
    (found,) = problems(ROOT / "recipes" / "quickstart.yaml", f"--name={name!r}")
    assert "`name`" in found


def test_a_missing_recipe_is_answered_with_the_ones_that_are_there_the_nearest_first(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(InputError, match=r"^quikstart: .* such recipe; there are recipes/quickstart\.yaml, re"):
        recipe_file("quikstart")
    (tmp_path / "romanes.yaml").touch()
    with pytest.raises(InputError, match=rf"there are {tmp_path}/romanes\.yaml, .*recipes/quickstart\.yaml"):
        recipe_file(str(tmp_path / "romance.yaml"))


@pytest.mark.parametrize(
    ("override", "works"),
    [
        ("--optim.lr=high", "0.004, as the file has it, would work"),
        ("--data.val_tokens=none", "30000, as the file has it"),
        ("--checkpoint.keep=1", "2 would work"),
    ],
)
def test_a_value_that_is_suggested_is_this_recipes_own(tmp_path, override, works):
    path = written(tmp_path, "optim: {lr: 4e-3}\ndata: {val_tokens: 30000}\ncheckpoint: {keep: 0}")
    assert any(works in problem for problem in problems(path, override))


def test_an_option_of_another_script_is_answered_with_that_script():
    for given, said in (
        ("--adopt", "`--adopt` is an option of prepare.py"),
        ("--adpot", "`--adopt` is"),
        ("--gpus", "plan.py"),
    ):
        (found,) = problems(ROOT / "recipes" / "quickstart.yaml", f"{given}=x")
        assert said in found and "dropout" not in found
    for script, options in OPTIONS.items():
        source = (ROOT / "recipes" / script).read_text()
        assert all(f'"--{option}"' in source for option in options)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("--model.n_head=5", "is no multiple of `model.n_head` 5"),
        ("--batch.sequence_length=512", "longer than `model.n_positions` 256"),
        ("--batch.micro_batch=3", "does not divide an iteration of 16 rows"),
        ("--schedule.warmup_iters=400", "do not fit into `schedule.max_iters`"),
        ("--data.path=x.txt", "no use with `data.source: embedded`"),
        ("--data.path=[x.txt,y.txt,z.txt]", "`data.path` is x.txt, y.txt and z.txt: it has no use"),
        ("--checkpoint.keep=1", "greater than or equal to 2"),
        ("--data.val_tokens=1", "greater than or equal to 2"),
        ("--model.n_positions=1", "greater than or equal to 2"),
        ("--data.reserved_fraction=0", "greater than 0"),
        ("--data.reserved_fraction=1.0", "less than 1"),
        ("--data.download_gb=-1.0", "greater than or equal to 0"),
        ("--seed=4294967296", "less than 4294967296"),
        ("--threads=100000", "less than or equal to 4096"),
        ("--schedule.hours=1e9", "less than or equal to 10000"),
        ("--schedule.hours=7:30", "`schedule.hours` is '7:30'"),
        ("--schedule.kind=cosine --schedule.hours=1", "`schedule.hours` needs `schedule.kind: wsd`"),
        ("--schedule.kind=cosine --stop.when_flat=true", "`stop.when_flat` needs `schedule.kind: wsd`"),
        ("--schedule.milestones=[20,", "quotes around the whole list would work"),
        ("--optim.lr=1e39", "less than or equal to"),
        ("--hub.license=MIT", "an identifier such as apache-2.0 would work"),
        ("--data.dir=\udcff", "no text in UTF-8"),
        ("--schedule.max_iters=99999999999999999999", "less than or equal to"),
        ("--model", "`model` is True"),
        ("--data.dir=", "`data.dir` is ''"),
        ("--logging.trackers=tensorboard", "`[tensorboard]` would work"),
    ],
)
def test_settings_that_do_not_fit_are_refused_with_a_way_out(override, said):
    found = problems(ROOT / "recipes" / "quickstart.yaml", *override.split(" "))
    assert any(said in problem for problem in found)


def test_a_tokenizer_of_its_own_is_measured_without_english_tasks_unless_the_recipe_says_otherwise(tmp_path):
    path = written(tmp_path, "data: {source: files, path: x.txt, tokenizer: trained}")
    own = load(path).evaluation
    assert (own.against, own.tasks, own.texts) == (["untrained", "unigram"], [], [])
    assert load(path, ["--evaluation.tasks", "[blimp]"]).evaluation.tasks == ["blimp"]
    assert load(path, ["--data.tokenizer", "x/y"]).evaluation.against == ["openai-community/gpt2"]
