"""Finished models: written as a plain transformers folder, then loaded in a fresh process and compared.

`python -m overnight.model.export FOLDER PROBE` is that fresh process.
"""

from __future__ import annotations

import errno
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase

from overnight.core.files import remove
from overnight.core.processes import Helper
from overnight.core.sums import put_in_place
from overnight.model.load import load_model

READING_SECONDS = 900
TOLERANCE = 1e-5  # of the logits, float32 against float32 on the same CPU


def export(
    model: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    probe: Tensor,
    enough: Callable[[], bool] = lambda: False,
) -> None:
    """Write `model` (as `published` gives it) and its tokenizer to `folder`, verified before it has that name.

    `probe` is (batch, time) int64 tokens. Raises RuntimeError when the folder, loaded by a fresh process, does not give
    the same logits on them, or misses or adds a key, and InterruptedError where there is `enough` of waiting for it.
    """
    aside = folder.with_name(f".{folder.name}.partial")
    remove(aside)
    try:
        model.save_pretrained(aside)
        tokenizer.model_max_length = model.config.n_positions  # so that a longer text is cut, or warned of
        tokenizer.save_pretrained(aside)
        configure_for_readers(aside / "tokenizer_config.json")
        for path in aside.iterdir():  # safetensors writes files that their owner alone can read
            path.chmod((aside / "config.json").stat().st_mode)
        verify_export(model, aside, probe, enough)
        put_in_place(aside, folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def configure_for_readers(config: Path) -> None:
    """Say in a tokenizer's configuration how prompts are padded, and what transformers 4 calls its class and a list."""
    said = json.loads(config.read_text(encoding="utf-8"))
    if said.get("tokenizer_class") == "TokenizersBackend":
        said["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(said.get("extra_special_tokens"), list):
        said["additional_special_tokens"] = said.pop("extra_special_tokens")
    said["pad_token"], said["padding_side"] = said.get("pad_token") or said.get("eos_token"), "left"
    config.write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def verify_export(
    model: GPT2LMHeadModel, folder: Path, probe: Tensor, enough: Callable[[], bool] = lambda: False
) -> None:
    """Raise RuntimeError unless a fresh process reads the same model from `folder` as `model` is."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".probe-") as scratch, torch.no_grad():
        stored = Path(scratch) / "probe.safetensors"
        on_cpu = GPT2LMHeadModel(model.config).eval()
        on_cpu.load_state_dict({name: tensor.cpu() for name, tensor in model.state_dict().items()})
        save_file({"ids": probe.cpu().contiguous(), "logits": on_cpu(probe.cpu()).logits.contiguous()}, stored)
        reader = Helper("-m", "overnight.model.export", str(folder), str(stored), priority=0)
        if not reader.wait(READING_SECONDS, enough):
            reader.stop()
            if enough():
                raise InterruptedError(errno.EINTR, "it was not read again", str(folder))
            raise TimeoutError(errno.ETIMEDOUT, f"reading it again took more than {READING_SECONDS} s", str(folder))
    if reader.code:
        raise RuntimeError(f"{folder} does not load as the model that was trained:\n{reader.said()}")


def export_faults(folder: str, probe: str) -> list[str]:
    """What a fresh reader of `folder` finds different from the logits stored in `probe`; empty when all is well."""
    model, info, tokenizer = load_model(folder)
    stored = load_file(probe)
    found = [f"{kind}: {sorted(map(str, keys))}" for kind, keys in info.items() if keys]
    if len(tokenizer) != model.config.vocab_size:
        found.append(f"the tokenizer has {len(tokenizer)} tokens, the model {model.config.vocab_size}")
    if tokenizer.model_max_length != model.config.n_positions:
        found.append(f"the tokenizer's longest text is {tokenizer.model_max_length}")
    with torch.no_grad():
        distance = (model.eval()(stored["ids"]).logits - stored["logits"]).abs().max().item()
    if not distance <= TOLERANCE:
        found.append(f"logits differ by {distance:.2e}, more than {TOLERANCE:.0e}")
    return found


if __name__ == "__main__":
    problems = export_faults(*sys.argv[1:3])
    print("\n".join(problems))
    sys.exit(1 if problems else 0)
