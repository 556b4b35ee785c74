"""docs/after.md: what it says to do with a finished model works, as far as this machine can do it."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from command_lines import ROOT, blocks, of_documents
from runs import checkpoint_of

from overnight.errors import InputError
from overnight.model.generate import Writer

PAGE = ROOT / "docs" / "after.md"
FOLDER = '"runs/fineweb_edu_40m/models/iter-020000"'


def test_the_model_loads_and_writes_in_plain_transformers(workplace, undisturbed):
    code = blocks(PAGE, "python")[0]
    assert FOLDER in code
    code = code.replace(FOLDER, '"runs/tiny/models/iter-000040"')
    written = subprocess.run([sys.executable, "-c", code], cwd=workplace, capture_output=True, text=True, check=False)
    assert written.returncode == 0 and written.stdout.startswith("The mitochondria"), written.stderr


def test_sampling_takes_a_runs_newest_model_or_the_weights_of_a_checkpoint(in_process, undisturbed, tmp_path):
    checkpoint = checkpoint_of(in_process, "tiny", 40).relative_to(in_process)
    how = {"tokens": 6, "temperature": 0.0, "top_k": 50, "seed": 1}
    wanted = Writer.load("runs/tiny/models/iter-000040").after("The", **how)
    assert Writer.load("runs/tiny").after("The", **how) == Writer.load(str(checkpoint)).after("The", **how) == wanted
    shutil.copytree("runs/tiny", tmp_path / "begun", ignore=shutil.ignore_patterns("models"))
    with pytest.raises(InputError, match=r"begun has no finished model yet; .*sample\.py takes its checkpoints"):
        Writer.load(str(tmp_path / "begun"))


def test_the_configuration_has_what_llama_cpps_converter_reads(workplace, undisturbed):
    config = json.loads((workplace / "runs/tiny/models/iter-000040/config.json").read_text())
    assert config["n_ctx"] == config["n_positions"] == 64


@pytest.mark.parametrize("code", blocks(PAGE, "python")[1:])
def test_a_block_for_another_library_is_python(code):
    compile(code, str(PAGE), "exec")


@pytest.mark.parametrize("words", [words for words in of_documents() if words[0] == "hf"], ids=" ".join)
def test_the_hubs_client_takes_the_command_line(words, tmp_path):
    client = "import sys; from huggingface_hub.cli.hf import main; sys.argv[0] = 'hf'; main()"
    quiet = os.environ | {"HF_HUB_DISABLE_UPDATE_CHECK": "1"}
    command = [sys.executable, "-c", client, *words[1:]]
    said = subprocess.run(
        command, cwd=tmp_path, env=quiet, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert said.returncode != 2, said.stderr  # 2 is a command line that is not taken; the network is not there
    assert "No such option" not in said.stderr and "Usage:" not in said.stderr
