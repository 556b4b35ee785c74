"""What the GPU day runs: the tasks of its three steps and of `make gpu-check`, each a command line with a time limit.

Nothing here needs an installed package. Paths of results are relative to the folder that a step works in.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
DAY, BENCHMARKS, RECIPES = ROOT / "benchmarks" / "gpu_day", ROOT / "benchmarks", ROOT / "recipes"
INVARIANTS = ("test_one_function.py", "test_one_loss.py", "test_one_graph.py", "test_night_shape.py")
SMALL: dict[str, object] = {"compile": False, "model.n_layer": 1, "model.n_head": 2, "model.n_embd": 32}
SMALL |= {"model.n_positions": 64, "model.vocab_size": 512, "batch.sequence_length": 64, "batch.tokens_per_iter": 512}
"""What the quickstart has otherwise where only the way is tried, not the device."""
EMULATED_GIB = 11.5  # what a 12 GB card has free before a process opens it


@dataclass(frozen=True)
class Settings:
    """What the command line decides."""

    device: str  # "cpu" or "cuda"
    small: bool  # the quickstart, made smaller, in place of the night, and nothing of it compiled
    text: tuple[Path, ...] = ()  # parquet files; without any the embedded corpus
    nanogpt: Path | None = None  # a folder with nanoGPT's model.py
    iterations: int | None = None  # of the long run

    @property
    def recipe(self) -> Path:
        """The recipe that is measured."""
        return RECIPES / ("quickstart.yaml" if self.small else "fineweb_edu_40m.yaml")

    @property
    def long_run(self) -> int:
        """Iterations of step 2."""
        return self.iterations or (12 if self.small else 350)


class Task(NamedTuple):
    """One process: the words after `python`, its limit in seconds, and the file or run folder that it leaves."""

    name: str
    words: list[str]
    seconds: float
    result: str = ""


def here(settings: Settings) -> Task:
    return Task("here", [str(DAY / "here.py"), "--device", settings.device, "--json", "here.json"], 60, "here.json")


def invariants(settings: Settings) -> Task:
    chosen = INVARIANTS[:1] if settings.small else INVARIANTS
    files = [str(ROOT / "tests" / "invariants" / name) for name in chosen]
    return Task("invariants", ["-m", "pytest", "-q", *files, "--device", settings.device], 120)


def probe(settings: Settings) -> Task:
    words = [str(RECIPES / "plan.py"), str(settings.recipe), "--probe", "--probe-file", "probe.json"]
    words += overrides(SMALL | {"batch.micro_batch": 2}) if settings.small else []
    return Task("probe", words, 160, "probe.json")


def memory(settings: Settings) -> Task:
    rows = ["2", "4"] if settings.small else ["8", "16", "32", "64"]
    words = [str(DAY / "rows.py"), str(settings.recipe), "--rows", ",".join(rows), "--json", "rows.json"]
    words += overrides(SMALL) if settings.small else []
    return Task("memory", words, 150, "rows.json")


def parts(settings: Settings) -> Task:
    shape = ["--rows", "1", "--layers", "1", "--length", "16", "--side", "64"] if settings.small else ["--rows", "32"]
    words = [str(DAY / "parts.py"), "--device", settings.device, *shape, "--json", "parts.json"]
    return Task("parts", words, 140, "parts.json")


def losses(settings: Settings) -> Task:
    shape = ["--rows", "256", "--vocabulary", "1024", "--width", "64", "--rounds", "1"] if settings.small else []
    dtype = ["--device", settings.device, "--dtype", "bfloat16"]
    return Task("losses", ["-W", "ignore", str(BENCHMARKS / "loss.py"), *dtype, *shape], 100)


def training_step(settings: Settings) -> Task:
    shape = ["--pairs", "1", "--steps", "1", "--layers", "1", "--width", "64", "--shape", "1x32"]
    words = ["-W", "ignore", str(BENCHMARKS / "training_step.py"), "--device", settings.device]
    words += shape if settings.small else []
    words += ["--nanogpt", str(settings.nanogpt.resolve())] if settings.nanogpt else []
    return Task("training_step", [*words, "--json", "training_step.json"], 220, "training_step.json")


def tokenizer(settings: Settings) -> list[Task]:
    """GPT-2's, in a folder; the small shape trains its own."""
    return [] if settings.small else [Task("tokenizer", [str(BENCHMARKS / "gpt2_tokenizer.py"), "tokenizer"], 40)]


