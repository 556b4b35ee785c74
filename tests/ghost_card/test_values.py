"""Through the CUDA paths a run has the values that it has on the CPU, and the bits where these are promised."""

import json
from pathlib import Path

import pytest
from ghost import ROOT, USUAL, run_on, train_on, train_on_cpu
from runs import final_sums, finished, losses, records, train

# float32 and AdamW compute the same on both sides; Muon's Newton-Schulz is bf16 on CUDA.
SAME = ("tiny.yaml", "--precision", "fp32", "--compile", "false", "--optim.name", "adamw", "--threads", "1")


@pytest.fixture(scope="module")
def on_card(workplace: Path) -> str:
    """One whole run on the card."""
    done = train_on(workplace, *SAME, "--name", "card")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def on_cpu(workplace: Path) -> None:
    """The same on the CPU."""
    done = train_on_cpu(workplace, *SAME, "--name", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr


def validations(folder: Path, name: str) -> list[float]:
    return [record["loss"] for record in records(folder, name, "val")]


def test_a_run_on_the_card_ends_with_the_bits_of_the_cpu(workplace, on_card, on_cpu):
    assert "NVIDIA GeForce RTX 4070" in on_card
    assert final_sums(workplace, "card") == final_sums(workplace, "cpu")
    assert losses(workplace, "card") == pytest.approx(losses(workplace, "cpu"), rel=1e-6)  # summed in other chunks
    assert validations(workplace, "card") == pytest.approx(validations(workplace, "cpu"), rel=1e-6)


def test_samples_export_and_evaluation_are_those_of_the_cpu(workplace, on_card, on_cpu):
    models = [workplace / "runs" / name / "models" / "iter-000040" for name in ("card", "cpu")]
    assert models[0].joinpath("model.safetensors").read_bytes() == models[1].joinpath("model.safetensors").read_bytes()
    arguments = [str(models[0]), "--against", "unigram", "--tasks", "none", "--texts", "none", "--out"]
    kept = {"XDG_CACHE_HOME": str(workplace / "answers")}
    done = run_on(USUAL, workplace, "eval.py", *arguments, "on-card", **kept)
    assert done.returncode == 0, done.stdout + done.stderr
    train(workplace, *arguments, "on-cpu", script=str(ROOT / "recipes" / "eval.py"), CUDA_VISIBLE_DEVICES="", **kept)
    results = [json.loads((workplace / out / "results.json").read_text()) for out in ("on-card", "on-cpu")]
    found, expected = ([model["validation"]["loss"] for model in each["models"]] for each in results)
    assert found == pytest.approx(expected, rel=1e-6)
    said = run_on(USUAL, workplace, "sample.py", str(models[0]), "--prompt", "The")
    assert said.returncode == 0 and said.stdout.strip()


def test_killed_and_resumed_on_the_card_to_the_same_bits(workplace, on_card):
    killed = train_on(workplace, *SAME, "--name", "killed", fault="killed@iteration:24")
    assert killed.returncode == -9
    resumed = train_on(workplace, *SAME, "--name", "killed")
    assert resumed.returncode == 0 and "resumes at iteration 20" in resumed.stdout
    assert final_sums(workplace, "killed") == final_sums(workplace, "card")
    assert losses(workplace, "killed") == losses(workplace, "card")


def test_a_budget_in_line_and_one_that_is_finished_later_are_their_own_runs(workplace, on_card):
    done = train_on(workplace, *SAME, "--name", "line", "--schedule.milestones", "[20]", "--schedule.branches", "[30]")
    assert done.returncode == 0, done.stdout + done.stderr
    later = train_on(workplace, *SAME, "--name", "line", "--schedule.branches", "[30]", "--cooldown", "30")
    assert later.returncode == 0, later.stdout + later.stderr
    assert finished(workplace, "line") == [20, 40, 30]
    assert final_sums(workplace, "line") == final_sums(workplace, "card")


def test_another_micro_batch_changes_speed_and_not_the_result(workplace, on_card):
    done = train_on(workplace, *SAME, "--name", "one-size-down", fault="full@iteration:3")
    assert done.returncode == 0 and "iteration 3: out of memory with 8 rows at once" in done.stdout
    whole, halved = losses(workplace, "card"), losses(workplace, "one-size-down")
    assert halved[2] == whole[2] and halved[3] == pytest.approx(whole[3], rel=1e-6)
    assert halved == pytest.approx(whole, rel=1e-3)  # AdamW enlarges what summing in another order leaves


def test_a_run_begun_on_the_card_goes_on_on_the_cpu(workplace, on_card, on_cpu):
    train_on(workplace, *SAME, "--name", "moved", fault="killed@iteration:24")
    moved = train_on_cpu(workplace, *SAME, "--name", "moved")
    assert moved.returncode == 0 and "resumes at iteration 20" in moved.stdout
    assert final_sums(workplace, "moved") == final_sums(workplace, "cpu")


def test_under_bf16_with_muon_the_card_takes_the_fused_kernel_and_learns_as_the_cpu_does(workplace, on_cpu):
    done = train_on(workplace, "tiny.yaml", "--compile", "false", "--threads", "1", "--name", "bf16")
    assert done.returncode == 0, done.stdout + done.stderr
    facts = json.loads((workplace / "runs/bf16/environment.json").read_text())
    assert facts["precision"].startswith("bf16") and "flash_attention (" in facts["attention"]
    train_on_cpu(workplace, "tiny.yaml", "--threads", "1", "--name", "muon")
    assert validations(workplace, "bf16") == pytest.approx(validations(workplace, "muon"), abs=0.02)


def test_what_the_host_computes_not_is_an_error_and_never_a_value(tmp_path):
    script = tmp_path / "lstm.py"
    script.write_text(
        "import torch\ncell = torch.nn.LSTMCell(4, 4).cuda()\nprint(cell(torch.ones(1, 4).cuda())[0].sum())\n"
    )
    done = run_on(USUAL, tmp_path, str(script))
    assert done.returncode == 1
    assert "AcceleratorError" in done.stderr and "the host computes no such kernel" in done.stderr
