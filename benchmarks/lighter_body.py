"""What two ways to move fewer bytes in a training step cost in loss: bf16 residuals, and linear layers without biases.

Two small models train on the embedded corpus through recipes/train.py, under bf16 autocast as on a GPU, whose numbers a
CPU makes too: the quickstart's, and one of as many layers as the night's. Each seed has the same initial weights and
tokens in every variant, so that differences are of pairs. Runs of a few minutes, on one thread each; one that finished
in --runs is not trained again. benchmarks/traffic.py counts the bytes.
"""

from __future__ import annotations

import argparse
import math
import runpy
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from overnight.run_dir.layout import finished_in
from overnight.run_dir.metrics import Metrics

ROOT = Path(__file__).resolve().parents[1]
SHAPES = {
    "quickstart": {},
    "twelve-layers": {"model.n_layer": 12, "model.n_embd": 96, "model.n_head": 3, "schedule.max_iters": 200},
}
QUIET = {
    "threads": 1,
    "checkpoint.every": 1000,
    "validation.prompts": "[]",
    "validation.ngram_baselines": "false",
    "data.dir": "data/quickstart",
}


class Variant(NamedTuple):
    """What differs from a step that has its residual stream in float32 and trains all biases."""

    name: str
    bf16_residuals: bool
    bias: bool


PLAIN = Variant("plain", False, True)
VARIANTS = (
    PLAIN,
    Variant("bf16-residuals", True, True),
    Variant("no-biases", False, False),
)


def train_in_bf16(variant: Variant, arguments: list[str]) -> None:
    """recipes/train.py in this process with a variant's model, in the precision that a GPU takes."""
    import torch
    from torch import Tensor, nn

    from overnight.device import launch
    from overnight.model import gpt2

    build = gpt2.LanguageModel.__init__

    def in_bf16(embeddings: nn.Module, _: tuple[Tensor], embedded: Tensor) -> Tensor:
        return embedded.to(torch.bfloat16) if embeddings.training else embedded

    def varied(self: gpt2.LanguageModel, *args, **options) -> None:
        build(self, *args, **options)
        if variant.bf16_residuals:  # all residuals have the type of the embeddings
            self.gpt2.transformer.drop.register_forward_hook(in_bf16)

    gpt2.LanguageModel.__init__ = varied  # type: ignore[method-assign]
    launch.resolve_precision = lambda *_, **__: "bf16"  # type: ignore[assignment]
    script = ROOT / "recipes" / "train.py"
    sys.argv = [str(script), *arguments, "--model.bias", str(variant.bias).lower()]
    runpy.run_path(str(script), run_name="__main__")


def finished_loss(run: Path) -> float | None:
    """The validation loss at the end of a run; None where it has not ended."""
    return next((end["val_loss"] for end in finished_in(Metrics(run / "metrics.jsonl").records()).values()), None)


def loss_of(shape: str, variant: Variant, seed: int, folder: Path) -> float:
    """The loss of a run, which is trained where it is not there yet."""
    name = f"{shape}-{variant.name}-seed{seed}"
    if (loss := finished_loss(folder / "runs" / name)) is not None:
        return loss
    chosen = {**QUIET, **SHAPES[shape], "name": name, "seed": seed}
    overrides = [word for key, value in chosen.items() for word in (f"--{key}", str(value))]
    recipe = str(ROOT / "recipes" / "quickstart.yaml")
    command = [sys.executable, str(Path(__file__).resolve()), "--train", variant.name, recipe, *overrides]
    with (folder / f"{name}.log").open("w") as log:
        subprocess.run(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT, check=True)
    loss = finished_loss(folder / "runs" / name)
    assert loss is not None, f"{name} did not finish"
    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--runs", type=Path, metavar="DIR", default=Path("build/lighter_body"), help="kept there")
    chosen = parser.parse_args()
    chosen.runs.mkdir(parents=True, exist_ok=True)
    print(f"validation loss, nats per token, of seeds {chosen.seeds}; its mean difference to plain, and standard error")
    for shape in SHAPES:
        losses = {v: [loss_of(shape, v, seed, chosen.runs) for seed in chosen.seeds] for v in VARIANTS}
        for variant, found in losses.items():
            apart = [loss - plain for loss, plain in zip(found, losses[PLAIN], strict=True)]
            error = statistics.stdev(apart) / math.sqrt(len(apart)) if len(apart) > 1 else math.nan
            of_each = " ".join(f"{loss:.4f}" for loss in found)
            print(f"{shape:14} {variant.name:15} {of_each}  {statistics.mean(apart):+.4f} +- {error:.4f}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        train_in_bf16(next(v for v in VARIANTS if v.name == sys.argv[2]), sys.argv[3:])
    else:
        main()