def overrides(changes: dict[str, object]) -> list[str]:
    """The words of a command line that change a recipe's keys."""
    return [word for key, value in changes.items() for word in (f"--{key}", json.dumps(value))]


def text_at_hand(settings: Settings) -> list[str]:
    """The overrides that put it in the place of the recipe's text, with a tokenizer that needs no network."""
    changes: dict[str, object] = {
        "data.source": "files" if settings.text else "embedded",
        "data.path": [str(path.resolve()) for path in settings.text] or None,
        "data.tokenizer": "trained" if settings.small else "tokenizer",
        "data.dir": "data",
        "data.val_tokens": 2_048 if settings.small else 1_048_576,
        "data.reserved_fraction": 0.05 if settings.small else 0.08,
    }
    unused = ("files", "revision", "license", "download_gb", "train_tokens")
    return overrides(changes | {f"data.{key}": None for key in unused})


def prepare(settings: Settings) -> Task:
    words = [str(RECIPES / "prepare.py"), str(settings.recipe), *text_at_hand(settings)]
    words += overrides(SMALL) if settings.small else []
    return Task("prepare", words, 100, "data/manifest.json")


def run_of(settings: Settings, name: str, iterations: int, every: int) -> list[str]:
    """A recipe with overrides: a run of that length which validates and saves every so many iterations."""
    changes: dict[str, object] = {
        "name": name,
        "schedule.max_iters": iterations,
        "schedule.warmup_iters": iterations // 8,
        "schedule.branches": [],
        "validation.every": every,
        "checkpoint.every": every,
        "logging.every": 1,
    }
    if settings.small:
        changes |= SMALL | {"validation.ngram_baselines": False, "validation.sample_tokens": 4}
    return [str(settings.recipe), *text_at_hand(settings), *overrides(changes)]


def killed(settings: Settings) -> Task:
    every = settings.long_run // (4 if settings.small else 7)
    words = [str(DAY / "killed.py"), *run_of(settings, "killed", settings.long_run, every)]
    words += [] if settings.small else ["--batch.micro_batch", "64"]
    return Task("killed", [*words, "--saved", str(2 * every)], 470, "runs/killed")


def crowded(settings: Settings, name: str, *how: str) -> Task:
    """A run of twelve iterations on a card that others fill."""
    words = [str(DAY / "crowded.py"), *run_of(settings, name, 12, 4), *how]
    return Task(name, words, 150, f"runs/{name}")


def small_card(settings: Settings) -> Task:
    return crowded(settings, "small_card", "--leave", str(EMULATED_GIB))


def exhausted(settings: Settings) -> Task:
    rows = "4" if settings.small else "32"
    return crowded(settings, "exhausted", "--batch.micro_batch", rows, "--in-iteration", "6", "--in-validation", "3")


def evaluation(settings: Settings, dtype: str) -> Task:
    out = f"evaluation-{dtype}"
    words = [str(RECIPES / "eval.py"), "runs/small_card/models/iter-000012", "--against", "none", "--texts", "none"]
    words += ["--tasks", "documentation_phrases", "--dtype", dtype, "--out", out]
    return Task(f"evaluation_{dtype}", words, 60, f"{out}/results.json")


def step_1(settings: Settings) -> list[Task]:
    """What is there, whether it computes what it should, and what each part of a step takes."""
    return [make(settings) for make in (here, invariants, probe, memory, losses, parts)]


def step_2(settings: Settings) -> list[Task]:
    """Real text from files to a finished model, through a kill."""
    return [here(settings), *tokenizer(settings), prepare(settings), killed(settings)]


def step_3(settings: Settings) -> list[Task]:
    """A card that is too small or full, ours beside others, and the evaluation."""
    data = [here(settings), *tokenizer(settings), prepare(settings)]
    runs = [small_card(settings), exhausted(settings), training_step(settings)]
    return [*data, *runs, *(evaluation(settings, dtype) for dtype in ("float32", "bfloat16"))]


def check(settings: Settings) -> list[Task]:
    """What a user can do in minutes, and attach to an issue."""
    return [make(settings) for make in (here, invariants, probe, training_step)]


STEPS: dict[str, Callable[[Settings], list[Task]]] = {"1": step_1, "2": step_2, "3": step_3, "check": check}
