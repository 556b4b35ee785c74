"""The models of a recipe, which says everything that gives a run its meaning; load.py reads one."""

from __future__ import annotations

import re
from os.path import expanduser
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr, model_validator

from overnight.errors import script_command

EMBEDDED_BYTES = 11_000_000  # of the embedded corpus, about; a token is at least one
LARGEST = 2**48  # of a count: what is computed from one still fits 64 bits
PositiveInt = Annotated[int, Field(gt=0, le=LARGEST)]
NonNegativeInt = Annotated[int, Field(ge=0, le=LARGEST)]
PositiveFloat = Annotated[float, Field(gt=0, le=1e30)]  # which a float32 still holds
Fraction = Annotated[float, Field(ge=0, le=1)]
Below1 = Annotated[float, Field(ge=0, lt=1)]
PathText = Annotated[str, Field(min_length=1), AfterValidator(expanduser)]
"""Text that may be a path; `~` is the home folder wherever one is written."""


class Section(BaseModel):
    """Strict types, unknown keys refused, the attribute docstrings become the help."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class Data(Section):
    """Where the text comes from and where its token shards lie."""

    source: Literal["embedded", "files", "datasets", "adopted"] = "embedded"
    """`embedded`: the documentation installed with the project; `files`: files or URLs; `datasets`: one on the Hub;
    `adopted`: token files that `recipes/prepare.py --adopt` took in `data.dir`, whatever their text."""
    path: PathText | list[PathText] | None = None
    """`files`: path, glob or URL (http, hf) of .txt, .jsonl (or packed) or .parquet, or a list; `datasets`: a name."""
    files: str | None = None
    """For `datasets`: a glob inside the dataset's repository that picks its files."""
    revision: str | None = None
    """For `datasets`: the commit to read; pin it, or the data may change between two nights."""
    text_column: Annotated[str, Field(min_length=1)] = "text"
    """The column or JSON field that holds the text."""
    license: str | None = None
    """The license of the text, for the manifest and the model card."""
    download_gb: Annotated[float, Field(ge=0)] | None = None
    """Size of the download in GB, said before it starts."""
    tokenizer: PathText = "openai-community/gpt2"
    """A tokenizer's Hub name or folder, or `trained`: a byte-level BPE of `model.vocab_size` trained on this text."""
    dir: PathText = "data/embedded"
    """Folder of the token shards."""
    val_tokens: Annotated[int, Field(ge=2, le=LARGEST)] = 10_485_760
    """Tokens of the fixed validation set."""
    train_tokens: PositiveInt | None = None
    """Unique training tokens; the set is cut there. Empty: all there are."""
    reserved_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """Share of the documents, by the hash of their text, that never trains: validation is taken from these."""

    @property
    def fetched_gb(self) -> float | None:
        """GB to download: nothing for text that lies here, whatever a recipe says; None where it does not say."""
        return 0.0 if self.local or self.source == "adopted" else self.download_gb

    @property
    def local(self) -> bool:
        """Whether all of its text is on this machine, so that the trainer prepares it on the way."""
        named = [self.path] if isinstance(self.path, str) else self.path or []
        return self.source == "embedded" or (self.source == "files" and not any("://" in path for path in named))


class Model(Section):
    """The shape of the GPT-2, in the names of transformers' GPT2Config."""

    n_layer: PositiveInt = 12
    """Transformer blocks."""
    n_head: PositiveInt = 6
    """Attention heads; `n_embd / n_head` is the size of one."""
    n_embd: PositiveInt = 384
    """Width of the residual stream."""
    n_positions: Annotated[int, Field(ge=2, le=LARGEST)] = 1024
    """Longest context the model can be given."""
    vocab_size: PositiveInt = 50_257
    """Tokens of the exported model; equal to the tokenizer's. In training it is padded to a multiple of 64."""
    dropout: Below1 = 0.0
    """Probability of all three of GPT-2's dropouts."""
    bias: bool = True
    """Whether the linear layers' biases are trained; otherwise they stay zero, and a step moves fewer bytes."""
    attention: Literal["auto", "flash"] = "auto"
    """`auto`: a fused kernel where the device has one for this recipe, otherwise any; `flash`: refuse any other."""


class Batch(Section):
    """How many tokens make one update, and how they are cut up."""

    tokens_per_iter: PositiveInt = 524_288
    """Tokens of one optimizer update, over all micro-batches and processes."""
    sequence_length: PositiveInt = 1024
    """Tokens of one training row."""
    micro_batch: PositiveInt | Literal["auto"] = "auto"
    """Rows that go through the model at once on one device: speed and memory, never the result."""


