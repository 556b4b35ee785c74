"""recipes/eval.py on real runs: what it measures, what survives a kill, what it refuses."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks_on_disk import make_tasks, sentences, write_task
from runs import ROOT, environment, records, tiny, train, two_processes
from transformers import GPT2Config, GPT2LMHeadModel

from overnight.data.batches import TrainingBatches
from overnight.data.ngrams import ngram_losses, seen_tokens
from overnight.data.shards import open_shards
from overnight.data.tokenizer import load_tokenizer
from overnight.evaluation import models
from overnight.evaluation.loss import TokenLoss, bytes_of_tokens, windows_of
from overnight.evaluation.scoring import Request, Scorer, batches_of
from overnight.prepare.prepare import prepare
from overnight.recipe.schema import Data
from overnight.run_dir.layout import origin_of

EVAL = str(ROOT / "recipes" / "eval.py")
MODEL = "runs/tiny/models/iter-000040"
NAMES = ("on_choices", "on_pairs", "on_last_words")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    make_tasks(folder)
    return folder


@pytest.fixture(scope="module")
def asked(tasks: Path) -> list[str]:
    """What the evaluations of this file are asked for, beside the model and its opponents."""
    text = tasks / "text.txt"
    text.write_text("\n\n".join(sentences()[:40]), encoding="utf-8")
    return ["--tasks", *NAMES, "--tasks-dir", str(tasks), "--texts", str(text)]


def evaluate(folder: Path, out: Path, *arguments: str, launcher: tuple[str, ...] = ()) -> dict:
    """Run the script as a user does, with answers kept beside `out`; returns results.json."""
    done = train(
        folder, *arguments, "--out", str(out), script=EVAL, launcher=launcher, XDG_CACHE_HOME=str(out.parent / "cache")
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((out / "results.json").read_text(encoding="utf-8")) | {"said": done.stdout}


@pytest.fixture(scope="module")
def measured(workplace: Path, undisturbed: str, asked: list[str], tmp_path_factory) -> tuple[dict, Path]:
    """The finished model of `tiny.yaml` against itself untrained and the unigrams of its tokens, and the folder."""
    out = tmp_path_factory.mktemp("measured") / "out"
    return evaluate(workplace, out, MODEL, "--against", "untrained", "unigram", *asked), out


def test_the_validation_loss_is_that_of_the_trainer(workplace: Path, measured: tuple[dict, Path]):
    ours, untrained, _ = [model["validation"]["loss"] for model in measured[0]["models"]]
    during = {record["iteration"]: record["loss"] for record in records(workplace, "tiny", "val")}
    assert ours == pytest.approx(during[40], abs=1e-5)
    assert untrained == pytest.approx(during[0], abs=1e-5)


def test_the_unigram_opponent_has_the_loss_of_the_unigrams(workplace: Path, measured: tuple[dict, Path]):
    recipe, shards = tiny(workplace), open_shards(workplace / "data")
    rows = seen_tokens(TrainingBatches(shards.train, recipe.batch, recipe.seed), recipe.schedule.max_iters)
    expected = ngram_losses(rows, shards.val.read_all())["unigram"]
    assert measured[0]["models"][2]["validation"]["loss"] == pytest.approx(expected, abs=1e-3)  # over tokens seen alone
    (shorter := workplace / "runs/tiny/models/iter-000010").mkdir()
    assert [origin_of(str(each)).iterations for each in (shorter, workplace / MODEL)] == [10, 40]
    shorter.rmdir()


def test_the_page_can_be_read_on_its_own(measured: tuple[dict, Path]):
    page = (measured[1] / "comparison.md").read_text(encoding="utf-8")
    needed = ["Against untrained", "wins minus losses", "| on\\_choices (acc, 24 items) | 25.0% |", "nats per token"]
    needed += ["McNemar", "Holm", "bits per byte", "text.txt", "favours ours", "against-untrained.png"]
    assert [each for each in needed if each not in page] == []
    assert re.search(r"## Against untrained\n\n\*\*Better on the same validation text: -\d\.\d{3} \(", page)
    assert (measured[1] / "against-untrained.png").read_bytes().startswith(b"\x89PNG")
    items = [json.loads(line) for line in (measured[1] / "items" / "on_choices.jsonl").read_text().splitlines()]
    assert [item["id"] for item in items] == list(range(24))
    assert {len(each["loglikelihoods"]) for item in items for each in item["models"].values()} == {4}
    assert set(items[0]["models"]) == {MODEL, "untrained", "unigram"}


@pytest.mark.slow
def test_two_processes_measure_the_same(workplace, measured, asked, tmp_path: Path):
    two = evaluate(workplace, tmp_path / "out", MODEL, "--against", "untrained", *asked, launcher=two_processes())
    for one, other in zip(measured[0]["models"], two["models"], strict=False):
        assert one["validation"]["tokens"] == other["validation"]["tokens"]
        assert one["validation"]["loss"] == pytest.approx(other["validation"]["loss"], abs=1e-6)
        for text in one["texts"]:
            assert one["texts"][text]["loss"] == pytest.approx(other["texts"][text]["loss"], abs=1e-6)
        for task in one["tasks"]:
            assert one["tasks"][task]["metrics"] == pytest.approx(other["tasks"][task]["metrics"], rel=1e-4)
            assert one["tasks"][task]["items"] == other["tasks"][task]["items"]


@pytest.fixture
def many(undisturbed: str, tmp_path: Path) -> list[str]:
    """A command whose task has many batches."""
    make_tasks(tmp_path / "many", items=len(sentences()) // 5)
    what = ["--against", "none", "--texts", "none", "--tasks", "on_choices"]
    return [MODEL, *what, "--tasks-dir", str(tmp_path / "many")]


def test_a_kill_in_the_middle_of_a_task_costs_no_answer_and_changes_none(workplace, many, tmp_path: Path):
    whole = tmp_path / "whole" / "out"
    evaluate(workplace, whole, *many)
    expected = [line for line in journal_lines(whole.parent / "cache") if line]

    out = tmp_path / "killed" / "out"
    changes = environment(XDG_CACHE_HOME=str(out.parent / "cache"))
    process = subprocess.Popen([sys.executable, EVAL, *many, "--out", str(out)], cwd=workplace, env=changes)
    while not (kept := len(journal_lines(out.parent / "cache"))) and process.poll() is None:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and 0 < kept < len(expected)
    evaluate(workplace, out, *many)
    assert (out / "results.json").read_bytes() == (whole / "results.json").read_bytes()
    assert (out / "items" / "on_choices.jsonl").read_bytes() == (whole / "items" / "on_choices.jsonl").read_bytes()
    batches = [json.loads(line)[0] for line in journal_lines(out.parent / "cache")]
    assert len(batches) == len(set(batches)) == len(expected)


def test_g1_a_device_that_is_lost_in_an_evaluation_ends_it_with_75_and_no_answer_is_lost(workplace, many, tmp_path):
    out, cache = tmp_path / "out", str(tmp_path / "cache")
    script = str(ROOT / "tests" / "reliability" / "lost_in_eval.py")  # two batches try the model, two are timed
    lost = train(workplace, *many, "--out", str(out), script=script, XDG_CACHE_HOME=cache, CALLS="6")
    assert lost.returncode == 75
    assert "the device was lost (CUDA error: unspecified launch failure)" in lost.stderr
    assert "the same command continues from there" in lost.stderr and "Traceback" not in lost.stderr
    kept = journal_lines(tmp_path / "cache")
    assert len(kept) == 2
    evaluate(workplace, out, *many)
    whole = journal_lines(tmp_path / "cache")
    assert whole[:2] == kept and len(whole) > 2


@pytest.mark.parametrize("at_once", [3, 1])
def test_g2_what_does_not_fit_the_memory_at_once_is_scored_in_halves(workplace, undisturbed, monkeypatch, at_once):
    scorer = models.load_model(str(workplace / MODEL), torch.device("cpu"), torch.float32).scorer
    ids = torch.randint(0, 500, (7, 20))
    requests = [Request(tuple(row[:12].tolist()), tuple(row[12:].tolist())) for row in ids]
    [trees], _ = batches_of(requests, 64, 512)
    expected, whole = scorer.score(trees), Scorer._score

    def at_most(rows: int):
        def act(self, trees):
            if len(trees) > rows:
                raise torch.cuda.OutOfMemoryError("boom")
            return whole(self, trees)

        monkeypatch.setattr(Scorer, "_score", act)

    at_most(at_once)
    found = [answer.loglikelihood for answer in scorer.score(trees)]
    assert found == pytest.approx([answer.loglikelihood for answer in expected], abs=1e-4)
    at_most(0)
    with pytest.raises(torch.cuda.OutOfMemoryError, match="a single row of"):
        scorer.score(trees)


def test_g1_a_device_that_is_lost_is_not_taken_for_a_model_that_reads_no_trees(workplace, undisturbed, monkeypatch):
    def lost(self, trees):
        raise torch.AcceleratorError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(Scorer, "score", lost)
    with pytest.raises(torch.AcceleratorError):
        models.load_model(str(workplace / MODEL), torch.device("cpu"), torch.float32)


def journal_lines(cache: Path) -> list[bytes]:
    return [line for path in cache.rglob("rank*.jsonl") for line in path.read_bytes().split(b"\n")[:-1] if line]


@pytest.mark.slow
def test_an_opponent_with_a_shorter_context_is_cut_and_that_is_said(workplace, undisturbed, asked, tmp_path: Path):
    short = GPT2LMHeadModel(GPT2Config(vocab_size=500, n_positions=40, n_embd=16, n_layer=1, n_head=1))
    short.save_pretrained(tmp_path / "short")
    load_tokenizer(str(workplace / "data" / "tokenizer")).save_pretrained(tmp_path / "short")
    found = evaluate(workplace, tmp_path / "out", MODEL, "--against", str(tmp_path / "short"), *asked)
    assert found["models"][1]["tasks"]["on_choices"]["cut to the context"] > 0
    assert "requests cut to the context" in found["said"]

    shorter = GPT2Config(vocab_size=500, n_positions=8, n_embd=16, n_layer=1, n_head=1)
    GPT2LMHeadModel(shorter).save_pretrained(tmp_path / "short")
    command = [MODEL, "--against", str(tmp_path / "short"), *asked, "--shards", "none"]
    refused = train(
        workplace, *command, "--out", str(tmp_path / "other"), script=EVAL, XDG_CACHE_HOME=str(tmp_path / "cache")
    )
    assert refused.returncode == 2 and not (tmp_path / "other").exists()
    assert "on_choices: " in refused.stderr and "in a context of 8" in refused.stderr


@pytest.mark.slow
def test_a_night_ends_with_the_comparison_and_does_not_repeat_it(
    workplace: Path, undisturbed: str, tasks, tmp_path: Path
):
    overrides = ["--evaluation.against", "[untrained]", "--evaluation.tasks", "[on_pairs]", "--evaluation.texts", "[]"]
    overrides += ["--evaluation.tasks_dir", str(tasks), "--evaluation.at_milestones", "8", "--name", "compared"]
    command = [sys.executable, "-m", "overnight.pipeline", "tiny.yaml", *overrides]
    how = {"cwd": workplace, "env": environment(XDG_CACHE_HOME=str(tmp_path / "cache"), PATH=os.environ["PATH"])}
    first = subprocess.run(command, capture_output=True, text=True, timeout=300, **how)
    page = workplace / "runs" / "compared" / "evaluation" / "iter-000040" / "comparison.md"
    assert first.returncode == 0 and page.exists(), first.stdout + first.stderr
    [scores] = [record for record in records(workplace, "compared", "event") if record["event"] == "scores"]
    assert scores["items"] == 8 and 0 <= scores["on_pairs"] <= 1
    assert "first 8 items: on_pairs" in first.stdout and "against untrained" in first.stdout

    again = subprocess.run(command, capture_output=True, text=True, timeout=300, **how)
    assert again.returncode == 0 and "eval     skipped" in again.stdout


@pytest.fixture
def evaluate_here(workplace: Path, undisturbed: str, tmp_path: Path, monkeypatch) -> Callable[..., int]:
    """recipes/eval.py in this process, without texts; returns its exit code."""
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    main = runpy.run_path(EVAL)["main"]

    def act(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", [EVAL, *arguments, "--texts", "none", "--out", str(tmp_path / "out")])
        return main()

    return act


@pytest.fixture
def said(evaluate_here, tmp_path: Path, capsys) -> Callable[..., str]:
    """What the script says when it ends with code 2, having written nothing."""

    def refusal(*arguments: str) -> str:
        capsys.readouterr()
        assert evaluate_here(*arguments) == 2 and not (tmp_path / "out").exists()
        return capsys.readouterr().err

    return refusal


def test_what_is_no_model_is_refused(said, workplace: Path, tmp_path: Path):
    nothing = ("--tasks", "none", "--shards", "none")
    assert "that is a folder without one" in said(str(workplace / "data"), *nothing)
    assert "that is a folder without one" in said(MODEL, "--against", str(tmp_path), *nothing)

    copy = shutil.copytree(workplace / MODEL, tmp_path / "copy")
    (copy / "SHA256SUMS").unlink()  # a model from elsewhere
    tokenizer = json.loads((copy / "tokenizer_config.json").read_text())
    for special in ("eos_token", "bos_token", "unk_token"):
        tokenizer[special] = None
    tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    (copy / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    assert "no end-of-text token" in said(str(copy), *nothing)


def test_data_that_do_not_belong_to_the_model_are_refused(said, workplace: Path, gpt2_folder: Path, tmp_path: Path):
    text = tmp_path / "other.jsonl"
    text.write_text("".join(json.dumps({"text": each}) + "\n" for each in sentences()), encoding="utf-8")
    other = Data(source="files", path=str(text), tokenizer=str(workplace / "data" / "tokenizer"),
                 dir=str(tmp_path / "other"), val_tokens=500, reserved_fraction=0.2)  # fmt: skip
    prepare(other, 500, report=lambda line: None)
    words = said(MODEL, "--tasks", "none", "--shards", str(tmp_path / "other"))
    assert "holds other data" in words and "runs/tiny" in words

    GPT2LMHeadModel(GPT2Config(n_positions=64, n_embd=16, n_layer=1, n_head=1)).save_pretrained(tmp_path / "big")
    load_tokenizer(str(gpt2_folder)).save_pretrained(tmp_path / "big")
    words = said(MODEL, "--tasks", "none", "--against", str(tmp_path / "big"))
    assert "its vocabulary is not that of" in words and "--shards none" in words


@pytest.mark.slow
def test_tasks_that_are_not_there_or_not_scored_by_log_likelihoods_are_refused(said, tmp_path: Path):
    folder, alone = tmp_path / "tasks", (MODEL, "--against", "none", "--tasks")
    make_tasks(folder)
    assert "did you mean on_choices" in said(*alone, "on_choice", "--tasks-dir", str(folder))
    assert "no such folder" in said(*alone, "on_choices", "--tasks-dir", str(tmp_path / "nowhere"))
    write_task(folder, "written", [{"a": "b"}], output_type="generate_until", doc_to_text="a", doc_to_target="a")
    assert "of the type generate_until" in said(*alone, "written", "--tasks-dir", str(folder))
    assert "no test split of sciq" in said(*alone, "sciq", "--data-dir", str(tmp_path))
    assert "cannot be read from allenai/sciq on the Hub" in said(*alone, "sciq")
    assert "`--limit` is 0" in said(*alone, "sciq", "--limit", "0")


def test_f4_a_task_file_runs_no_code_unless_it_is_trusted(evaluate_here, said, tmp_path: Path):
    folder, ran = tmp_path / "tasks", tmp_path / "ran"
    items = [{"context": "The", "choices": ["end", "start"], "answer": 0}] * 4
    how = {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "answer"}
    asked = [MODEL, "--shards", "none", "--against", "none", "--tasks", "sly", "--tasks-dir", str(folder)]

    write_task(folder, "sly", items, **how, doc_to_text="{{context}}")
    (folder / "code.py").write_text(f"open({str(ran)!r}, 'w').close()\ndef text(doc): return doc['context']\n")
    path = folder / "sly.yaml"
    plain = path.read_text()
    path.write_text(plain.replace("doc_to_text: '{{context}}'", "doc_to_text: !function code.text"))
    words = said(*asked, "--against", "./nowhere")
    assert "./nowhere is no model, nothing is there" in words  # both problems at once
    assert "`!function code.text` is code" in words and "--trust-tasks" in words and not ran.exists()
    for line in (
        "class: !function code.Task",
        "metric_list: [{metric: accuracy}]",
        "metric_list: [{metric: acc, hf_evaluate: true}]",
    ):
        path.write_text(plain + line + "\n")
        assert "code" in said(*asked)
    (folder / "part").write_text("doc_to_text: !function code.text\n")
    path.write_text(plain + "include: part\n")
    assert "is code" in said(*asked) and not ran.exists()
    (folder / "part").unlink()

    reach = "{{ context.__class__.__mro__[1].__subclasses__() }}"
    path.write_text(plain.replace("'{{context}}'", f"'{reach}'"))
    assert "unsafe" in said(*asked)

    path.write_text(plain.replace("doc_to_text: '{{context}}'", "doc_to_text: !function code.text"))
    assert evaluate_here(*asked, "--trust-tasks") == 0 and ran.exists()


def test_every_token_of_a_text_is_scored_once_with_half_a_context_before_it():
    for length in (2, 9, 10, 11, 12, 25, 100, 101):
        tokens = list(range(length))
        scored = []
        for window, counted in windows_of(tokens, 10, 5):
            assert len(window) <= 11 and window == tokens[window[0] : window[-1] + 1]
            assert counted == 0 or counted >= 5
            scored += window[1:][counted:]
        assert scored == tokens[1:]
    assert list(windows_of([1], 10, 5)) == []


def test_bits_per_byte_count_the_bytes_of_the_text(gpt2_folder: Path):
    tokenizer = load_tokenizer(str(gpt2_folder))
    text = "Crème brûlée costs 5 € — 好"
    ids = [*tokenizer(text).input_ids, tokenizer.eos_token_id]
    size = int(bytes_of_tokens(tokenizer)[ids].sum())
    assert size == len(text.encode())
    metric = TokenLoss(keep_in_memory=True)
    metric.add_batch(nats=np.array([3.0, 1.0]), tokens=np.array([2, 2]), bytes=np.array([size, 0]))
    found = metric.compute()
    assert found is not None
    assert found["loss"] == 1.0 and found["perplexity"] == pytest.approx(np.e)
    assert found["bits_per_byte"] == pytest.approx(4 / np.log(2) / size)
