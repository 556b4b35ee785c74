"""Group F of docs/reliability.md, and secrets: nothing that lies in a folder is run, nothing private is written."""

import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
from runs import ROOT, final_sums, tiny

from overnight.core.console import plain
from overnight.core.sums import write_sums
from overnight.errors import InputError
from overnight.model.generate import Writer
from overnight.recipe.load import load
from overnight.training import train as train_module

CODE = [path for folder in ("src", "recipes") for path in sorted((ROOT / folder).rglob("*.py"))]


class Evil:
    """A pickle that leaves a file behind when it is read."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return (Path.touch, (self.canary,))


def test_f1_pickles_in_a_run_directory_are_never_read(in_process, undisturbed, tmp_path):
    canary = tmp_path / "canary"
    shutil.copytree("runs/tiny", "runs/pickled")
    run = Path("runs/pickled")
    shutil.rmtree(run / "models" / "iter-000040")
    for folder in (run, run / "checkpoints", *run.glob("checkpoints/**/iter-*")):
        for name in ("custom_checkpoint_0.pkl", "optimizer.bin", "random_states_0.pkl", "pytorch_model.bin"):
            (folder / name).write_bytes(pickle.dumps(Evil(canary)))
    assert train_module.train(tiny(in_process, "--name", "pickled")) == 0
    assert final_sums(in_process, "pickled") == final_sums(in_process, "tiny")
    assert not canary.exists()
    pickle.loads(pickle.dumps(Evil(canary)))  # the trap is one
    assert canary.exists()


def test_f1_no_code_of_ours_reads_or_writes_a_pickle():
    forbidden = (
        r"\b(import pickle|torch\.(load|save)\(|weights_only|register_for_checkpointing|load_state\(|save_state\()"
    )
    found = [f"{path.name}: {m[0]}" for path in CODE for m in re.finditer(forbidden, path.read_text(encoding="utf-8"))]
    assert found == []


def test_f3_code_that_comes_with_a_model_is_never_run(tmp_path, in_process, undisturbed):
    canary = tmp_path / "canary"
    shutil.copytree("runs/tiny/models/iter-000040", tmp_path / "model")
    config = (tmp_path / "model" / "config.json").read_text()
    evil = '"auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}, "model_type": "evil",'
    (tmp_path / "model" / "config.json").write_text(re.sub(r'"model_type": "gpt2",', evil, config))
    (tmp_path / "model" / "evil.py").write_text(f"open({str(canary)!r}, 'w')\n")
    write_sums(tmp_path / "model")
    with pytest.raises(InputError, match="no model can be loaded"):
        Writer.load(str(tmp_path / "model"))
    assert not canary.exists()


def test_f3_no_code_of_ours_trusts_remote_code():
    found = [path.name for path in CODE if re.search(r"trust_remote_code\s*=\s*(?!False\b)", path.read_text())]
    assert found == []


NESTED = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{key}: &{key} [{', '.join([f'*{before}'] * 9)}]\n" for before, key in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (NESTED, "an alias"),
        ("seed: &s 1\nname: *s\n", "an alias"),
        ("seed: !!python/object/apply:os.getcwd []\n", "not a readable YAML file"),
        ("seed: 1\noptim:\n  lr: 1e-3\n  lr: 2e-3\n", "line 4: `lr` stands twice"),
        ("- seed\n", "holds list"),
        ("seed: true\n", "`seed` is True"),
        ("optim: {lr: '3e-3'}\n", "`optim.lr` is '3e-3'"),
        ("? [1, 2]\n: 3\n", "`[1, 2]` is no name for a key"),
    ],
    ids=["a bomb", "an alias", "an object", "a key twice", "a list", "a truth value", "text", "a list as a key"],
)
def test_f6_what_yaml_can_do_beyond_a_recipe_is_refused(tmp_path, text, said):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(InputError) as caught:
        load(tmp_path / "recipe.yaml")
    assert said in str(caught.value)


def test_f7_escape_sequences_never_reach_the_terminal():
    assert plain("a\x1b]0;title\x07b\x1b[31mc\x1b[2Jd\x9b31me\u202ef\rg\x00h\nt\tu") == "abcd31mefgh\nt\tu"


def test_f7_a_prompt_with_escape_sequences_is_shown_without_them(in_process, capsys):
    options = ("--name", "escapes", "--schedule.max_iters", "10", "--validation.prompts", '["\\e]0;owned\\a\\e[2J"]')
    assert train_module.train(tiny(in_process, *options)) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said and "\x07" not in said


SECRET = "hf_canary0123456789abcdef"


def test_e5_a_token_of_the_environment_is_written_nowhere(in_process, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    (in_process / ".env").write_text(f"HF_TOKEN={SECRET}\n")
    try:
        assert train_module.train(tiny(in_process, "--name", "secret", "--schedule.max_iters", "10")) == 0
    finally:
        os.remove(in_process / ".env")
    said = capsys.readouterr()
    assert SECRET not in said.out + said.err
    files = [path for path in (in_process / "runs" / "secret").rglob("*") if path.is_file()]
    assert len(files) > 10
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []


@pytest.mark.parametrize("key", ["path", "files", "tokenizer"])
def test_e5_a_password_in_a_url_is_refused_and_not_repeated(tmp_path, key):
    (tmp_path / "recipe.yaml").write_text(
        f"data: {{source: files, path: x.txt, {key}: 'https://me:{SECRET}@example.com/a.txt'}}".replace(
            "path: x.txt, path:", "path:"
        )
    )
    with pytest.raises(InputError, match=f"`data.{key}`: a name and password in a URL") as caught:
        load(tmp_path / "recipe.yaml")
    assert SECRET not in str(caught.value)
