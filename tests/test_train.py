"""The trainer as a user types it: it finishes, resumes to the bit, refuses another run, however it was launched."""

import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import ROOT, checkpoint_of, final_sums, losses, records, slow, start, tiny, train
from transformers import AutoModelForCausalLM, AutoTokenizer

from overnight.core.lock import hold
from overnight.device.launch import launch
from overnight.errors import InputError
from overnight.report.model_card import report
from overnight.report.status import status_lines
from overnight.training import train as train_module


def test_a_run_shows_its_facts_learns_and_ends_with_a_finished_model(workplace, undisturbed):
    assert "tokens per iteration  1,024 = 8 rows x 64 tokens x 2 accumulated x 1 processes" in undisturbed
    assert "_scaled_dot_product_flash_attention_for_cpu (2 calls, no mask)" in undisturbed
    assert re.search(r"text SHA-256 +[0-9a-f]{64}\n", undisturbed)
    assert re.search(r"^iter 40/40 100.0% \| loss \d\.\d{4} \| val +\d\.\d{4}@20 \| lr ", undisturbed, re.MULTILINE)
    validation = [record["loss"] for record in records(workplace, "tiny", "val")]
    assert len(validation) == 3 and validation[0] > validation[1] > validation[2]
    assert validation[0] == pytest.approx(math.log(500), abs=0.1)
    assert "next: python recipes/eval.py runs/tiny/models/iter-000040" in undisturbed


def test_c10_the_finished_model_loads_with_plain_transformers_in_a_fresh_process(workplace, undisturbed):
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T;"
        "m, info = M.from_pretrained(sys.argv[1], output_loading_info=True); t = T.from_pretrained(sys.argv[1]);"
        "assert not any(info.values()), info; assert m.config.vocab_size == len(t) == 500;"
        "assert t.model_max_length == m.config.n_positions;"
        "out = m.generate(**t('The', return_tensors='pt'), max_new_tokens=8, do_sample=False);"
        "assert out.max() < 500; print(t.decode(out[0]))"
    )
    command = [sys.executable, "-c", code, str(workplace / "runs/tiny/models/iter-000040")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("The")


def test_a_padded_batch_of_prompts_is_continued_as_each_prompt_alone(workplace, undisturbed):
    folder, prompts = workplace / "runs/tiny/models/iter-000040", ["The", "The value of an expression is"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

    def continued(texts):
        ids = tokenizer(texts, return_tensors="pt", padding=True)
        return tokenizer.batch_decode(
            model.generate(**ids, max_new_tokens=8, do_sample=False), skip_special_tokens=True
        )

    assert continued(prompts) == [continued([prompt])[0] for prompt in prompts]


def test_a_finished_model_can_be_read_by_whom_the_umask_lets(workplace, undisturbed):
    modes = {path.stat().st_mode & 0o777 for path in (workplace / "runs/tiny/models/iter-000040").iterdir()}
    assert modes == {(workplace / "runs/tiny/recipe.yaml").stat().st_mode & 0o777}


def test_a_run_without_prompts_ends_well_and_suggests_a_conversation(in_process, capsys):
    recipe = tiny(in_process, "--name", "silent", "--schedule.max_iters", "10", "--validation.prompts", "[]")
    assert train_module.train(recipe) == 0
    assert " python recipes/sample.py runs/silent/models/iter-000010\n" in capsys.readouterr().out


def test_data_that_was_prepared_of_another_text_is_refused_with_each_difference(in_process):
    other = ("--name", "other-text", "--data.path", "another.jsonl", "--data.val_tokens", "999")
    with pytest.raises(InputError) as refused:
        train_module.train(tiny(in_process, *other))
    assert [problem.split(" is ")[0] for problem in refused.value.problems] == [
        "`data.path`", "`data.val_tokens`", "`data.dir`",
    ]  # fmt: skip
    assert not Path("runs/other-text").exists()


def test_all_that_is_printed_is_kept_and_the_status_is_told_from_elsewhere(in_process, capsys, root):
    short = ["--name", "kept", "--schedule.max_iters", "20", "--schedule.milestones", "[10]"]
    short += ["--validation.every", "10", "--validation.ngram_baselines", "true"]
    assert train_module.train(tiny(in_process, *short)) == 0
    said = capsys.readouterr().out
    assert Path("runs/kept/log.txt").read_text().splitlines()[:20] == said.splitlines()[:20]
    assert " | eta " in said and "budget 10 of 10 and 20 is finished" in said
    assert ", of all " in said and ", of all " not in said[said.index("iter 11/20") :]  # the last of all is its own eta
    assert (
        " in all sessions" not in said
        and said.count("It predicts ") == 2
        and said.count("report.py runs/kept   # its card and curve") == 2
    )
    first, second = (record for record in records(in_process, "kept", "event") if record["event"] == "ngram baselines")
    assert first["max_iters"] == 10 and second["max_iters"] == 20 and first["bigram"] > second["bigram"]
    command = [sys.executable, str(root / "recipes" / "report.py"), "runs/kept", "--status"]
    status = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    assert status.startswith("runs/kept: finished\n") and status.count("finished    runs/kept/models/iter-0000") == 2
    with hold(Path("runs/kept"), "wait"):
        assert f"process {os.getpid()} on " in "\n".join(status_lines(Path("runs/kept")))
    longer = ("--name", "kept", "--schedule.max_iters", "30")
    assert train_module.train(tiny(in_process, *longer)) == 0
    said_later = Path("runs/kept/log.txt").read_text()
    assert "in all sessions; the last session: from iteration 16 to 30" in said_later
    assert "It is " in said_later and " nats below a uniform guess among 500 tokens (6.21 nats)." in said_later
    newest = "\n".join(status_lines(Path("runs/kept")))
    assert "checkpoint  checkpoints/cooldown-000030/iter-000030, " in newest
    assert Path("runs/kept/log-1.txt").read_text().splitlines()[0] == said.splitlines()[0]
    assert "resumes at iteration" in Path("runs/kept/log.txt").read_text()


@pytest.mark.slow
def test_what_the_card_says_gives_the_same_model_again_from_an_empty_folder(workplace, undisturbed, tmp_path):
    card = report(workplace / "runs" / "tiny", 40)
    block = re.search(r"```sh\n(git checkout.*?)```", (card / "README.md").read_text(), re.DOTALL)[1]
    shutil.copy(card / "recipe.yaml", tmp_path)
    shutil.copy(workplace / "text.jsonl", tmp_path)  # "it takes the text itself"
    for line in block.splitlines():
        if line.startswith("python "):
            command = [
                sys.executable,
                *(str(ROOT / word) if word.endswith(".py") else word for word in line.split()[1:]),
            ]
            again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
            assert again.returncode == 0, again.stderr
    sums = "runs/tiny/models/iter-000040/SHA256SUMS"
    assert (tmp_path / sums).read_text() == (workplace / sums).read_text()


def test_a_context_shorter_than_what_an_export_is_compared_on_is_finished(workplace):
    shape = ["--model.n_positions=16", "--batch.sequence_length=16", "--schedule.max_iters=2"]
    done = train(workplace, "tiny.yaml", "--name", "short", *shape, "--schedule.warmup_iters=0")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_same_command_again_prints_the_results_and_another_run_is_refused(workplace, undisturbed):
    again = train(workplace, "tiny.yaml")
    assert again.returncode == 0
    assert "runs/tiny is finished" in again.stdout and "next: python recipes/eval.py" in again.stdout
    before = sorted(path.stat().st_mtime_ns for path in (workplace / "runs" / "tiny").rglob("*"))
    other = train(workplace, "tiny.yaml", "--optim.lr", "1")
    assert other.returncode == 2
    assert "`optim.lr` was 0.005, now 1" in other.stderr and "--name tiny-2" in other.stderr
    assert sorted(path.stat().st_mtime_ns for path in (workplace / "runs" / "tiny").rglob("*")) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, slow(signal.SIGINT), slow(signal.SIGHUP)])
