"""A checkpoint of a trunk as a model that transformers loads: for a look, and for whoever continues from it."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from overnight.data.manifest import read_manifest
from overnight.data.shards import tokenizer_problems
from overnight.errors import DamagedData
from overnight.model.checkpoint import MODEL
from overnight.model.gpt2 import LanguageModel, published
from overnight.recipe.schema import Recipe


def write_model(checkpoint: Path, recipe: Recipe, folder: Path) -> None:
    """Write the weights of `checkpoint` and the tokenizer of the run's data into `folder`, on the CPU."""
    data = Path(recipe.data.dir)
    manifest = read_manifest(data)
    if problems := tokenizer_problems(data, manifest):
        raise DamagedData(problems)
    model = LanguageModel(recipe.model, manifest.eos_id, compile=False)
    weights = load_file(checkpoint / MODEL)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    published(model, recipe.model).save_pretrained(folder)
    for path in (data / "tokenizer").iterdir():
        shutil.copyfile(path, folder / path.name)
