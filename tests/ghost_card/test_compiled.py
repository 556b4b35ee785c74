"""What torch.compile makes for CUDA computes what the eager code does: its Triton kernels, in Triton's interpreter."""

from pathlib import Path

import pytest
from ghost import ROOT, USUAL, run_on


def test_the_compiled_body_and_loss_are_the_eager_ones_in_value_and_gradients():
    main = str(Path(pytest.__file__).parent / "__main__.py")
    options = ["-q", "-p", "no:logging", "tests/invariants/test_one_function.py", "--device", "cuda"]
    done = run_on(USUAL, ROOT, main, *options, fresh=True, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
