"""How long a token takes on a card, from its parts: matrix products, attention, and what else moves through memory.

The parts follow one another, so their times add up. Each is arithmetic on the card's own figures (facts/gpus.csv) and
on bytes that were counted (facts/traffic.csv, benchmarks/traffic.py). The constants below hold for all cards and codes;
`python benchmarks/roofline.py` prints what public runs reached beside them. Not counted: launches that a small model
waits for, caches, exchange between GPUs, and Muon's own products (0.4 % of the FLOPs at 124M parameters).
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from overnight.planning.gpus import Gpu, Speed, facts, known_gpus
from overnight.planning.model_size import padded_vocabulary, parameter_count
from overnight.recipe.schema import Model, Recipe

# Of the matrix units' peak. The best shapes reach 80 % on an H100, 81 % on an A100 PCIe and 87 % on an A100 SXM, by
# stas00/ml-engineering, compute/accelerator, "Maximum Achievable Matmul FLOPS".
PRODUCT_SHARE = 0.80
# What the board takes for one of their FLOPs where its power and not its clock is the limit: a board of 300 W cannot
# hold 400 TFLOP/s. Set by llm.c's runs on A100 PCIe (250 W) and H100 (700 W), where it comes out between -8 and +5 %.
JOULES_PER_FLOP = 1.45e-12
# The same of Samsung's 8 nm, in which NVIDIA makes the chips of capability 8.6. An A10 (150 W) reaches 35.3 TFLOP/s in
# tf32 with cuBLAS, by a public table of matmul kernels, and bf16 is twice as fast; llm.c's run on it comes out at +9 %.
JOULES_PER_FLOP_8_NM = 2.1e-12
# Of the memory's bandwidth: what a long copy reaches.
BANDWIDTH_SHARE = 0.90
# Instructions of the vector units for a query and a key, in attention's forward and backward: with them an A100 reaches
# 38 % of its peak over rows of 1,024 tokens and heads of 64. FlashAttention-2's paper has half of it over long rows.
ATTENTION_INSTRUCTIONS = (10, 20)
ATTENTION_FLOPS = (4, 10)  # for a query, a key and an element of a head: two products forward, five backward
ATTENTION_TILE = 128  # queries, and keys: along the diagonal half of a tile is masked, but computed
# Seconds of a micro-batch below which the host may not launch kernels as fast as the card ends them: about a thousand
# kernels at 10 to 20 microseconds each. Assumed, not measured.
LAUNCHES = 0.02


class Work(NamedTuple):
    """What a code does with a model: `rows` of `length` tokens at once, an update each `tokens_per_iter` of a GPU."""

    code: str  # of facts/traffic.csv
    model: Model
    length: int
    rows: int
    tokens_per_iter: int


class Parts(NamedTuple):
    """Seconds a token."""

    products: float
    attention: float
    memory: float

    @property
    def tokens_per_second(self) -> float:
        return 1 / sum(self)


def power_rate(gpu: Gpu) -> float:
    """FLOP/s that the board's power is enough for."""
    return gpu.tdp_watts / (JOULES_PER_FLOP_8_NM if gpu.compute_capability == 8.6 else JOULES_PER_FLOP)


def power_bound(gpu: Gpu) -> bool:
    """Whether the board's power keeps its matrix units from their usual share of the peak, or nearly does."""
    return power_rate(gpu) < 1.05 * PRODUCT_SHARE * gpu.tflops * 1e12


def product_rate(gpu: Gpu) -> float:
    """FLOP/s of large matrix products."""
    return min(PRODUCT_SHARE * gpu.tflops * 1e12, power_rate(gpu))


def training(work: Work, gpu: Gpu) -> Parts:
    """Seconds of a token of an iteration: forward, backward and its share of the update."""
    forward, backward = attention(work, gpu)
    parts = ["body", "loss", "update"]
    if work.model.bias and "biases" in counted(work.code, bool(work.model.dropout)):  # of others' codes in the body
        parts.append("biases")
    bytes_a_token = sum(moved(work, part) for part in parts)
    return Parts(3 * forward_products(work) / product_rate(gpu), forward + backward, seconds(bytes_a_token, gpu))


def validation(work: Work, gpu: Gpu) -> Parts:
    """Seconds of a token of a validation: a forward in evaluation mode, and the loss without its gradients."""
    bytes_a_token = moved(work, "validation body") + moved(work, "validation loss")
    return Parts(forward_products(work) / product_rate(gpu), attention(work, gpu)[0], seconds(bytes_a_token, gpu))


def forward_products(work: Work) -> float:
    """FLOPs of a token's matrix products, forward: two for each element of the blocks' matrices and of the head."""
    model = work.model
    return 2 * (12 * model.n_layer * model.n_embd**2 + padded_vocabulary(model.vocab_size) * model.n_embd)


