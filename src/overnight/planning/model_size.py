"""Tokens, epochs, parameters and FLOPs of a recipe: everything that can be said before anything runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from overnight.errors import InputError, listed
from overnight.recipe.schedule import branch_points, decay_iters, goals, iterations_left
from overnight.recipe.schema import EMBEDDED_BYTES, Model, Recipe, Schedule

VOCABULARY_MULTIPLE = 64  # tensor cores want matrix sides that are multiples of 64
# Rows of logits at once, by device and whether the loss is compiled: few for a CPU's cache, many for a GEMM's.
LOSS_CHUNK = {("cpu", False): 384, ("cpu", True): 384, ("cuda", False): 2048, ("cuda", True): 8192}
AUTO_MICRO_BATCH = {"cpu": 8, "cuda": 64}  # rows of 1,024 tokens: on a CPU taken as they are, on CUDA the most to try


def logit_bytes(*, bf16: bool, compiled: bool) -> int:
    """Bytes that a logit takes while the loss has it: in float32 4, in bf16 2, and eager a float32 copy beside it."""
    return 4 if not bf16 else 2 if compiled else 2 + 4


def padded_vocabulary(vocab_size: int) -> int:
    """Rows of the embedding while training."""
    return -(-vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def parameter_count(model: Model, vocabulary: int) -> int:
    """Parameters of a GPT-2 with tied embeddings of `vocabulary` rows."""
    block = 12 * model.n_embd**2 + 13 * model.n_embd  # qkv, projection and the MLP, with biases and two norms
    return (vocabulary + model.n_positions + 2) * model.n_embd + model.n_layer * block


def flops_per_token(model: Model, sequence_length: int) -> float:
    """Training FLOPs a token, forward and backward, as nanoGPT counts them (after PaLM, appendix B, arXiv 2204.02311).

    6 for every parameter but the positions, and attention over the whole row as if it were not causal.
    """
    matmuls = parameter_count(model, model.vocab_size) - model.n_positions * model.n_embd
    return 6 * matmuls + 12 * model.n_layer * model.n_embd * sequence_length


def peak_memory(
    model: Model,
    micro_batch: int,
    *,
    sequence_length: int = 1024,
    optimizer: str = "muon",
    chunk: int | None = None,
    compiled: bool = True,
    bf16: bool = True,
) -> int:
    """Bytes of all tensors at the peak of an iteration, which is inside of a chunk of the loss.

    Under `bf16` autocast or in float32. The body takes the same compiled or not: Inductor keeps as much for the
    backward as eager operators do. The loss is `compiled` or not, and `chunk` is the rows of logits at once, CUDA's by
    default. benchmarks/memory.py holds it against a traced step and CUDA's allocator; what is no tensor of the step's
    own, `beside_the_tensors` has.
    """
    width, vocabulary, tokens = model.n_embd, padded_vocabulary(model.vocab_size), micro_batch * sequence_length
    hidden = 12 * model.n_layer * width**2  # elements of the blocks' matrices
    parameters = parameter_count(model, vocabulary)
    state = 8 * parameters - (4 * hidden if optimizer == "muon" else 0)  # two moments each, or Muon's one
    kept = 8 * parameters + state + bf16 * 2 * hidden  # in float32 with gradients, and the blocks' matrices in bf16
    # A token and layer: two residuals in float32; in the products' type two norms, q, k, v, attention, both sides of
    # gelu. Then the norms' mean and deviation, attention's log-sum-exp.
    size = 2 if bf16 else 4
    activations = tokens * model.n_layer * ((8 + 14 * size) * width + 16 + 4 * model.n_head)
    if model.dropout:
        activations += tokens * (2 * model.n_layer + 1) * width  # masks: two of a layer, one of the embeddings
    # Around the loss: the last residual, its norm in float32 (and in bf16), the norm's gradient.
    activations += tokens * ((12 + bf16 * 2) * width + 8)
    chunk = min(chunk or LOSS_CHUNK["cuda", compiled], tokens)
    return kept + activations + loss_memory(width, vocabulary, chunk, compiled=compiled, bf16=bf16)


def loss_memory(width: int, vocabulary: int, chunk: int, *, compiled: bool, bf16: bool) -> int:
    """Bytes of the loss's own tensors while it works on a chunk of rows."""
    head = vocabulary * width * (4 + bf16 * 2)  # its gradient, to which every chunk is added in place, and a bf16 copy
    return head + chunk * vocabulary * logit_bytes(bf16=bf16, compiled=compiled)