def test_a3_a_signal_saves_and_the_same_command_goes_on_to_the_same_bits(
    workplace, undisturbed, in_process, capsys, number
):
    name = f"interrupted-{number.name}"
    process = start(workplace, "tiny.yaml", "--name", name)
    for line in process.stdout:
        if line.startswith("iter 17/40"):
            process.send_signal(number)
            break
    rest = process.stdout.read()
    assert process.wait() == 75
    stopped_at = int(re.search(r"interrupted after iteration (\d+) and saved", rest)[1])
    assert 17 <= stopped_at < 40
    assert train_module.train(tiny(in_process, "--name", name)) == 0
    assert f"resumes at iteration {stopped_at} from" in capsys.readouterr().out
    assert losses(workplace, name) == losses(workplace, "tiny")
    assert final_sums(workplace, name) == final_sums(workplace, "tiny")


def test_a1_killed_without_warning_it_goes_on_from_the_last_checkpoint_to_the_same_bits(
    workplace, undisturbed, in_process, capsys
):
    process = start(workplace, "tiny.yaml", "--name", "killed")
    for line in process.stdout:
        if line.startswith("iter 27/40"):
            process.kill()
            break
    assert process.wait() == -signal.SIGKILL
    assert train_module.train(tiny(in_process, "--name", "killed")) == 0
    assert "resumes at iteration 20 from" in capsys.readouterr().out
    assert losses(workplace, "killed") == losses(workplace, "tiny")
    assert final_sums(workplace, "killed") == final_sums(workplace, "tiny")


def test_a1_killed_before_the_first_checkpoint_it_starts_again_and_nothing_is_recorded_twice(in_process, undisturbed):
    process = start(in_process, "tiny.yaml", "--name", "early")
    for line in process.stdout:
        if line.startswith("iter  6/40"):
            process.kill()
            break
    process.wait()
    assert train_module.train(tiny(in_process, "--name", "early")) == 0
    assert losses(in_process, "early") == losses(in_process, "tiny")
    assert len(records(in_process, "early", "val")) == 3