def attention(work: Work, gpu: Gpu) -> tuple[float, float]:
    """Seconds of a token's causal fused attention, forward and backward; the two kinds of unit take turns."""
    model = work.model
    pairs = model.n_layer * model.n_head * (work.length + ATTENTION_TILE) / 2
    instructions_a_second = gpu.fp32_tflops * 1e12 / 2  # a fused multiplication and addition is two FLOPs
    head = model.n_embd / model.n_head
    forward, backward = (
        pairs * (flops * head / product_rate(gpu) + instructions / instructions_a_second)
        for flops, instructions in zip(ATTENTION_FLOPS, ATTENTION_INSTRUCTIONS, strict=True)
    )
    return forward, backward


def moved(work: Work, part: str) -> float:
    """Bytes of memory that a token moves in a part, matrix products and attention left out."""
    row = counted(work.code, bool(work.model.dropout))[part]
    vocabulary = padded_vocabulary(work.model.vocab_size)
    units = {"layer x width": work.model.n_layer * work.model.n_embd, "logit": vocabulary, "none": 0}[row["unit"]]
    sharing = work.tokens_per_iter if part == "update" else work.rows * work.length
    once = float(row["per_parameter"]) * parameter_count(work.model, vocabulary)
    return float(row["per_unit"]) * units + once / sharing


def seconds(bytes_a_token: float, gpu: Gpu) -> float:
    return bytes_a_token / (BANDWIDTH_SHARE * gpu.memory_bandwidth_gb_s * 1e9)


@cache
def counted(code: str, dropout: bool) -> dict[str, dict[str, str]]:
    """The rows of facts/traffic.csv for a code, by part."""
    rows = (row for row in facts("traffic.csv") if row["code"] == code)
    return {row["part"]: row for row in rows if (float(row["dropout"]) > 0) == dropout}


class PublicRun(NamedTuple):
    """A row of facts/measured_throughput.csv whose shape is known."""

    gpu: Gpu
    code: str
    compiled: str
    work: Work
    tokens_per_second: float
    source: str

    @property
    def off(self) -> float:
        """By which share the estimate is above what was measured."""
        return training(self.work, self.gpu).tokens_per_second / self.tokens_per_second - 1


def public_runs() -> list[PublicRun]:
    """What others measured, with all that an estimate of it needs."""
    known, found = known_gpus(), []
    for row in facts("measured_throughput.csv"):
        if not row["traffic"]:
            continue
        layers, heads, width, vocabulary = (int(row[key]) for key in ("n_layer", "n_head", "n_embd", "vocab_size"))
        dropout = float(row["dropout"])
        model = Model(n_layer=layers, n_head=heads, n_embd=width, vocab_size=vocabulary, dropout=dropout)
        work = Work(row["traffic"], model, 1024, int(row["rows"]), int(row["tokens_per_iter"]))
        rate = float(row["tokens_per_second"])
        found.append(PublicRun(known[row["gpu"]], row["code"], row["compiled"], work, rate, row["source"]))
    return found


def work_of(recipe: Recipe, rows: int) -> Work:
    """A recipe's training on one card, compiled."""
    return Work("overnight", recipe.model, recipe.batch.sequence_length, rows, recipe.batch.tokens_per_iter)


def speed_of(recipe: Recipe, gpu: Gpu, rows: int, measured: list[PublicRun] | None = None) -> Speed | None:
    """Tokens a second of a recipe on a card, `rows` at once: this code's own where measured, otherwise an estimate.

    None for a card without bf16: the bytes were counted in bf16.
    """
    runs, work = public_runs() if measured is None else measured, work_of(recipe, rows)
    own = [run for run in runs if run.code == "overnight" and run.gpu == gpu and same_shape(run.work, work)]
    if own:
        return Speed(own[0].tokens_per_second, f"measured: {own[0].source}")
    if not gpu.bf16:
        return None
    alike = [run for run in runs if run.compiled != "no" and power_bound(run.gpu) == power_bound(gpu)]
    off = max(abs(run.off) for run in alike)
    limit = "limited by their power" if power_bound(gpu) else "limited by their clock"
    source = (
        f"an estimate from the parts, at most {off:.0%} off {len(alike)} public runs of compiled code on cards {limit}"
    )
    rate = training(work, gpu).tokens_per_second
    return Speed(rate, source, at_most=rows * work.length / rate < LAUNCHES)


def same_shape(one: Work, other: Work) -> bool:
    """Whether two models take the same time a token, the micro-batch and the update left out."""
    shapes = [(work.length, work.model.model_dump(exclude={"attention", "n_positions"})) for work in (one, other)]
    return shapes[0] == shapes[1]


def validation_share(recipe: Recipe, gpu: Gpu, rows: int) -> float:
    """What a token of a validation takes, as a share of what one of training takes."""
    work = work_of(recipe, rows)
    return sum(validation(work, gpu)) / sum(training(work, gpu))