def beside_the_tensors(tensors: int, *, compiled: bool) -> dict[str, int]:
    """What a CUDA process needs beside `tensors` bytes of tensors at its peak, in bytes by what it is.

    The context was never measured. The allocator's share is what PyTorch's own kept beside its tensors at 8 to 64 rows,
    within 5 % of the whole (benchmarks/memory.py --device cuda). Eager code fills holes of the same few sizes again and
    again; what Inductor plans has larger ones.
    """
    segment = 20 * 2**20
    holes = segment + tensors // 25 if compiled else min(tensors * 27 // 200, 6 * segment)
    by_what = "a segment of 20 MiB, and 4 % of the tensors" if compiled else "13.5 % of the tensors, 120 MiB at most"
    return {
        "CUDA context and kernels (assumed)": 450 * 2**20,
        "cuBLAS workspace (PyTorch's default :4096:2:16:8, of cards before Hopper)": 8320 * 2**10,
        f"the allocator's rounding and fragments: {by_what}": holes,
    }


def memory_gib(recipe: Recipe, micro_batch: int, *, compiled: bool = True, bf16: bool = True) -> float:
    """What training a recipe takes of a CUDA card, in GiB: the tensors at their peak and all beside them."""
    length, optimizer = recipe.batch.sequence_length, recipe.optim.name
    tensors = peak_memory(
        recipe.model, micro_batch, sequence_length=length, optimizer=optimizer, compiled=compiled, bf16=bf16
    )
    return (tensors + sum(beside_the_tensors(tensors, compiled=compiled).values())) / 2**30