class Optim(Section):
    """The optimizer; the learning rate over time is the schedule's."""

    name: Literal["muon", "adamw"] = "muon"
    """`muon`: Muon on the hidden matrices, AdamW on the rest; `adamw`: AdamW on everything."""
    lr: PositiveFloat = 3e-3
    """Peak learning rate of the matrices; Muon's update is scaled to the size of AdamW's."""
    embedding_lr: PositiveFloat | None = None
    """Peak learning rate of the token embedding, which is also the head; empty: `lr`."""
    vector_lr: PositiveFloat | None = None
    """Peak learning rate of norms, biases and positions; empty: `lr`."""
    betas: Annotated[list[Below1], Field(min_length=2, max_length=2)] = [0.9, 0.95]
    """AdamW's decay rates of the first and second moment."""
    momentum: Below1 = 0.95
    """Muon's Nesterov momentum."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled weight decay of the matrices."""
    embedding_weight_decay: Annotated[float, Field(ge=0)] | None = None
    """That of the token embedding; empty: `weight_decay`."""
    vector_weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """That of norms, biases and positions."""
    grad_clip: PositiveFloat = 1.0
    """The gradient's global norm is cut to this."""


class Schedule(Section):
    """The length of the run and the learning rate along it."""

    kind: Literal["wsd", "cosine"] = "wsd"
    """`wsd`: warmup, constant, linear to zero; `cosine`: warmup, cosine to `final_lr_fraction`."""
    max_iters: PositiveInt = 20_000
    """Iterations of the run."""
    warmup_iters: NonNegativeInt = 250
    """Iterations over which the learning rate rises linearly."""
    decay_fraction: Fraction = 0.2
    """For `wsd`: the share of the run, at its end, in which the learning rate falls to zero."""
    final_lr_fraction: Fraction = 0.1
    """For `cosine`: the learning rate at the end, as a share of the peak."""
    milestones: list[PositiveInt] = []
    """For `wsd`: shorter budgets that are finished on the way, each by a decay of its own; then the run continues."""
    branches: list[PositiveInt] = []
    """For `wsd`: budgets whose branch point is kept, where the run gets there, so that `--cooldown N` finishes them."""
    hours: Annotated[float, Field(gt=0, le=10_000)] | None = None
    """For `wsd`: hours. The longest budget that fits is finished; the next night the same command continues."""


class Stop(Section):
    """When a run ends before its length."""

    when_flat: bool = False
    """For `wsd`: decay and end where training on to the next budget gains less than `min_gain_nats`, 90 % sure."""
    min_gain_nats: PositiveFloat = 0.01
    """Nats per token that the way from one budget to the next must gain; a part of the way must gain its share."""


class Validation(Section):
    """Measurements on the fixed validation set during the run."""

    every: PositiveInt = 500
    """Iterations between two validations; the last iteration is always validated."""
    prompts: list[str] = ["The mitochondria"]
    """Continued at every validation, to see the model learn: beginnings of sentences of your text's kind; may be empty.
    """
    sample_tokens: PositiveInt = 48
    """Tokens that are sampled for each prompt."""
    ngram_baselines: bool = False
    """Print the validation loss of two tables of each budget's training tokens: how often each word piece occurs
    (unigram), and how often after each other one (bigram)."""


class Checkpoint(Section):
    """The exact training state, to continue from after an interruption."""

    every: PositiveInt = 500
    """Iterations between two checkpoints."""
    every_minutes: PositiveFloat = 15.0
    """Minutes after which one is written whatever the iteration: what a power cut costs at the most."""
    keep: Annotated[int, Field(ge=2)] = 2
    """How many to keep, at least two, since the newest may be found damaged; branch points are kept beside these."""


class Logging(Section):
    """What is written down during the run."""

    every: PositiveInt = 10
    """Iterations between two lines."""
    trackers: list[Literal["tensorboard", "trackio", "wandb"]] = []
    """Accelerate trackers that get the same numbers; each needs its extra installed."""


QUICK = 500  # items a task of `recipes/eval.py --quick`


