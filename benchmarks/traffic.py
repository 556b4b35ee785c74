"""Counts the bytes of memory that a training step moves for a token, in its body, its loss and its update.

What matrix products and attention read and write stands beside the sum and is not in it: roofline.py has its own
arithmetic for both. A step of 16 rows and one of 32 are counted. The difference is what a token moves, the rest what
a micro-batch moves whatever its size: casts of the weights and additions to their gradients. Nothing is timed, so a
device that computes nothing will do. `--write` puts the bytes into facts/traffic.csv, on which the plan's hours stand.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import NamedTuple

import torch
import torch._inductor.config
from torch import Tensor, nn
from torch._dynamo.utils import counters
from traffic_count import counted  # the file beside this one

from overnight.model import optim
from overnight.model.gpt2 import LanguageModel
from overnight.planning.model_size import padded_vocabulary
from overnight.recipe.schema import Model, Optim

FACTS = Path(__file__).resolve().parents[1] / "src" / "overnight" / "facts" / "traffic.csv"
SHAPES = {"40m": (12, 6, 384), "124m": (12, 12, 768)}  # layers, heads, width
LENGTH, VOCABULARY = 1024, 50_257
ROWS = (16, 32)  # of the two micro-batches


class Code(NamedTuple):
    """A model of some code and the parts of its step, each a function of token ids (rows, time)."""

    model: nn.Module
    parts: dict[str, Callable[[Tensor], object]]


def under_autocast(function: Callable[..., object]) -> Callable[..., object]:
    return torch.autocast("cuda", dtype=torch.bfloat16)(function)


def backward_from(hidden: Callable[[Tensor], Tensor]) -> Callable[[Tensor], None]:
    """Forward and backward of a body, its gradient given."""
    gradients: dict[torch.Size, Tensor] = {}

    def step(ids: Tensor) -> None:
        out = under_autocast(hidden)(ids)
        if out.shape not in gradients:
            gradients[out.shape] = torch.zeros_like(out)
        out.backward(gradients[out.shape])

    return step


def update(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> Callable[[Tensor], None]:
    def step(_: Tensor) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()

    return step


def ours(shape: Model) -> Code:
    """This project's model and optimizers."""
    model, biased = (
        LanguageModel(shape.model_copy(update={"bias": bias}), VOCABULARY - 1, compile=True).to("cuda").train()
        for bias in (False, True)
    )

    def validation(function: Callable[[Tensor], object]) -> Callable[[Tensor], None]:
        def step(ids: Tensor) -> None:
            model.eval()
            with torch.no_grad():
                under_autocast(function)(ids)
            model.train()

        return step

    parts = {
        "body": backward_from(model.training_body),
        "body with biases": backward_from(biased.training_body),
        "whole": lambda ids: under_autocast(model)(ids, ids).backward(),
        "update": update(model, optim.build(model, Optim())),
        "validation body": validation(model.body),
        "validation whole": validation(lambda ids: model(ids, ids)),
    }
    return Code(model, parts)