def test_a1_killed_between_the_export_and_its_record_the_run_is_finished_again(in_process, undisturbed):
    shutil.copytree("runs/tiny", "runs/unrecorded")
    metrics = Path("runs/unrecorded/metrics.jsonl")
    lines = metrics.read_text().splitlines(keepends=True)
    assert '"finished"' in lines[-1]
    metrics.write_text("".join(lines[:-1]))
    assert train_module.train(tiny(in_process, "--name", "unrecorded")) == 0
    assert records(in_process, "unrecorded", "event")[-1]["event"] == "finished"
    assert final_sums(in_process, "unrecorded") == final_sums(in_process, "tiny")


@pytest.mark.slow
def test_a1_dropout_too_resumes_to_the_same_bits(in_process):
    dropout = ("--model.dropout", "0.1", "--schedule.max_iters", "20")
    assert train_module.train(tiny(in_process, "--name", "dropout", *dropout)) == 0
    again = Path("runs/dropout-again")
    shutil.copytree("runs/dropout", again)
    shutil.rmtree(again / "models" / "iter-000020")
    shutil.rmtree(checkpoint_of(in_process, "dropout-again", 20))
    assert train_module.train(tiny(in_process, "--name", "dropout-again", *dropout)) == 0
    assert losses(in_process, "dropout-again") == losses(in_process, "dropout")
    assert final_sums(in_process, "dropout-again", 20) == final_sums(in_process, "dropout", 20)


STRANGER = """\
compute_environment: LOCAL_MACHINE
distributed_type: 'NO'
mixed_precision: fp16
num_machines: 1
num_processes: 1
use_cpu: false
dynamo_config: {dynamo_backend: INDUCTOR}
"""


@pytest.mark.parametrize("config", [slow("none"), slow("ours"), slow("a stranger's")])
def test_every_accelerate_configuration_gives_the_same_run(workplace, undisturbed, tmp_path, config):
    stranger = tmp_path / "stranger.yaml"
    stranger.write_text(STRANGER)
    file = {"none": [], "ours": [str(ROOT / "accelerate_config.yaml")], "a stranger's": [str(stranger)]}[config]
    options = [part for path in file for part in ("--config_file", path)]
    name = "launched-" + re.sub("[^a-z]", "", config)
    launcher = ("-m", "accelerate.commands.launch", *options)
    result = train(workplace, "tiny.yaml", "--name", name, launcher=launcher)
    assert result.returncode == 0, result.stdout + result.stderr
    assert ("mixed_precision fp16" in result.stdout) == (config == "a stranger's")
    assert losses(workplace, name) == losses(workplace, "tiny")
    assert final_sums(workplace, name) == final_sums(workplace, "tiny")


def test_a_configuration_for_the_cpu_keeps_the_run_there_also_where_there_is_a_gpu(in_process, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **how: True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    accelerator, _ = launch(tiny(in_process))
    assert (accelerator.device.type, accelerator.mixed_precision) == ("cpu", "no")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--precision", "bf16"], "`precision` is 'bf16', but this machine has no CUDA device"),
        (["--compile", "true"], "`compile` is True, but this machine has no CUDA device"),
        (["--model.vocab_size", "600"], "`model.vocab_size` is 600"),
        (["--data.dir", "nowhere", "--data.source", "datasets", "--data.path", "a/b"], "--data.path a/b` makes it"),
        (["--logging.trackers", "[wandb]"], "make setup EXTRAS=wandb"),
        (["--model.dropout", "0.1", "--model.attention", "flash"], "'auto' would work"),
    ],
)
def test_b8_what_cannot_work_is_refused_before_anything_is_written(in_process, arguments, said):
    recipe = tiny(in_process, "--name", "refused", *arguments)
    with pytest.raises(InputError) as caught:
        train_module.train(recipe)
    assert said in str(caught.value)
    assert not (in_process / "runs" / "refused").exists()


def test_the_dry_run_of_the_night_prints_every_derived_number_and_writes_nothing(tmp_path):
    result = train(tmp_path, str(ROOT / "recipes" / "fineweb_edu_40m.yaml"), "--dry-run")
    assert result.returncode == 0, result.stderr
    assert "40,986,240 exported (41,004,288 while padded)" in result.stdout
    assert 0 < result.stdout.index("524,288 = ") < result.stdout.index("tokens_per_iter: ")  # the numbers come first
    assert "20,000 iterations = 10,485,760,000 tokens = 2.85 epochs" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_night_without_data_is_told_the_command_the_download_the_disk_and_the_time(tmp_path):
    result = train(tmp_path, str(ROOT / "recipes" / "fineweb_edu_40m.yaml"))
    assert result.returncode == 2
    for part in ("data/fineweb_edu", "python recipes/prepare.py", "12.9 GB", "7.4 GB", "min"):
        assert part in result.stderr
    assert list(tmp_path.iterdir()) == []
