"""The hours of a plan stand on parts that public runs confirm, on any known card, and say so."""

import csv
import json
import subprocess
import sys

import pytest
import torch
from runs import ROOT

from overnight.planning.gpus import facts, gpu_named, known_gpus, match_gpu
from overnight.planning.roofline import (
    Work,
    moved,
    power_bound,
    public_runs,
    seconds,
    speed_of,
    training,
    validation,
    validation_share,
    work_of,
)
from overnight.recipe.load import load

NIGHT = load(ROOT / "recipes" / "fineweb_edu_40m.yaml", [])
CARD = gpu_named("rtx-4070")

CUDA_NAMES = [
    ("NVIDIA GeForce RTX 4070", 11.99, "rtx-4070"),
    ("NVIDIA GeForce RTX 4070 Laptop GPU", 8.0, "rtx-4070-laptop"),
    ("NVIDIA GeForce RTX 4070 SUPER", 11.99, "rtx-4070-super"),
    ("NVIDIA GeForce RTX 4070 Ti", 11.99, "rtx-4070-ti"),
    ("NVIDIA GeForce RTX 4070 Ti SUPER", 15.99, "rtx-4070-ti-super"),
    ("NVIDIA GeForce RTX 4060 Ti", 7.99, "rtx-4060-ti-8gb"),
    ("NVIDIA GeForce RTX 4060 Ti", 15.99, "rtx-4060-ti-16gb"),
    ("NVIDIA GeForce RTX 3060", 11.99, "rtx-3060-12gb"),
    ("NVIDIA H100 PCIe", 79.2, "h100-pcie"),
    ("NVIDIA H100 80GB HBM3", 79.6, "h100-sxm"),
    ("NVIDIA A100-SXM4-80GB", 79.3, "a100-80gb"),
    ("NVIDIA A100-SXM4-40GB", 39.4, "a100-40gb"),
    ("NVIDIA H200", 139.8, "h200"),
    ("NVIDIA B200", 178.4, "b200"),
    ("NVIDIA RTX 6000 Ada Generation", 47.4, "rtx-6000-ada"),
    ("NVIDIA L40S", 44.4, "l40s"),
    ("NVIDIA A10", 22.1, "a10"),
    ("Tesla T4", 14.6, "t4"),
    ("NVIDIA GeForce RTX 4070", 8.0, None),
    ("NVIDIA GeForce RTX 3070 Laptop GPU", 8.0, None),
    ("NVIDIA GeForce RTX 4070 D", 11.99, None),
]


@pytest.mark.parametrize(("cuda_name", "gib", "known"), CUDA_NAMES)
def test_a_card_is_known_by_its_exact_name_and_memory(cuda_name, gib, known):
    found = match_gpu(cuda_name, gib)
    assert (found and found.name) == known


def test_every_row_of_the_table_is_one_card_and_says_where_its_figures_are_from():
    for row in facts("gpus.csv"):
        gpu = known_gpus()[row["name"]]
        assert match_gpu(f"NVIDIA {gpu.cuda_name}", 0.95 * gpu.vram_gib) == gpu
        assert row["provenance"] and int(row["multiprocessors"]) > 0
        if gpu.cuda_name.startswith("GeForce"):  # their matrix units do twice what the others do
            assert gpu.tflops == pytest.approx(2 * gpu.fp32_tflops, rel=0.01)


def test_public_runs_are_met():
    """Eager code at 2 and 4 rows lies between the estimate and the same with its body in the cache."""
    runs = public_runs()
    assert len(runs) >= 12 and {"rtx-4070", "rtx-4090", "a100-80gb", "h100-sxm"} <= {run.gpu.name for run in runs}
    for run in runs:
        parts = training(run.work, run.gpu)
        if run.compiled == "no":
            parts = parts._replace(memory=parts.memory - seconds(moved(run.work, "body"), run.gpu))
            assert run.off < 0
        assert abs(parts.tokens_per_second / run.tokens_per_second - 1) < 0.12, (run.gpu.name, run.code, run.off)


def test_nanogpt_on_the_usual_card_is_within_a_tenth_of_what_it_was_measured_to_reach():
    [run] = [run for run in public_runs() if run.gpu == CARD and run.compiled == "yes"]
    assert 0.9 * 114_000 < training(run.work, run.gpu).tokens_per_second < 1.1 * 125_000


def test_a_second_has_more_tokens_where_the_work_is_less_or_the_card_is_faster():
    work = work_of(NIGHT, 32)
    rate = training(work, CARD).tokens_per_second
    assert training(work, gpu_named("rtx-4090")).tokens_per_second > 2 * rate
    assert training(work._replace(rows=8), CARD).tokens_per_second < rate  # the weights are cast for fewer tokens
    wide = work.model.model_copy(update={"n_embd": 768})
    assert training(work._replace(model=wide), CARD).tokens_per_second < rate / 2
    small_heads = work.model.model_copy(update={"n_head": 12})
    assert training(work._replace(model=small_heads), CARD).attention > training(work, CARD).attention
    assert 0.3 < validation_share(NIGHT, CARD, 32) < 0.5
    assert validation(work, CARD).products == pytest.approx(training(work, CARD).products / 3)