def first_micro_batch(recipe: Recipe, device: str, num_processes: int) -> int:
    """Rows of the micro-batch to begin with: what is asked for, or the largest divisor of a process's rows in reason.

    On CUDA it is where measuring begins (micro_batch.py). Raises `InputError` when the batch does not divide over the
    processes.
    """
    rows = recipe.batch.tokens_per_iter // recipe.batch.sequence_length
    asked = recipe.batch.micro_batch
    if rows % num_processes or (asked != "auto" and rows // num_processes % asked):
        unit = recipe.batch.sequence_length * num_processes * (1 if asked == "auto" else asked)
        works = max(1, round(recipe.batch.tokens_per_iter / unit)) * unit
        raise InputError(
            f"`batch.tokens_per_iter` {recipe.batch.tokens_per_iter} ({rows} rows) does not divide over {num_processes}"
            f" processes with `batch.micro_batch` {asked}; {works} would work"
        )
    if asked != "auto":
        return asked
    mine = rows // num_processes
    at_most = AUTO_MICRO_BATCH[device] * max(1, 1024 // recipe.batch.sequence_length)
    return next_divisor(mine, at_most)


def next_divisor(rows: int, at_most: int) -> int:
    """The largest divisor of `rows` that is no larger than `at_most`; 0 when there is none."""
    return max((size for size in range(1, min(at_most, rows) + 1) if rows % size == 0), default=0)


@dataclass(frozen=True)
class Derived:
    """What follows from a recipe on a given number of processes, before anything is measured."""

    parameters: int
    parameters_padded: int
    rows_per_process: int  # of one iteration
    first_micro_batch: int  # rows at once to begin with; the present number is `Run.micro_batch`
    measured: bool  # a CUDA device measures which micro-batch is the fastest that fits
    num_processes: int
    tokens: int
    flops_per_token: float
    unique_tokens: int | None

    @property
    def epochs(self) -> float | None:
        """How often each unique token is seen; None while the unique tokens are not known."""
        return self.tokens / self.unique_tokens if self.unique_tokens else None

    def mfu(self, tokens_per_second: float | None, peak_flops: float | None) -> float | None:
        """Share of the devices' dense peak, FLOP/s of one of them, that this rate makes use of; None if unknown."""
        if not tokens_per_second or not peak_flops:
            return None
        return tokens_per_second * self.flops_per_token / (peak_flops * self.num_processes)


def derive(recipe: Recipe, device: str, num_processes: int, unique_tokens: int | None) -> Derived:
    """Everything that follows from `recipe` before it runs; `device` is "cpu" or "cuda"."""
    return Derived(
        parameters=parameter_count(recipe.model, recipe.model.vocab_size),
        parameters_padded=parameter_count(recipe.model, padded_vocabulary(recipe.model.vocab_size)),
        rows_per_process=recipe.batch.tokens_per_iter // recipe.batch.sequence_length // num_processes,
        first_micro_batch=first_micro_batch(recipe, device, num_processes),
        measured=device == "cuda" and recipe.batch.micro_batch == "auto",
        num_processes=num_processes,
        tokens=recipe.schedule.max_iters * recipe.batch.tokens_per_iter,
        flops_per_token=flops_per_token(recipe.model, recipe.batch.sequence_length),
        unique_tokens=unique_tokens,
    )


def iterations_in_all(schedule: Schedule) -> int:
    """The updates of a run: its own, and the decays of the budgets that it finishes on the way."""
    return iterations_left(schedule, 0, goals(schedule))


def derived_rows(recipe: Recipe, derived: Derived) -> list[tuple[str, str]]:
    """The derived facts as (what, value), for the table at the start and for `--dry-run`."""
    batch, schedule = recipe.batch, recipe.schedule
    epochs = "; how many there are to train on is not known until the data is prepared"
    if derived.unique_tokens:
        epochs = f" = {derived.epochs:.2f} epochs of {derived.unique_tokens:,} unique tokens"
    first, rows = derived.first_micro_batch, derived.rows_per_process
    tokens, processes = f"{batch.sequence_length} tokens", f"{derived.num_processes} processes"
    cut = f"{first} rows x {tokens} x {rows // first} accumulated x {processes}"
    if derived.measured:
        cut = f"{rows} rows x {tokens} x {processes}; how many rows go at once, the start measures"
    ending = f"linear to zero over the last {decay_iters(schedule):,}" if schedule.kind == "wsd" else "cosine"
    on_the_way = goals(schedule)[:-1]
    finished = [("finished on the way", f"{listed(on_the_way)}: {iterations_in_all(schedule):,} in all")]
    return [
        ("parameters", f"{derived.parameters:,} exported ({derived.parameters_padded:,} while padded)"),
        (
            "tokens per iteration",
            f"{batch.tokens_per_iter:,} = {cut}",
        ),
        (
            "the run",
            f"{schedule.max_iters:,} iterations = {derived.tokens:,} tokens{epochs}",
        ),
        *(finished if on_the_way else []),
        (
            "learning rate",
            f"{recipe.optim.lr:g} with {recipe.optim.name}, {schedule.warmup_iters:,} iterations of warmup, {ending}",
        ),
        (
            "compute",
            f"{derived.flops_per_token / 1e6:.1f} MFLOP a token, {derived.flops_per_token * derived.tokens:.3g} in all",
        ),
    ]


def run_bytes(recipe: Recipe) -> int:
    """What a run folder holds in the end: checkpoints of trunk, branch points and decays, a new one, the models."""
    parameters = parameter_count(recipe.model, recipe.model.vocab_size)
    state = parameters * (4 + 8)  # weights and AdamW's two moments in float32; of the blocks' matrices Muon keeps one
    if recipe.optim.name == "muon":
        state -= 4 * 12 * recipe.model.n_layer * recipe.model.n_embd**2
    budgets, keep = len(goals(recipe.schedule)), recipe.checkpoint.keep
    checkpoints = keep + len(branch_points(recipe.schedule)) + keep * budgets + 1
    return checkpoints * state + budgets * 4 * parameters


def data_bounded(recipe: Recipe) -> bool:
    """Whether `data_bytes` is the most that the data takes: its tokens have a limit, or it is there."""
    from overnight.data.manifest import is_prepared  # with numpy, which may be missing

    data = recipe.data
    return bool(data.train_tokens) or data.source == "embedded" or is_prepared(Path(data.dir))


def data_bytes(recipe: Recipe) -> int:
    """What the data folder still needs: nothing once it is prepared, else its tokens twice, and the files fetched."""
    from overnight.data.manifest import dtype_for, is_prepared, little_endian  # with numpy, which may be missing

    if is_prepared(Path(recipe.data.dir)):
        return 0
    embedded = EMBEDDED_BYTES if recipe.data.source == "embedded" else 0
    tokens = (recipe.data.train_tokens or embedded) + recipe.data.val_tokens
    token_bytes = little_endian(dtype_for(recipe.model.vocab_size)).itemsize
    return 2 * tokens * token_bytes + int((recipe.data.fetched_gb or 0) * 1e9)
