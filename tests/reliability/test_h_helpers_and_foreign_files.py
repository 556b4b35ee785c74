"""Group H of docs/reliability.md: nothing outlives or holds a run, and what comes from elsewhere runs no code."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from runs import ROOT, records, tiny, train
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from overnight.core.files import file_name, within
from overnight.core.processes import Helper
from overnight.core.published import redacted
from overnight.data.manifest import name_prepared, read_manifest, require_same_request
from overnight.errors import DamagedData, InputError
from overnight.evaluation.results import compared, write_results
from overnight.evaluation.statistics import Verdict
from overnight.evaluation.tasks import index_of, load_benchmarks
from overnight.model.export import verify_export
from overnight.model.generate import Writer
from overnight.report.model_card import report
from overnight.training import state
from overnight.training import train as train_module

PARENT = """import time
from overnight.core.processes import Helper
print(Helper("-c", "import time; time.sleep(600)").process.pid, flush=True)
time.sleep(600)"""


def test_h6_a_helper_ends_with_the_process_that_started_it():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    helper = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    assert psutil.wait_procs([helper], timeout=30)[1] == []


def test_h6_a_helper_that_says_much_or_stands_still_holds_nobody():
    loud = Helper("-c", "print('x' * 10**6)")
    assert loud.wait(60) and loud.code == 0
    assert len(loud.said()) == 10**6 + 1
    still = Helper("-c", "import time; time.sleep(600)")
    os.kill(still.process.pid, signal.SIGSTOP)
    assert not still.wait(0.1)
    still.stop()
    assert still.code == -signal.SIGKILL


@pytest.mark.parametrize("ends", ["its time", "a signal"])
def test_h6_an_evaluation_that_stands_still_holds_no_run(in_process, undisturbed, tmp_path, monkeypatch, ends):
    asks = "os.kill(os.getppid(), signal.SIGTERM)" if ends == "a signal" else ""
    (tmp_path / "eval.py").write_text(f"import os, signal, time\n{asks}\ntime.sleep(600)\n")
    monkeypatch.setattr(state, "RECIPES", tmp_path)
    monkeypatch.setattr(state, "QUICK_EVAL_SECONDS", 0.5 if ends == "its time" else 600.0)
    name = f"still-{ends.split()[1]}"
    recipe = tiny(in_process, "--name", name, "--schedule.max_iters", "10", "--evaluation.at_milestones", "5")
    assert train_module.train(recipe) == 0
    assert [r["items"] for r in records(in_process, name, "event") if r["event"] == "scores"] == [5]
    left = [c for c in psutil.Process().children(recursive=True) if str(tmp_path / "eval.py") in c.cmdline()]
    assert psutil.wait_procs(left, timeout=10)[1] == []


def test_h6_a_signal_does_not_wait_for_the_finished_model_to_be_read_again(undisturbed, in_process):
    model = GPT2LMHeadModel.from_pretrained("runs/tiny/models/iter-000040")
    with pytest.raises(InterruptedError, match="not read again"):
        verify_export(model, Path("runs/tiny/models/iter-000040"), torch.ones(1, 8, dtype=torch.int64), lambda: True)


LOSS = {"loss": 1.0, "perplexity": 2.7, "bits_per_byte": None, "tokens": 5}
TASK = """task: innocent
dataset_path: json
dataset_kwargs: {data_files: {test: items.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: c
"""


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ((TASK + "doc_to_target: !function evil.f\n").encode("utf-16"), "`!function evil.f` is code"),
        ((TASK + "doc_to_target:\t!function evil.f\n").encode(), "!function|cannot be read"),
        ((TASK + "doc_to_target: !!python/name:evil.f\n").encode(), "python/name:evil.f"),
        ((TASK + "doc_to_target: [\n").encode(), "cannot be read"),
        ((TASK + "doc_to_target: &a [*a]\n").encode(), "cannot be read"),
        (TASK.replace("items.jsonl", "../items.jsonl").encode(), "which leads out of its folder"),
        (TASK.replace("items.jsonl", "/etc/hostname").encode(), "which leads out of its folder"),
    ],
    ids=["UTF-16", "a tab", "an object", "no YAML", "a loop", "beside the folder", "anywhere"],
)
def test_h7_a_task_file_is_read_as_lm_eval_reads_it_and_what_is_not_read_is_refused(tmp_path, content, said):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'RAN')!r}, 'w')\ndef f(doc): return 0\n")
    (tmp_path / "items.jsonl").write_text('{"q": "a b", "c": ["x", "y"]}\n')
    (tmp_path / "a.yaml").write_bytes(content)
    with pytest.raises(InputError, match=said):
        load_benchmarks(["innocent"], index_of(["innocent"], tmp_path))
    assert not (tmp_path / "RAN").exists()


def outcome(name: str, texts=(), comparisons=(), notes=()) -> dict:
    """What an evaluation of a model of that name found."""
    facts = {"name": name, "parameters": 1, "context": 1}
    models = [{"facts": facts, "validation": None, "texts": dict(texts), "tasks": {}}]
    return {"settings": {"dtype": "float32"}, "models": models, "comparisons": comparisons, "notes": notes}


def test_h7_no_name_leaves_its_folder_and_two_names_are_two_files(tmp_path):
    names = ["../../../metrics", "..", "", "a b", "a_b", "a/b/c", "a_b_c", "x" * 300, "x" * 301, "\u00e9", "con\n"]
    made = [file_name(name) for name in names]
    assert len(set(made)) == len(names)
    assert all(Path(name).name == name and name.isascii() and len(name) < 100 for name in made)
    assert file_name("openai-community/gpt2") == "openai-community_gpt2"
    write_results(outcome("nothing"), {"../../metrics": []}, tmp_path / "a" / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    for name in ("../other", "/etc/passwd", "a/../../b", ""):
        with pytest.raises(DamagedData, match="which leads out of its folder"):
            within(tmp_path / "file", name)


@pytest.fixture
def model(undisturbed, in_process, tmp_path) -> Path:
    """A copy of the tiny run's model, without its sums."""
    folder = Path(shutil.copytree("runs/tiny/models/iter-000040", tmp_path / "model"))
    (folder / "SHA256SUMS").unlink()
    return folder


def test_h7_weights_are_never_read_from_a_pickle(model):
    Writer.load(str(model))
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    with pytest.raises(InputError, match="no model can be loaded from there"):
        Writer.load(str(model))


@pytest.mark.parametrize("shard", ["shard.bin", "../shard.safetensors"])
def test_h7_an_index_names_nothing_but_safetensors_files_beside_it(model, shard):
    weights = load_file(model / "model.safetensors")
    torch.save(weights, model / "shard.bin")
    (model / "model.safetensors").rename(model / "../shard.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(weights, shard)}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="no safetensors file beside it"):
        Writer.load(str(model))


def test_h7_a_model_whose_weights_are_not_all_there_is_not_filled_up_by_chance(model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"n_layer": 3}))
    with pytest.raises(InputError, match=r"its weights lack transformer\.h\.2\..* and 11 more"):
        Writer.load(str(model))


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation", "_experts_implementation"])
def test_h7_a_kernel_that_a_model_names_is_never_fetched(model, key):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {key: "somebody/kernel"}))
    with pytest.raises(InputError, match=f"{key}: somebody/kernel"):
        Writer.load(str(model))


