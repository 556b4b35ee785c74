"""The benchmark of a training step compares what a device holds, and no clock of it runs ahead of the device."""

import argparse
import importlib
import subprocess
import sys

import pytest
import torch
from runs import ROOT

SIDE = """
import sys
if {rows} > {fits}: sys.exit({code})
while sys.stdin.readline():
    print('{{"seconds": 0.5, "cpu_seconds": 0.5, "peak_mib": 100}}', flush=True)
"""


@pytest.fixture
def benchmark(monkeypatch):
    """The script and its sides as modules."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("training_step")


@pytest.fixture
def sides(benchmark, monkeypatch):
    """Makes processes of the sides that end where they get more rows than fit; counts them."""
    started = []

    def make(fits: dict[str, int], code: int = benchmark.OUT_OF_MEMORY):
        def child(args, name, shape):
            started.append((name, shape))
            words = SIDE.format(rows=shape.partition("x")[0], fits=fits.get(name, 64), code=code)
            command = [sys.executable, "-c", words]
            return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

        monkeypatch.setattr(benchmark, "child", child)
        return started

    return make


def asked(device: str) -> argparse.Namespace:
    return argparse.Namespace(device=device, pairs=3, nanogpt=None)


def test_a_side_that_a_card_does_not_hold_goes_on_with_half_of_the_rows(benchmark, sides):
    started = sides({"trainer": 8})
    found = benchmark.rounds(asked("cuda"), "32x1024")
    assert {name: [each["tokens"] for each in figures] for name, figures in found.items()} == {
        "ours": [32 * 1024] * 3,
        "trainer": [8 * 1024] * 3,
    }
    assert started == [("ours", "32x1024"), ("trainer", "32x1024"), ("trainer", "16x1024"), ("trainer", "8x1024")]


def test_on_a_cpu_every_round_is_a_fresh_process(benchmark, sides):
    started = sides({})
    benchmark.rounds(asked("cpu"), "2x64")
    assert started == [(name, "2x64") for name in ("ours", "trainer", "trainer", "ours", "ours", "trainer")]


def test_a_side_that_fails_is_left_out_of_the_comparison(benchmark, sides):
    sides({"trainer": 0}, code=1)
    assert list(benchmark.rounds(asked("cuda"), "32x1024")) == ["ours"]


def test_the_clock_is_read_when_the_device_has_done_its_work(benchmark, monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append("waited"))
    now = importlib.import_module("training_sides").now
    now(True)
    assert waited == ["waited"]
    now(False)
    assert waited == ["waited"]
