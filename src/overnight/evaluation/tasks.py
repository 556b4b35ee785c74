"""Which benchmarks there are, where their items come from, and which task files are not let in.

A task is a name that lm-eval knows, or a YAML file in its format in this package's `tasks` folder or the user's own.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import lm_eval.api.metrics  # fills the registry
import lm_eval.tasks
import lm_eval.utils
import numpy as np
import yaml
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES
from jinja2 import StrictUndefined
from jinja2.sandbox import SandboxedEnvironment
from lm_eval.api.registry import metric_registry
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Entry, Kind
from lm_eval.tasks._yaml_loader import _make_loader, load_yaml

from overnight.core.files import errno_of, within
from overnight.errors import InputError, first_line
from overnight.evaluation.statistics import metric_of

SAMPLE = 16  # items of a task, whose length is measured beforehand
ENGLISH_CHARACTERS_PER_TOKEN = 4.0  # about
OWN_TASKS = Path(__file__).parent / "tasks"
LM_EVAL_TASKS = Path(lm_eval.tasks.__file__).resolve().parent
DEFAULT_FOLDERS = ("arc", "blimp", "hellaswag", "lambada", "openbookqa", "piqa", "sciq", "winogrande")
SCORED = ("multiple_choice", "loglikelihood", "loglikelihood_rolling")  # by log-likelihoods alone
BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".arrow": "arrow", ".csv": "csv"}
SPLITS = {"train": "training_split", "validation": "validation_split", "test": "test_split"}


@dataclass
class Benchmark:
    """A row of the comparison: one task, or several pooled (blimp has 67)."""

    name: str
    tasks: list[Task]

    @property
    def versions(self) -> list[str]:
        """The version of each task's definition, as lm-eval numbers them, without repetition."""
        metadata = [task.config.metadata for task in self.tasks]
        return sorted({str(each.get("version", "-")) if isinstance(each, dict) else "-" for each in metadata})


def load_benchmarks(names: list[str], index: dict[str, Entry], data_dir: Path | None = None) -> list[Benchmark]:
    """The benchmarks of these names with their items; downloads what is neither in `data_dir` nor in the cache.

    Raises InputError for a kind of task that is not scored by log-likelihoods, and for items that cannot be had.
    """
    render_in_sandbox()
    with refusals(", ".join(names)):
        found = [Benchmark(name, [_build(index[leaf], data_dir) for leaf in leaves_of(name, index)]) for name in names]
    if empty := [each.name for each in found if not each.tasks]:
        raise InputError(f"`--tasks`: {empty[0]} is a group without a task")
    return found


@contextmanager
def refusals(names: str) -> Iterator[None]:
    """Make an InputError of whatever lm-eval raises at the files of these tasks; what the system refuses stays that."""
    try:
        yield
    except (InputError, OSError):
        raise
    except Exception as error:  # KeyError, TypeError, RecursionError: what a file may lack, nobody has listed
        raise InputError(f"`--tasks`: {names} cannot be used ({type(error).__name__}: {first_line(error)})") from error


def render_in_sandbox() -> None:
    """Have lm-eval render the templates of task files in a sandbox; in its own a template can reach any object."""
    sandbox = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    sandbox.filters["regex_replace"] = lm_eval.utils.regex_replace
    lm_eval.utils.env = sandbox


def index_of(names: list[str], tasks_dir: Path | None = None, *, trust: bool = False) -> dict[str, Entry]:
    """lm-eval's index with at least these names in it; all of lm-eval is read only where the usual folders lack one.

    Raises InputError for unknown names, and for files in `tasks_dir` that would run code and are not trusted.
    """
    if tasks_dir is not None:
        check_task_files(tasks_dir, trust=trust)
    own = [str(OWN_TASKS), *([str(tasks_dir)] if tasks_dir else [])]
    usual = [str(LM_EVAL_TASKS / folder) for folder in DEFAULT_FOLDERS]
    with refusals(", ".join([*names, *([f"with the files in {tasks_dir}"] if tasks_dir else [])])):
        index = TaskManager(include_path=[*usual, *own], include_defaults=False).task_index
        if any(name not in index for name in names):
            index = TaskManager(include_path=own).task_index
    unknown = [name for name in names if name not in index]
    if unknown:
        raise InputError([f"`--tasks`: there is no task {name}{nearest(name, index)}" for name in unknown])
    return index