def test_h7_one_function_loads_a_model():
    files = [path for folder in ("src", "recipes") for path in sorted((ROOT / folder).rglob("*.py"))]
    assert [path.name for path in files if "ForCausalLM.from_pretrained" in path.read_text()] == ["load.py"]


SIGNED = "https://bucket.example/a.jsonl?X-Amz-Signature=CANARY&x=1.jsonl"


def test_h8_the_secret_of_a_signed_url_is_in_no_file_that_others_see(in_process, undisturbed, monkeypatch, tmp_path):
    assert redacted(SIGNED) == "https://bucket.example/a.jsonl?X-Amz-Signature=***&x=1.jsonl"
    for name in ("sig", "token", "access_token", "AWSAccessKeyId", "X-Goog-Credential", "client_secret", "Key-Pair-Id"):
        assert "CANARY" not in redacted(f"see https://me:CANARY@h/f?a=1&{name}=CANARY#x")
    manifest = read_manifest(Path("data"))
    source = manifest.source.model_copy(update={"source": "files", "path": SIGNED})
    shutil.copytree("data", tmp_path / "whole")
    name_prepared(tmp_path / "whole", manifest.model_copy(update={"source": source}), tmp_path / "data")
    assert "CANARY" not in (tmp_path / "data" / "manifest.json").read_text()
    signed = ["--data.path", SIGNED, "--data.dir", str(tmp_path / "data")]
    recipe = tiny(in_process, "--name", "signed", *signed, "--schedule.max_iters", "10")
    monkeypatch.setattr(sys, "argv", ["train.py", *signed])
    assert train_module.train(recipe) == 0
    monkeypatch.setattr(sys, "argv", ["train.py"])
    report(Path("runs/signed"), 10)
    files = [path for path in Path("runs/signed").rglob("*") if path.is_file()]
    assert [path for path in files if b"CANARY" in path.read_bytes()] == []
    asked = recipe.data.model_copy(update={"path": SIGNED.replace("CANARY", "ANOTHER")})
    require_same_request(tmp_path / "data", asked, recipe.model.vocab_size)
    with pytest.raises(InputError, match=r"`data.path` is .*x=2"):
        require_same_request(tmp_path / "data", asked.model_copy(update={"path": SIGNED[:-7] + "2.jsonl"}), 500)


