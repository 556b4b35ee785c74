"""The invariants hold on the card: what torch.compile makes for CUDA computes what the eager code and float64 do.

Its Triton kernels run in Triton's interpreter.
"""

import re
from pathlib import Path

import pytest
from ghost import ROOT, USUAL, run_on
from runs import slow

PYTEST = str(Path(pytest.__file__).parent / "__main__.py")

# The interpreter takes minutes for what a card has more of at once: fewer tokens, and still two chunks of the loss.
SMALL_NIGHT = """\
import sys
import pytest
sys.path.insert(0, "tests/invariants")
import test_night_shape
from overnight.planning import model_size

test_night_shape.BATCH["cuda"] = (1, 64)
model_size.LOSS_CHUNK = dict.fromkeys(model_size.LOSS_CHUNK, 40)
sys.exit(pytest.main(sys.argv[1:]))
"""


def assert_all_pass(name: str, script: str = PYTEST) -> None:
    """All tests of a file of tests/invariants pass on the card, and none is skipped."""
    options = ["-q", "-p", "no:logging", f"tests/invariants/{name}", "--device", "cuda"]
    done = run_on(USUAL, ROOT, script, *options, fresh=True, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.fullmatch(r"\d+ passed(, \d+ warnings?)? in .*", done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["test_one_function.py", "test_one_graph.py", slow("test_one_loss.py")])
def test_the_invariants_hold_on_the_card(name):
    assert_all_pass(name)


@pytest.mark.slow
def test_the_shape_of_the_night_holds_on_the_card(tmp_path):
    script = tmp_path / "small_night.py"
    script.write_text(SMALL_NIGHT)
    assert_all_pass("test_night_shape.py", str(script))