def test_every_known_card_has_a_speed_that_says_it_is_an_estimate_and_how_good():
    for gpu in known_gpus().values():
        speed = speed_of(NIGHT, gpu, 32)
        if not gpu.bf16:
            assert speed is None
            continue
        alike = [abs(run.off) for run in public_runs() if run.compiled != "no"
                 and power_bound(run.gpu) == power_bound(gpu)]  # fmt: skip
        assert speed.source.startswith(f"an estimate from the parts, at most {max(alike):.0%} off {len(alike)} public")


@pytest.mark.parametrize("name", ["4070", "RTX 4070", "NVIDIA GeForce RTX 4070", "rtx_4070"])
def test_a_card_may_be_called_as_people_call_it(name):
    assert gpu_named(name) == CARD


def test_what_this_code_was_measured_to_reach_on_the_card_wins():
    work = work_of(NIGHT, 16)
    measured = public_runs()[0]._replace(gpu=CARD, code="overnight", work=work, tokens_per_second=1e5, source="here")
    runs = [*public_runs(), measured]
    assert speed_of(NIGHT, CARD, 32, runs).tokens_per_second == 1e5
    assert speed_of(NIGHT, CARD, 32, runs).source == "measured: here"
    assert speed_of(NIGHT, gpu_named("rtx-4090"), 32, runs).source.startswith("an estimate")
    longer = load(ROOT / "recipes" / "fineweb_edu_40m.yaml", ["--model.n_layer", "24"])
    assert speed_of(longer, CARD, 32, runs).source.startswith("an estimate")


def test_the_facts_have_every_part_that_the_roofline_asks_for():
    for run in public_runs():
        assert training(run.work, run.gpu).memory > 0
    for dropout in (0.0, 0.1):
        model = NIGHT.model.model_copy(update={"dropout": dropout})
        work = Work("overnight", model, 1024, 32, 524_288)
        assert training(work, CARD).memory > validation(work, CARD).memory > 0


def test_the_benchmark_prints_the_parts_beside_every_public_run_as_the_page_has_them():
    command = [sys.executable, str(ROOT / "benchmarks" / "roofline.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len([line for line in lines[3:] if not line.startswith(" ")]) == len(public_runs())
    assert done.stdout in (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    [night] = [line for line in lines if line.startswith("rtx-4070: nanoGPT 12 x 384")]
    products, attention, memory, estimate, public = (float(word.replace(",", "")) for word in night.split()[5:10])
    assert public == 119_500 and 1e6 / estimate == pytest.approx(products + attention + memory, rel=0.01)


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def test_the_traffic_of_operators_is_what_they_read_and_write(benchmarks):
    from traffic_count import Traffic

    a, b, table = torch.zeros(100, 10), torch.zeros(100, 10), torch.zeros(1000, 10)
    at = torch.zeros(100, dtype=torch.int64)
    cases = [
        (lambda: a + b, "eager", 3 * 4000),
        (lambda: a.add_(b), "eager", 3 * 4000),
        (lambda: a.copy_(b), "eager", 2 * 4000),
        (lambda: a.zero_(), "eager", 4000),
        (lambda: a.t()[1:], "eager", 0),
        (lambda: torch.empty_like(a), "eager", 0),
        (lambda: torch.nn.functional.embedding(at, table), "eager", 800 + 4000),
        (lambda: a.to(torch.bfloat16), "eager", 4000 + 2000),
        (lambda: a @ b.t(), "GEMM", 2 * 4000 + 40_000),
    ]
    for act, kind, expected in cases:
        with Traffic() as traffic:
            act()
        assert traffic.bytes[kind] == sum(traffic.bytes.values()) == expected


def test_a_new_count_replaces_the_rows_of_its_code_and_no_others(benchmarks, tmp_path, monkeypatch):
    import traffic

    before = traffic.FACTS.read_text()
    file = tmp_path / "traffic.csv"
    file.write_text(before)
    monkeypatch.setattr(traffic, "FACTS", file)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    traffic.write({("overnight", "0"): [("body", "layer x width", 1.25, 2.0)]})
    comments = [line for line in before.splitlines() if line.startswith("#")]
    assert file.read_text().splitlines()[: len(comments)] == comments
    rows = list(csv.DictReader(line for line in file.read_text().splitlines() if not line.startswith("#")))
    assert [row["per_unit"] for row in rows if (row["code"], row["dropout"]) == ("overnight", "0")] == ["1.2"]
    others = [row for row in facts("traffic.csv") if (row["code"], row["dropout"]) != ("overnight", "0")]
    assert [row for row in rows if (row["code"], row["dropout"]) != ("overnight", "0")] == others


def test_a_plan_says_that_its_hours_are_an_estimate(tmp_path):
    command = [sys.executable, str(ROOT / "recipes" / "plan.py"), str(ROOT / "recipes" / "fineweb_edu_40m.yaml")]
    for card, said in (("rtx-4090", "an estimate from the parts"), ("t4", "not known: the estimate is for bf16")):
        done = subprocess.run([*command, "--gpu", card], capture_output=True, text=True, check=True)
        assert said in next(line for line in done.stdout.splitlines() if line.startswith("hours "))
    done = subprocess.run([*command, "--gpu", "t4", "--json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["rows"][0]["hours"] is None
