"""What model_size.py says that a step takes is what PyTorch's allocator holds for it."""

import re

import pytest
from ghost import ROOT, USUAL, run_on
from runs import slow

CASES = [
    "40M, muon, compiled",
    "40M, muon, eager",
    slow("quickstart, muon, compiled"),
    slow("40M, muon, compiled, float32"),
    slow("124M, adamw, compiled"),
]


@pytest.mark.parametrize("case", CASES)
def test_the_formula_is_within_5_percent_of_the_allocator(case: str):
    script = str(ROOT / "benchmarks" / "memory.py")
    arguments = ["--device", "cuda", "--rows", "8", "16", "--cases", case]
    done = run_on(USUAL, ROOT, script, *arguments, fresh=True, computes="")
    assert done.returncode == 0, done.stdout + done.stderr
    off = [float(percent) for percent in re.findall(r"([+-][\d.]+)%\)$", done.stdout, re.MULTILINE)]
    assert len(off) == 2 and max(map(abs, off)) < 5, done.stdout