def nearest(name: str, known: Any) -> str:
    """'; did you mean ...?' with the names that are most like it, or nothing."""
    close = difflib.get_close_matches(name, list(known), 3)
    return f"; did you mean {' or '.join(close)}?" if close else "; `lm_eval ls tasks` lists lm-eval's"


def leaves_of(name: str, index: dict[str, Entry]) -> list[str]:
    """The tasks that a name stands for: itself, or the members of a group or tag."""
    entry = index[name]
    if entry.kind is Kind.TAG:
        return sorted(entry.tags)
    if entry.kind is not Kind.GROUP:
        return [name]
    members = (entry.cfg or {})["task"]
    names = [member if isinstance(member, str) else member.get("task", member.get("group")) for member in members]
    return [leaf for each in names for leaf in leaves_of(each, index)]


def _build(entry: Entry, data_dir: Path | None) -> Task:
    if entry.yaml_path is None or entry.kind is not Kind.TASK:
        raise InputError(f"`--tasks`: {entry.name} is defined in Python; a task that a YAML file defines works")
    config = load_yaml(entry.yaml_path)
    for key in ("tag", "group", "task_list"):
        config.pop(key, None)
    if config.get("output_type") not in SCORED:
        raise InputError(
            f"`--tasks`: {entry.name} is of the type {config.get('output_type')}; what is scored by log-likelihoods "
            f"({', '.join(SCORED)}) works"
        )
    if config.get("dataset_path") in _PACKAGED_DATASETS_MODULES:
        files = config["dataset_kwargs"]["data_files"]  # they lie beside the task's file
        beside = {split: str(within(entry.yaml_path, str(name))) for split, name in files.items()}
        config["dataset_kwargs"] = {"data_files": beside}
    elif data_dir is not None:
        config |= local_data(entry.name, config, data_dir)
    try:
        return ConfigurableTask(config=config)
    except Exception as error:  # the Hub client, its transport and the builders share no base class
        if errno_of(error) not in (None, errno.ENOENT):
            raise
        said = f"{type(error).__name__}: {first_line(error)}"
        if not _of_the_hub(error) or data_dir or config.get("dataset_path") in BUILDERS.values():
            raise InputError(f"`--tasks`: {entry.name}, {entry.yaml_path}, cannot be used ({said})") from error
        raise InputError(
            f"`--tasks`: the items of {entry.name} cannot be read from {config.get('dataset_path')} on the Hub: {said}."
            " Without the Hub, `--data-dir DIR` reads them from DIR (docs/operations.md says how it is laid out)"
        ) from error


def _of_the_hub(error: Exception) -> bool:
    """Whether an error is about reading a dataset, and not about what its task makes of it."""
    library = type(error).__module__.partition(".")[0]
    return isinstance(error, OSError) or library in ("datasets", "huggingface_hub", "httpx", "httpcore", "fsspec")


def local_data(task: str, config: dict[str, Any], data_dir: Path) -> dict[str, Any]:
    """What of a task's configuration changes for its items to be read below `data_dir`.

    They lie as in the dataset's repository: `<data_dir>/<dataset path>/[<config>/]<split>*.parquet` (or .jsonl, .json,
    .arrow, .csv), the owner's name left out at will, a folder `data` for the config as well. Raises InputError when a
    split that the task reads is not there.
    """
    path, name = str(config["dataset_path"]), config.get("dataset_name")
    homes = [data_dir / path, data_dir / path.split("/")[-1]]
    folders = [home / part for home in homes for part in (str(name or "none"), "data", ".")]
    wanted = config.get("test_split") or config.get("validation_split")
    for folder in folders:
        found = {split: files_of(folder, split) for split in SPLITS}
        if found.get(str(wanted)):
            kind = found[str(wanted)][0].suffix
            files = {split: [str(file) for file in each] for split, each in found.items() if each}
            unread = {key: None for split, key in SPLITS.items() if split not in files and config.get(key) == split}
            return unread | {
                "dataset_path": BUILDERS[kind],
                "dataset_name": None,
                "dataset_kwargs": {"data_files": files},
            }
    tried = ", ".join(dict.fromkeys(str(folder) for folder in folders))
    raise InputError(f"`--data-dir`: no {wanted} split of {task} ({path}, {name}); looked in {tried}")


def files_of(folder: Path, split: str) -> list[Path]:
    """The data files of a split: `<split>*.<format>`, or all in a folder of its name."""
    files = [*folder.glob(f"{split}*"), *folder.glob(f"{split}/*")]
    return sorted(file for file in files if file.suffix in BUILDERS and file.is_file())