class Evaluation(Section):
    """What recipes/eval.py measures of the run's models, unless its command line says otherwise.

    With `data.tokenizer: trained` by default against `untrained` and `unigram`, on the validation set alone.
    """

    against: list[PathText] = ["openai-community/gpt2"]
    """Opponents: Hub names or folders; `untrained`, the model before its first iteration; `unigram`, a table of the
    frequencies of its training tokens (word pieces)."""
    tasks: list[str] = [
        "hellaswag", "arc_easy", "arc_challenge", "piqa", "winogrande", "openbookqa", "sciq", "lambada_openai", "blimp",
    ]  # fmt: skip
    """lm-eval's tasks and groups, and `documentation_phrases`, the project's own."""
    tasks_dir: PathText | None = None
    """A folder of further task files in lm-eval's format."""
    texts: list[PathText] = ["EleutherAI/wikitext_document_level:wikitext-2-raw-v1:test:page"]
    """Plain text beside the validation set: files, or NAME[:CONFIG[:SPLIT[:COLUMN]]] of a dataset on the Hub."""
    limit: PositiveInt | None = None
    """Only the first N items of each task: a first look, not a result."""
    at_milestones: NonNegativeInt = 0
    """Items of each task that the trainer has scored, without opponents, when it has finished a model; 0 for none."""


OWN_VOCABULARY: dict[str, list[str]] = {"against": ["untrained", "unigram"], "tasks": [], "texts": []}
"""What takes the place of an evaluation's defaults where the tokenizer is trained."""


def repository(name: str) -> str:
    """A name as the Hub takes it, with or without its owner; ValueError for any other."""
    part = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
    if (
        not re.fullmatch(rf"({part}/)?{part}", name)
        or "--" in name
        or ".." in name
        or name.endswith((".git", ".", "-"))
    ):
        raise ValueError("someone/gpt2-40m would work: letters, digits, `.`, `_`, `-`")
    return name


class Hub(Section):
    """Finished models on the Hugging Face Hub, pushed during the run."""

    repo_id: Annotated[str, AfterValidator(repository)] | None = None
    """The model repository, OWNER/NAME; made when it is missing. Empty: nothing is sent."""
    private: bool = True
    """Whether a repository that is made can be seen by its owner alone."""
    license: str = "apache-2.0"
    """Of the model, in the Hub's identifiers, for its card."""
    every_hours: PositiveFloat = 2.0
    """Hours between two pushes of the newest weights, not annealed, to the branch `checkpoints`."""
    patience_minutes: PositiveFloat = 5.0
    """Minutes after the end of a run in which what is still missing is tried again; it can be sent later too."""
    push_state: bool = False
    """Push the exact state too, to the branch `state`: `--resume hub:OWNER/NAME` continues from it anywhere."""


class Recipe(Section):
    """Everything that gives a run its meaning."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=96)] = "unnamed"
    """The run's folder under `runs/`; by default the recipe file's own name."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1337
    """Decides initial weights, the order of the data, and dropout."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """`auto`: bf16 where the CUDA device has it, otherwise float32."""
    compile: bool | Literal["auto"] = "auto"
    """torch.compile of the transformer's body; `auto`: on CUDA."""
    threads: Annotated[int, Field(gt=0, le=4096)] | Literal["auto"] = "auto"
    """CPU threads of a process; `auto`: all cores shared by the processes of this machine. Equal counts, equal bits."""
    data: Data = Data()
    model: Model = Model()
    batch: Batch = Batch()
    optim: Optim = Optim()
    schedule: Schedule = Schedule()
    stop: Stop = Stop()
    validation: Validation = Validation()
    checkpoint: Checkpoint = Checkpoint()
    logging: Logging = Logging()
    evaluation: Evaluation = Evaluation()
    hub: Hub = Hub()
    _file: Path = PrivateAttr(Path("RECIPE"))
    _overrides: tuple[str, ...] = PrivateAttr(())

    @model_validator(mode="before")
    @classmethod
    def _evaluate_in_its_own_vocabulary(cls, values: Any) -> Any:
        """A tokenizer of its own is of a text of its own: what is not given is measured without English benchmarks."""
        sections = values if isinstance(values, dict) else {}
        data, evaluation = sections.get("data"), sections.get("evaluation", {})
        if isinstance(data, dict) and data.get("tokenizer") == "trained" and isinstance(evaluation, dict):
            return values | {"evaluation": OWN_VOCABULARY | evaluation}
        return values

    @property
    def file(self) -> Path:
        """Where the recipe was read from."""
        return self._file

    def command(self, script: str) -> str:
        """The command of a script with this recipe as it was given, overrides included, quoted for a shell."""
        return script_command(script, self._file, *self._overrides)
