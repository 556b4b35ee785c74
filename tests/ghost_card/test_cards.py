"""The night's recipe on every card, from the trial of micro-batches to the exported model."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import triton
import yaml
from ghost import CARDS, ROOT, note, train_on
from runs import records, slow
from table import line

from overnight.planning.model_size import beside_the_tensors, peak_memory
from overnight.prepare.prepare import prepare
from overnight.recipe.load import load

SHORT = {"max_iters": 2, "warmup_iters": 1, "branches": []}
FLASH, CUDNN = "_scaled_dot_product_flash_attention", "_scaled_dot_product_cudnn_attention"
ATTENTION = {"h100-sxm": CUDNN, "b200": CUDNN, "t4": "_scaled_dot_product_efficient_attention"}
QUICK = ("rtx-4070", "h100-sxm", "t4")
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@pytest.fixture(scope="module")
def night(tmp_path_factory, gpt2_folder: Path) -> Path:
    """A folder with the night's recipe over other text and two short iterations, and its prepared shards."""
    folder = tmp_path_factory.mktemp("night")
    with (folder / "text.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in topics.values())
    recipe = yaml.safe_load((ROOT / "recipes" / "fineweb_edu_40m.yaml").read_text(encoding="utf-8"))
    recipe["data"] = {
        "source": "files",
        "path": str(folder / "text.jsonl"),
        "tokenizer": str(gpt2_folder),
        "dir": str(folder / "data"),
        "val_tokens": 2500,
        "reserved_fraction": 0.05,
    }
    recipe["batch"]["tokens_per_iter"] = 131_072
    recipe["schedule"] |= SHORT
    recipe["validation"] |= {"every": 2, "sample_tokens": 2}
    recipe["logging"] = {"every": 1}
    (folder / "night.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    loaded = load(folder / "night.yaml", ())
    prepare(loaded.data, loaded.model.vocab_size, report=lambda line: None)
    return folder


@dataclass(frozen=True)
class Seen:
    """What a run on a card showed."""

    said: str
    facts: dict
    tried: list[int]  # rows
    fits: int  # the largest
    gib: float  # its peak by the allocator
    breaks: int
    recompiles: int
    spilling: list[str]  # kernels


def run_on_card(night: Path, card: str) -> Seen:
    """Train, export, and read what came of it."""
    cache = night / f"cache-{card}"
    logs = {
        "TORCH_LOGS": "graph_breaks,recompiles",
        "TRITON_CACHE_DIR": str(cache),
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
    }
    done = train_on(night, "night.yaml", "--name", card, card=CARDS[card], computes="small", fresh=True, **logs)
    assert done.returncode == 0, done.stdout + done.stderr
    facts = json.loads((night / "runs" / card / "environment.json").read_text())
    tried = re.findall(r"(\d+) rows (?:do not fit|\S+ tok/s ([\d.]+) GiB)", done.stdout)
    fits, gib = next((int(rows), float(gib)) for rows, gib in tried if gib)
    return Seen(
        said=done.stdout,
        facts=facts,
        tried=sorted({int(rows) for rows, _ in tried}),
        fits=fits,
        gib=gib,
        breaks=done.stderr.count("Graph break"),
        recompiles=done.stderr.count("Recompiling function"),
        spilling=spilling(cache),
    )


def spilling(cache: Path) -> list[str]:
    """The kernels among the cubins below `cache` that keep something on the stack."""
    found = []
    for cubin in cache.rglob("*.cubin"):
        usage = subprocess.run([CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
        found += [cubin.stem for stack in re.findall(r"STACK:(\d+)", usage) if int(stack)]
    return found


def formula_gib(night: Path, rows: int, *, bf16: bool) -> float:
    """What model_size.py says that so many rows at once take, in GiB, without the context that this card has not."""
    tensors = peak_memory(load(night / "night.yaml", ()).model, rows, bf16=bf16)
    _context, *beside = beside_the_tensors(tensors, compiled=True).values()
    return (tensors + sum(beside)) / 2**30


def row_of(card: str, seen: Seen, formula: float) -> dict[str, object]:
    """A card's row in docs/gpu.md: what does not depend on the host's speed, by which sizes are chosen here."""
    return {
        "card": card,
        "capability": f"{CARDS[card].capability / 10:.1f}",
        "memory": f"{CARDS[card].mib / 1024:.0f} GiB",
        "tried first": f"{seen.tried[-1]} rows",
        "fit": f"{seen.fits} rows",
        "peak": f"{seen.gib:.1f} GiB",
        "formula": f"{formula:.1f} GiB",
        "attention": seen.facts["attention"].split(" ")[0].removeprefix("_scaled_dot_product_"),
        "precision": seen.facts["precision"].split(",")[0],
        "graph breaks": seen.breaks,
        "recompiled": seen.recompiles - (len(seen.tried) - 1),  # the body once for each further size that was tried
        "spills": len(seen.spilling),
    }


@pytest.mark.parametrize("card", [card if card in QUICK else slow(card) for card in CARDS])
def test_the_night_runs_from_start_to_export(night: Path, card: str):
    seen = run_on_card(night, card)
    assert CARDS[card].name in seen.facts["device"]
    assert seen.facts["attention"].startswith(ATTENTION.get(card, FLASH)), seen.facts["attention"]
    assert seen.breaks == 0
    assert [record["event"] for record in records(night, card, "event")][-1] == "finished"
    formula = formula_gib(night, seen.fits, bf16=CARDS[card].capability >= 80)
    row = row_of(card, seen, formula)
    note("cards", **row)
    assert seen.gib == pytest.approx(formula, rel=0.05)
    assert line(row.values()) in (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
