"""A model's card tells what its run's files say, its code runs, and no text from elsewhere becomes markup in it."""

import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from runs import records, tiny

from overnight.core.console import plain
from overnight.core.published import fenced, text, yaml_text
from overnight.data.batches import TrainingBatches
from overnight.data.ngrams import ngram_losses, seen_tokens
from overnight.data.shards import open_shards
from overnight.errors import InputError
from overnight.recipe.load import load
from overnight.report.model_card import as_trained, budgets, claims, on_the_way, report
from overnight.training import train as train_module

HOSTILE = "---\nlicense: evil\n---\n<script>alert(1)</script> [x](http://evil.example) ![](http://evil.example/y.png)"
HOSTILE += " {{7*7}} ``` `a` | \u202eabc www.evil.example <img src=x onerror=y>"


@pytest.fixture(scope="module")
def made():
    """Whether the run was made."""
    return []


@pytest.fixture
def run(in_process, made):
    """A run with two budgets whose recipe says hostile things, and an evaluation beside its last model."""
    folder = Path("runs/carded")
    if not made:
        options = ("--name", "carded", "--schedule.milestones", "[30]", "--validation.every", "4")
        options += ("--validation.ngram_baselines", "true")
        options += ("--validation.prompts", json.dumps([HOSTILE]), "--data.license", json.dumps(HOSTILE))
        assert train_module.train(tiny(in_process, *options)) == 0
        scored = folder / "evaluation" / "iter-000040"
        scored.mkdir(parents=True)
        (scored / "results.json").write_text(json.dumps(RESULTS))
        (scored / "comparison.md").write_text("# compared\n")
        made.append(True)
    return folder


TASK = {"metrics": {"acc": 0.41}, "metric": "acc", "chance": 0.25, "items": 100}
VERDICT = {
    "task": "sciq",
    "metric": "acc",
    "items": 100,
    "chance": 0.25,
    "ours": 0.41,
    "theirs": 0.5,
    "difference": -0.09,
    "low": -0.1,
    "high": -0.08,
}
RESULTS = {
    "settings": {"limit": 100},
    "models": [{"tasks": {"sciq": TASK}, "facts": {"name": "ours"}, "validation": {"bits_per_byte": 1.23456}}],
    "comparisons": [{"opponent": HOSTILE, "tasks": [VERDICT | {"verdict": "worse"}]}],
}


def readme(run: Path, budget: int = 40, repo_id: str | None = None) -> str:
    return (report(run, budget, repo_id) / "README.md").read_text()


def rendered(markdown: str) -> str:
    """The HTML of a card's body, raw HTML in it passed through as the Hub would."""
    return MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown.split("\n---\n", 1)[1])


def test_a_card_has_the_recipe_that_its_model_was_trained_with(in_process):
    """A milestone that was finished before a rate was changed never saw the new one, wherever the run went on from."""
    recipe = tiny(in_process, "--schedule.milestones", "[30]", "--optim.lr", "1e-3")
    change = {"event": "changed", "key": "optim.lr", "before": 5e-3, "now": 1e-3, "iteration": 24}
    records = [{"event": "finished", "iteration": 30}, change, {"event": "finished", "iteration": 40}]
    assert [as_trained(recipe, records, end).optim.lr for end in records[::2]] == [5e-3, 1e-3]
    assert [on_the_way(change, recipe, records, end) for end in records[::2]] == [False, True]