def nanogpt(shape: Model, folder: Path, *, compiled: bool = True) -> Code:
    """karpathy/nanoGPT's model as its train.py runs it, from a checkout."""
    spec = spec_from_file_location("nanogpt_model", folder / "model.py")
    assert spec is not None and spec.loader is not None
    sys.modules[spec.name] = module = module_from_spec(spec)  # its dataclass asks for the module
    spec.loader.exec_module(module)
    sizes = {"n_layer": shape.n_layer, "n_head": shape.n_head, "n_embd": shape.n_embd, "dropout": shape.dropout}
    config = module.GPTConfig(block_size=LENGTH, vocab_size=padded_vocabulary(VOCABULARY), bias=False, **sizes)
    model = module.GPT(config).to("cuda").train()

    def body(ids: Tensor) -> Tensor:
        layers = model.transformer
        hidden = layers.drop(layers.wte(ids) + layers.wpe(torch.arange(ids.shape[1], device=ids.device)))
        for block in layers.h:
            hidden = block(hidden)
        return layers.ln_f(hidden)

    run, run_body = (torch.compile(each, dynamic=False) if compiled else each for each in (model, body))
    parts = {
        "body": backward_from(run_body),
        "whole": lambda ids: under_autocast(run)(ids, ids)[1].backward(),
        "update": update(model, [model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cuda")]),
    }
    return Code(model, parts)


class Part(NamedTuple):
    """What a part of a step moves: bytes a token, bytes a parameter and micro-batch (of an update: and iteration)."""

    per_token: float
    per_parameter: float
    apart: dict[str, float]  # bytes a token of each kind at the larger micro-batch
    kernels: int


def measure(code: Code) -> tuple[dict[str, Part], int, int]:
    """The parts of a code, and how many graph breaks and recompilations there were."""
    counters.clear()
    parameters = sum(parameter.numel() for parameter in code.model.parameters())
    found: dict[str, Part] = {}
    recompiled = 0
    for name, part in code.parts.items():
        seen = []
        for size in ROWS:
            ids = torch.zeros(size, LENGTH, dtype=torch.int64, device="cuda")
            part(ids)
            graphs = counters["stats"]["unique_graphs"]
            seen.append(counted(lambda part=part, ids=ids: part(ids)))  # type: ignore[misc]
            recompiled += counters["stats"]["unique_graphs"] - graphs
        few, many = seen
        per_token = 0.0 if name == "update" else (many.moved - few.moved) / (ROWS[1] - ROWS[0]) / LENGTH
        once = few.moved - per_token * ROWS[0] * LENGTH
        apart = {kind: moved / ROWS[1] / LENGTH for kind, moved in many.bytes.items()}
        found[name] = Part(per_token, once / parameters, apart, many.kernels)
    return found, sum(counters["graph_break"].values()), recompiled


def split(found: dict[str, Part], shape: Model) -> list[tuple[str, str, float, float]]:
    """(part, unit, bytes a token and unit, bytes a parameter and micro-batch), the loss taken from whole and body."""
    units = {"layer x width": shape.n_layer * shape.n_embd, "logit": padded_vocabulary(VOCABULARY)}
    rows = [("update", "none", 0.0, found["update"].per_parameter)]
    if "body with biases" in found:
        summed = found["body with biases"].per_token - found["body"].per_token
        rows.append(("biases", "layer x width", summed / units["layer x width"], 0.0))
    for kind in ("", "validation "):
        if f"{kind}body" in found:
            body, whole = found[f"{kind}body"], found[f"{kind}whole"]
            loss = (whole.per_token - body.per_token, whole.per_parameter - body.per_parameter)
            rows.append((f"{kind}body", "layer x width", body.per_token / units["layer x width"], body.per_parameter))
            rows.append((f"{kind}loss", "logit", loss[0] / units["logit"], loss[1]))
    return rows


def tell(found: dict[str, Part], parts: list[tuple[str, str, float, float]]) -> None:
    """Print what was counted at the larger micro-batch, and what the facts get."""
    kinds = ("compiled", "eager", "GEMM", "attention")
    print(f"  kB a token at {ROWS[1]} rows  " + "".join(f"{kind:>11}" for kind in kinds) + "    kernels")
    for name, part in found.items():
        figures = "".join(f"{part.apart.get(kind, 0) / 1e3:11,.1f}" for kind in kinds)
        print(f"  {name:<25}{figures}{part.kernels:11,}")
    for name, unit, per_unit, per_parameter in parts:
        a_token = f"{per_unit:.1f} bytes a token and {unit}, " if unit != "none" else ""
        print(f"  {name:<25}{a_token}{per_parameter:.1f} a parameter")


def write(measured: dict[tuple[str, str], list[tuple[str, str, float, float]]]) -> None:
    """Replace the rows of the measured codes in the facts; the others stay."""
    lines = FACTS.read_text(encoding="utf-8").splitlines()
    comments = [line for line in lines if line.startswith("#")]
    kept = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    rows = [row for row in kept if (row["code"], row["dropout"]) not in measured]
    capability = "".join(map(str, torch.cuda.get_device_capability()))
    counted_by = f"counted by benchmarks/traffic.py under torch {torch.__version__}, sm_{capability}"
    for (code, dropout), parts in measured.items():
        for part, unit, per_unit, per_parameter in parts:
            fields = (code, dropout, part, unit, f"{per_unit:.1f}", f"{per_parameter:.1f}", counted_by)
            rows.append(dict(zip(kept[0], fields, strict=True)))
    with FACTS.open("w", encoding="utf-8", newline="") as file:
        file.write("".join(f"{line}\n" for line in comments))
        out = csv.DictWriter(file, list(kept[0]), lineterminator="\n")
        out.writeheader()
        out.writerows(sorted(rows, key=lambda row: (row["code"], row["dropout"])))


def sides(shape: Model, folder: Path | None) -> dict[str, Callable[[], Code]]:
    """The codes to count, by their names in the facts."""
    if folder is None:
        return {"overnight": partial(ours, shape)}
    eager = partial(nanogpt, shape, folder, compiled=False)
    return {
        "overnight": partial(ours, shape),
        "nanoGPT": partial(nanogpt, shape, folder),
        "nanoGPT, not compiled": eager,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="40m", help="facts are written of the 40M shape")
    parser.add_argument("--nanogpt", type=Path, metavar="DIR", help="a checkout of karpathy/nanoGPT to count as well")
    parser.add_argument("--write", action="store_true", help="put the bytes into facts/traffic.csv")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device here")
    torch._inductor.config.benchmark_kernel = True  # kernels then know their bytes
    layers, heads, width = SHAPES[chosen.shape]
    measured = {}
    for dropout in (0.0, 0.1):
        shape = Model(n_layer=layers, n_head=heads, n_embd=width, vocab_size=VOCABULARY, dropout=dropout)
        for name, build in sides(shape, chosen.nanogpt).items():
            torch._dynamo.reset()
            found, breaks, recompiled = measure(build())
            measured[name, f"{dropout:g}"] = split(found, shape)
            print(f"\n{name}, {chosen.shape}, dropout {dropout:g}: {breaks} graph breaks, {recompiled} recompilations")
            tell(found, measured[name, f"{dropout:g}"])
    if chosen.write:
        write(measured)


if __name__ == "__main__":
    main()