def download_bytes(names: list[str], index: dict[str, Entry]) -> dict[str, int | None]:
    """What each dataset of these tasks downloads in bytes, by name, as its card says; None where it does not."""
    found: dict[str, int | None] = {}
    for leaf in [leaf for name in names for leaf in leaves_of(name, index)]:
        config = load_yaml(index[leaf].yaml_path or "", resolve_func=False)
        path, name = str(config.get("dataset_path")), config.get("dataset_name")
        if path in BUILDERS.values():
            continue
        try:
            size = datasets.load_dataset_builder(path, name).info.download_size
        except Exception:  # no network, or no such card: it is then said by the download itself
            size = None
        found[f"{path} {name or ''}".strip()] = size
    return found


def check_task_files(folder: Path, *, trust: bool) -> None:
    """Raise InputError for task files that would run code from this folder, unless they are trusted.

    Code runs through `!function`, through `class`, and through a metric that lm-eval does not have and would fetch.
    Templates are rendered in a sandbox whether trusted or not.
    """
    if not folder.is_dir():
        raise InputError(f"`--tasks-dir` is {folder}: there is no such folder")
    if trust:
        return
    problems = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and (path.suffix in (".yaml", ".yml") or not path.suffix):
            problems += [f"{path}: {reason}" for reason in _code_in(path)]
    if problems:
        raise InputError([*problems, f"`--trust-tasks` runs what stands in {folder}; read it before you trust it"])


def _code_in(path: Path, seen: frozenset[Path] = frozenset()) -> list[str]:
    """Why a task file, or one that it includes, would run code; what cannot be read may be code, too."""
    try:
        loader = _make_loader(path.parent, resolve_funcs=False)(path.read_bytes())  # lm-eval's own, of the same bytes
        nodes = list(_entries(loader.get_single_node()))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, OSError) as error:
        return [f"it cannot be read ({first_line(error)})"]
    reasons = []
    for key, node in nodes:
        value = node.value
        if not node.tag.startswith("tag:yaml.org,2002:") or "python" in node.tag:
            reasons.append(f"`{node.tag} {value}` is code")
        elif key == "class":
            reasons.append(f"`class: {value}` is code")
        elif key == "hf_evaluate" and value != "false":
            reasons.append("`hf_evaluate` fetches code")
        elif key == "metric" and isinstance(value, str) and value not in metric_registry:
            reasons.append(f"the metric `{value}` is not lm-eval's own, which would fetch code of that name")
        elif key == "include" and isinstance(value, str):
            included = path.parent / value
            of_lm_eval = included.resolve().is_relative_to(LM_EVAL_TASKS)
            reasons += [] if included in seen or of_lm_eval else _code_in(included, seen | {path})
    return reasons


def _entries(node: yaml.Node | None, key: str = "") -> Iterator[tuple[str, yaml.Node]]:
    """Every node below `node`, with the key that it is the value of, or an element of the value."""
    if node is None:
        return
    yield key, node
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            yield from _entries(name)
            yield from _entries(value, str(name.value))
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _entries(value, key)


def tokens_of(benchmark: Benchmark, limit: int | None) -> float:
    """About how many tokens a benchmark sends through a model, from the length of its first items."""
    total = 0.0
    for task in benchmark.tasks:
        items = min(len(task.eval_docs), limit or len(task.eval_docs))
        task.build_all_requests(limit=min(SAMPLE, items))
        texts = {(instance.doc_id, text) for instance in task.instances for text in instance.args}
        total += sum(len(text) for _, text in texts) / ENGLISH_CHARACTERS_PER_TOKEN * items / min(SAMPLE, items)
    return total


def summary(benchmark: Benchmark, items: list[dict[str, Any]], cut: int) -> dict[str, Any]:
    """Scores of a benchmark by lm-eval's own aggregation, over the items of all its tasks pooled.

    `lm-eval` are its own figures, which differ where there are ties.
    """
    aggregate = benchmark.tasks[0].aggregation()
    ours, theirs = (
        {metric: float(aggregate[metric]([item[whose][metric] for item in items])) for metric in items[0]["metrics"]}
        for whose in ("metrics", "lm-eval")
    )
    choices = [len(item["loglikelihoods"]) for item in items]
    return {
        "items": len(items),
        "metric": metric_of(benchmark.name),
        "metrics": ours,
        "ties": sum(item["tied"] for item in items),
        "lm-eval": theirs,
        "chance": float(np.mean([1 / number if number > 1 else 0.0 for number in choices])),
        "cut to the context": cut,
        "versions": benchmark.versions,
    }