def test_the_card_has_the_values_of_the_files(run, in_process):
    card = readme(run)
    (end,) = [r for r in records(in_process, "carded", "event") if (r["event"], r["iteration"]) == ("finished", 40)]
    header = yaml.safe_load(card.split("---\n")[1])
    results = header["model-index"][0]["results"]
    assert header["license"] == "apache-2.0" and header["model-index"][0]["name"] == "carded"
    assert results[0]["metrics"] == [{"type": "loss", "value": round(end["val_loss"], 4)}]
    assert results[1]["metrics"] == [{"type": "acc", "value": 0.41}] and results[1]["dataset"]["name"] == "sciq"
    assert f"**{end['val_loss']:.4f}** nats per token" in card
    batches = TrainingBatches((shards := open_shards(in_process / "data")).train, tiny(in_process).batch, 1337)
    for budget in (30, 40):
        of_its_tokens = ngram_losses(seen_tokens(batches, budget), shards.val.read_all())
        pairs = "than the frequencies of tokens ({unigram:.2f} nats), not than those of pairs ({bigram:.2f} nats)."
        assert pairs.format(**of_its_tokens) in readme(run, budget)
    rows = re.findall(r"^\| `iter-0000(30|40)` \| .*? \| - \| (.*?) \| (.*?) \|$", card, re.MULTILINE)
    assert [row[0] for row in rows] == ["30", "40"] and rows[1][2] == f"{end['val_loss']:.3f}"
    assert re.fullmatch(r"\d\.\d{3} to \d\.\d{3} at iteration \d+", rows[1][1])
    assert "better on 0 of 1 tasks, worse on 1" in card and "-9.0 (-10.0 to -8.0) points" in card
    assert (
        "Only the first 100 items" in card and "1.2346 bits per byte" in card and "not checked (contamination)" in card
    )
    assert "| sciq (acc) | 100 | 25.0% | 41.0% | 50.0% |" in card
    assert "| peak learning rate | 0.005 |" in card and "constant, linear to zero over the last 20%" in card
    assert header["widget"] == [{"text": " ".join(plain(HOSTILE).split())}]
    written = [r for r in records(in_process, "carded", "val") if (r["iteration"], r.get("cooldown")) == (40, 40)]
    assert plain(HOSTILE + written[-1]["samples"][0]).rstrip() in card
    assert "| energy | not measured |" in card
    assert ModelCard(card).data.to_dict()["library_name"] == "transformers"


def test_f5_text_from_recipes_and_results_stays_text(run):
    card = readme(run)
    assert yaml.safe_load(card.split("\n---\n")[0].removeprefix("---\n"))["license"] == "apache-2.0"
    html = rendered(card)
    assert "<script" not in html and "<img src=x" not in html and "\u202e" not in html
    links = re.findall(r'(?:href|src)="([^"]*)"', html)
    assert sorted(links) == ["curve.png", "evaluation/comparison.md", "recipe.yaml"]
    assert html.count("<h1>") == 1 and html.count("<h2>") == 7
    assert "{{7*7}}" in html  # a value is no template
    assert "49" not in text("{{7*7}}") and "{{7*7}}" in MarkdownIt().render(text("{{7*7}}"))
    for awkward in ("a `b` c", "**bold**", "# head", "1 | 2", "http://evil.example", "<b>", "x_y_z", "a\n---\nb"):
        shown = MarkdownIt("commonmark", {"html": True}).enable("table").render("x " + text(awkward))
        assert re.fullmatch(r"<p>x [^<]*</p>\n", shown), shown
    assert MarkdownIt().render(fenced("a\n````\n# b", "sh")).count("<code") == 1


def test_the_recipe_beside_the_card_is_one_and_names_no_folder_of_this_machine(run, in_process):
    folder = report(run, 40)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert recipe["data"]["path"] == ["text.jsonl"] and recipe["schedule"]["milestones"] == [30]
    for path in folder.rglob("*"):
        if path.suffix in (".md", ".yaml", ".jsonl"):
            assert str(in_process) not in path.read_text()
    kept = [json.loads(line) for line in (report(run, 30) / "metrics.jsonl").read_text().splitlines()]
    assert {r["iteration"] for r in kept if r["kind"] == "train"} == set(range(1, 31))
    assert (folder / "evaluation" / "comparison.md").read_text() == "# compared\n"
    assert not (report(run, 30) / "evaluation").exists()


def test_letters_of_every_language_stay_letters_in_yaml_which_one_function_writes(root):
    assert yaml_text({"prompts": ["Über", "日本", "🌙"]}) == "prompts:\n- Über\n- 日本\n- 🌙\n"
    hostile = {"name": "a\u202eb\x1b[2J", "prompt": "ü"}
    assert "\u202e" not in yaml_text(hostile) and yaml.safe_load(yaml_text(hostile)) == hostile
    sources = [path.name for path in (root / "src").rglob("*.py") if "yaml.safe_dump(" in path.read_text()]
    assert sources == ["published.py"]