def test_h8_what_lies_beside_a_card_is_escaped_as_the_card_is(tmp_path):
    foreign = "<img src=x> [click](https://evil.example) $\\frac$ | `x`\n# no"
    verdict = Verdict(foreign, "acc", 3, 0.5, 0.5, 0.5, -0.1, 0.1, 1, 1, 1.0, 1.0)
    against = compared(foreign, [verdict], None) | {"warnings": [foreign]}
    write_results(outcome(foreign, {foreign: LOSS}, [against], [foreign]), {}, tmp_path)
    page = (tmp_path / "comparison.md").read_text()
    assert not re.search(r"<img|https://|\n# no|(?<!\\)[`|]`? ?x", page)


def test_h10_choices_that_are_equally_likely_count_as_chance_and_lm_evals_figure_stands_beside(workplace, tmp_path):
    nothing, eos = tmp_path / "nothing", read_manifest(workplace / "data").eos_id
    shutil.copytree(workplace / "data" / "tokenizer", nothing)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=500, n_positions=64, n_embd=8, n_layer=1, n_head=1, bos_token_id=eos, eos_token_id=eos)
    )
    for parameter in model.parameters():
        parameter.data.zero_()
    model.save_pretrained(nothing)
    (tmp_path / "tasks").mkdir()
    pair = json.dumps({"q": "", "c": ["the cat sees", "sees cat the"]})
    (tmp_path / "tasks" / "items.jsonl").write_text(f"{pair}\n" * 3)
    rest = "doc_to_target: 0\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    (tmp_path / "tasks" / "pairs.yaml").write_text(TASK + rest)
    options = ["--against", "none", "--texts", "none", "--tasks-dir", str(tmp_path / "tasks"), "--tasks", "innocent"]
    out = ["--out", str(tmp_path / "out")]
    done = train(workplace, str(nothing), *options, *out, script=str(ROOT / "recipes" / "eval.py"))
    assert done.returncode == 0, done.stderr
    [found] = json.loads((tmp_path / "out" / "results.json").read_text())["models"]
    task = found["tasks"]["innocent"]
    assert (task["metrics"]["acc"], task["lm-eval"]["acc"], task["ties"]) == (0.5, 1.0, 3)
    assert "50.0%; in 3 items the best choices tie" in (tmp_path / "out" / "comparison.md").read_text()
    assert "which takes the first: 100.0%" in done.stdout


def test_h9_a_moved_run_speaks_of_the_place_where_it_is(in_process, undisturbed, capsys):
    shutil.copytree("runs/tiny", "runs/elsewhere")
    assert train_module.train(tiny(in_process, "--name", "elsewhere")) == 0
    said = capsys.readouterr().out
    assert "recipes/eval.py runs/elsewhere/models/iter-000040" in said and "runs/tiny" not in said
    assert "runs/tiny" not in (in_process / "runs/elsewhere/metrics.jsonl").read_text()


def test_h9_what_other_settings_gave_lies_beside_the_answer(workplace, undisturbed):
    model, script = "runs/tiny/models/iter-000040", str(ROOT / "recipes" / "eval.py")
    places = []
    for options in ([], ["--limit", "2"], ["--against", "none"], ["--dtype", "bfloat16"], ["--shards", "none"]):
        done = train(workplace, model, "--dry-run", *options, script=script)
        places.append(re.search(r"into (\S+)", done.stdout)[1])
    assert places[0].endswith("runs/tiny/evaluation/iter-000040")
    assert len(set(places)) == len(places)


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("report.py", ["runs/unwritable"]),
        ("eval.py", ["runs/tiny/models/iter-000040", "--against", "none", "--tasks", "none", "--texts", "none"]),
        ("plan.py", [str(ROOT / "recipes" / "fineweb_edu_40m.yaml")]),
    ],
)
def test_h9_a_disk_that_takes_nothing_is_one_message_and_75(workplace, undisturbed, script, options):
    run = workplace / "runs" / "unwritable"
    shutil.copytree(workplace / "runs" / "tiny", run, ignore=shutil.ignore_patterns("report"))
    (run / "report").touch()  # what a folder that cannot be made gives
    place = {"eval.py": ["--out", "runs/unwritable/report/x"], "plan.py": ["--plot", "runs/unwritable/report/x.png"]}
    done = train(workplace, *options, *place.get(script, []), script=str(ROOT / "recipes" / script))
    shutil.rmtree(run)
    assert done.returncode == 75 and "Traceback" not in done.stderr
    assert "runs/unwritable/report" in done.stderr and "mend that" in done.stderr
