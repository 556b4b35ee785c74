"""A probe measures real iterations without data or a run, and leaves nothing behind."""

import json

import pytest
from runs import ROOT, train

PLAN = str(ROOT / "recipes" / "plan.py")


def content(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_probe_trains_random_tokens_and_says_what_the_device_reached(workplace, tmp_path):
    before = content(workplace)
    arguments = (str(workplace / "tiny.yaml"), "--probe", "--probe-file", str(tmp_path / "probe.json"))
    result = train(tmp_path, *arguments, "--data.dir", "not-there", script=PLAN)
    assert result.returncode == 0, result.stderr
    assert "20 iterations of 512 random tokens" in result.stdout  # on a CPU one micro-batch, 8 rows of 64
    assert "_scaled_dot_product_flash_attention_for_cpu (2 calls, no mask)" in result.stdout
    found = json.loads((tmp_path / "probe.json").read_text())
    assert (found["micro_batch"], found["tokens_per_iter"], found["iterations"]) == (8, 512, 20)
    assert found["tokens_per_second"] > 0 and found["peak_gib"] > 0.1
    assert found["hours"] * 3600 * found["tokens_per_second"] == pytest.approx(40 * 1024)  # of the recipe, in full
    assert found["mfu"] is None and found["watts"] is None  # a CPU has neither: nothing is made up
    assert content(tmp_path) == ["probe.json"] and content(workplace) == before
    planned = train(tmp_path, *arguments[:1], "--probe-file", arguments[-1], "--json", script=PLAN)
    assert planned.returncode == 0, planned.stderr
    assert json.loads(planned.stdout)["speed"]["tokens_per_second"] == found["tokens_per_second"]


def test_a_probe_refuses_what_the_trainer_refuses(workplace, tmp_path):
    result = train(tmp_path, str(workplace / "tiny.yaml"), "--probe", "--precision", "bf16", script=PLAN)
    assert result.returncode == 2
    assert "`precision` is 'bf16', but this machine has no CUDA device" in result.stderr
    assert content(tmp_path) == []