def test_report_writes_a_folder_for_each_finished_model(run, root):
    command = [sys.executable, str(root / "recipes" / "report.py")]
    shown = subprocess.run([*command, str(run)], capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.splitlines() == [f"written: {run}/report/iter-0000{budget}/README.md" for budget in (30, 40)]


def test_a_path_of_no_run_or_model_is_answered_with_what_is_there_and_what_would_work(run, root, monkeypatch, capsys):
    begun = Path(shutil.copytree(run, "runs/begun", ignore=shutil.ignore_patterns("models")))
    command = {"command": ["/somewhere/train.py", "tiny.yaml", "--optim.lr", "1e-3"]}
    (begun / "environment.json").write_text(json.dumps(command))
    goes_on = "at iteration 40 of 40, and `python recipes/train.py tiny.yaml --optim.lr 1e-3` continues it"
    nearest = "the runs here are runs/carded, runs/"
    for script, words, said in (
        ("report", "runs/cardet", ("runs/cardet is no run directory, nothing is there", nearest)),
        ("report", f"{run}/models/iter-000040 --status", ("that is a model; it belongs to the run runs/carded,",)),
        ("report", f"{run}/models --curve", ("without one; it belongs to the run runs/carded, which would work",)),
        ("report", "runs/begun", ("runs/begun has no finished model yet", goes_on)),
        ("publish", "tiny.yaml", ("tiny.yaml is no run directory, that is a file; the runs here are ",)),
        ("publish", "runs/begun --repo-id a/b", (goes_on,)),
        ("sample", "carded", ("carded is no model, nothing is there", nearest)),
        ("sample", "runs/cardet/models/iter-000040", ("nothing is there", nearest)),
        ("eval", f"{run}/models/iter-000050", (f"; {run}/models/iter-000040 would work\n",)),
        ("eval", "runs/begun/models/iter-000040", ("runs/begun has no finished model yet", goes_on)),
        ("eval", f"{run} --against {run} runs/cardet ./no", ("./no is no model", "runs/cardet is no model", nearest)),
    ):
        monkeypatch.setattr(sys, "argv", [script, *words.split()])
        assert runpy.run_path(str(root / "recipes" / f"{script}.py"))["main"]() == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1 + ("./no" in words) and all(each in told for each in said), (words, told)


def test_the_nights_card_has_what_was_claimed_beside_what_was_expected_and_reached(root):
    recipe = load(root / "recipes" / "fineweb_edu_40m_ladder.yaml")
    ends = [{"kind": "event", "event": "finished", "iteration": m, "val_loss": 3.3} for m in (6_000, 20_000)]
    assert budgets(recipe, ends, unique_tokens=3_680_000_000) == [
        ["`iter-006000`", "6,000", "3.15B", "-", "3.269 to 3.467", "-", "3.300"],
        ["`iter-020000`", "20,000", "10.5B", "2.42-2.55 in 15-20 hours", "3.113 to 3.311", "-", "3.300"],
    ]
    assert not claims(load(root / "recipes" / "quickstart.yaml"))


def test_a_card_names_the_keys_that_were_changed_during_the_run_and_promises_no_command(run):
    changed = Path(shutil.copytree(run, "runs/changed"))
    assert "The same again, with Overnight and the [recipe.yaml]" in readme(run)
    event = {"kind": "event", "event": "changed", "iteration": 9, "tokens": 9, "key": "optim.lr"}
    metrics = changed / "metrics.jsonl"
    metrics.write_text(json.dumps(event | {"before": 0.1, "now": "<b>"}) + "\n" + metrics.read_text())
    unlike = RESULTS | {"comparisons": [{"opponent": "other", "tasks": []}]}  # no loss, and no task that both could do
    (changed / "evaluation" / "iter-000040" / "results.json").write_text(json.dumps(unlike))
    card = readme(changed)
    assert "**Against other**: nothing was compared.\n" in card
    assert "- `optim.lr` was 0.1 and is &lt;b&gt; from iteration 9 on\n" in card and "The same again" not in card


def test_a_run_of_fewer_iterations_than_its_log_has_between_two_lines_gets_its_curve_too(run):
    short = Path(shutil.copytree(run, "runs/short"))
    metrics = short / "metrics.jsonl"
    lines = [line for line in metrics.read_text().splitlines(keepends=True) if '"kind": "train"' not in line]
    metrics.write_text("".join(lines))
    assert (report(short, 40) / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_code_of_the_card_runs(run):
    code = re.search(r"^(`{3,})python\n(.*?)\n\1$", readme(run), re.MULTILINE | re.DOTALL)
    ran = subprocess.run([sys.executable, "-c", code[2]], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip()


@pytest.mark.parametrize("name", ["u/../r", "a/b/c", "/abs", "a\nb", "-x/y", "x..y", "some one/x", "x.git", "../x"])
def test_e6_a_name_that_the_hub_would_not_take_is_refused(workplace, name):
    with pytest.raises(InputError, match=r"`hub\.repo_id`.*someone/gpt2-40m would work"):
        tiny(workplace, "--hub.repo_id", json.dumps(name))
