"""recipes/own_text.yaml trains on a folder of Spanish, with a tokenizer of its own, and its model is evaluated."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from runs import environment, tiny, train_in_a_fresh_process

from overnight.errors import InputError
from overnight.training.train import train

SMALL = {
    "model.n_layer": 2, "model.n_head": 2, "model.n_embd": 64, "model.n_positions": 128, "model.vocab_size": 384,
    "batch.tokens_per_iter": 2048, "batch.sequence_length": 128, "data.val_tokens": 1500, "data.reserved_fraction": 0.1,
    "schedule.max_iters": 60, "schedule.warmup_iters": 5, "schedule.branches": "[]", "optim.lr": "8e-3",
    "validation.every": 30, "validation.sample_tokens": 8, "checkpoint.every": 60, "logging.every": 10,
}  # fmt: skip
WHO = ["la niña", "el pescador", "mi abuela", "un médico", "la señora Muñoz", "el año pasado nadie", "aquel pingüino"]
DOES = ["compró pan", "vio la montaña", "cantó una canción", "leyó el periódico", "encontró una llave", "soñó con ti"]
WHERE = ["en la ciudad de Cádiz", "junto al río", "bajo la lluvia de otoño", "después de la comida", "en el jardín"]


def spanish(folder: Path) -> Path:
    """Short stories from all of the sentences, as .txt files: paragraphs with blank lines between."""
    sentences = [" ".join(words) + "." for words in itertools.product(WHO, DOES, WHERE)]
    folder.mkdir()
    for file in range(12):
        order = sorted(range(len(sentences)), key=lambda at: at * (2 * file + 31) % 211)
        stories = [" ".join(f"Había una vez: {sentences[at]}" for at in order[n : n + 5]) for n in range(0, 210, 5)]
        (folder / f"{file}.txt").write_text("\n\n".join(stories), encoding="utf-8")
    return folder


@pytest.mark.slow
def test_a_folder_of_spanish_becomes_a_model_that_beats_the_frequencies_of_its_tokens(root, tmp_path):
    spanish(tmp_path / "texts")
    small = [word for key, value in SMALL.items() for word in (f"--{key}", str(value))]
    trained = train_in_a_fresh_process(tmp_path, str(root / "recipes" / "own_text.yaml"), *small)
    assert trained.returncode == 0, trained.stderr
    assert "training a tokenizer of 384 entries" in trained.stdout
    model = tmp_path / "runs" / "own_text" / "models" / "iter-000060"
    command = [sys.executable, str(root / "recipes" / "eval.py"), str(model)]
    scored = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert scored.returncode == 0, scored.stderr
    results = json.loads((tmp_path / "runs/own_text/evaluation/iter-000060/results.json").read_text())
    assert [each["facts"]["name"] for each in results["models"]][1:] == ["untrained", "unigram"]
    assert not any(each["tasks"] for each in results["models"])
    ours, untrained, unigram = (each["validation"]["loss"] for each in results["models"])
    assert ours < unigram - 1 and unigram < untrained


def test_text_that_has_changed_is_not_trained_on_and_a_run_that_has_begun_goes_on(in_process, undisturbed, capsys):
    text = in_process / "text.jsonl"
    before = text.read_bytes()
    try:
        text.write_bytes(before.replace(b"the", b"tha", 1))
        with pytest.raises(InputError, match=r"text\.jsonl has changed"):
            train(tiny(in_process, "--name", "new"))
        assert train(tiny(in_process)) == 0
    finally:
        text.write_bytes(before)
    assert "text.jsonl has changed" in capsys.readouterr().out
    assert not (in_process / "runs" / "new").exists()
