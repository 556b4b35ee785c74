"""The GPU day keeps what it finds, whatever happens to a task, and sets it beside what the plan expects."""

import importlib
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from runs import ROOT
from texts import paragraphs, write_parquet

from overnight.planning.gpus import gpu_named
from overnight.planning.memory import by_formula
from overnight.planning.model_size import memory_gib
from overnight.planning.roofline import speed_of
from overnight.recipe.load import load

FOLDER = ROOT / "benchmarks" / "gpu_day"
DAY, REPORT, NIGHT = FOLDER / "day.py", FOLDER / "report.py", ROOT / "recipes" / "fineweb_edu_40m.yaml"
STEP = """
import sys
from pathlib import Path
sys.path.insert(0, {folder!r})
from day import Task, environment_of, run_step
work = Path({work!r})
tasks = [Task(name, ["-c", code], seconds, result) for name, code, seconds, result in {tasks!r}]
sys.exit(run_step("quickstart.yaml", tasks, work / "step.json", work, environment_of("cpu", work, None), {seconds}))
"""
NOTES = "from pathlib import Path; Path('found.json').write_text('[1, 2]'); print('said')"
HANGS = "import subprocess, time; print(subprocess.Popen(['sleep', '600']).pid, flush=True); time.sleep(600)"


def step(folder: Path, *tasks: tuple[str, str, float, str], seconds: float = 600) -> subprocess.Popen:
    """A step of these tasks, (name, code, limit, result) each, as a process."""
    code = STEP.format(folder=str(FOLDER), work=str(folder), tasks=tasks, seconds=seconds)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def found(folder: Path, name: str = "step") -> dict:
    return json.loads((folder / f"{name}.json").read_text())["tasks"]


def test_a_task_that_fails_or_hangs_costs_no_other_and_leaves_no_process(tmp_path):
    tasks = [
        ("fails", "import sys; print('a reason'); sys.exit(3)", 60, ""),
        ("hangs", HANGS, 3, "found.json"),
        ("notes", NOTES, 60, "found.json"),
    ]
    assert step(tmp_path, *tasks).wait() == 1
    tasks = found(tmp_path)
    assert {name: task["exit"] for name, task in tasks.items()} == {"fails": 3, "hangs": "late", "notes": 0}
    assert tasks["fails"]["output"] == "a reason\n" and "result" not in tasks["hangs"]
    assert tasks["notes"]["result"] == [1, 2] and "output" not in tasks["notes"]
    started = int(tasks["hangs"]["output"])
    assert not psutil.pid_exists(started) or psutil.Process(started).status() == psutil.STATUS_ZOMBIE
    assert "said" in (tmp_path / "step.log").read_text()


def test_a_step_that_is_killed_leaves_what_its_tasks_found(tmp_path):
    process = step(tmp_path, ("notes", NOTES, 60, "found.json"), ("hangs", HANGS, 600, ""))
    log = tmp_path / "step.log"
    while not log.exists() or "== hangs" not in log.read_text():
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert found(tmp_path)["notes"]["result"] == [1, 2]
    for child in psutil.process_iter(["cmdline"]):  # of the task that hangs
        if HANGS in (child.info["cmdline"] or []):
            os.killpg(child.pid, signal.SIGKILL)


def test_a_step_ends_in_its_time_and_says_what_was_not_run(tmp_path):
    tasks = [("hangs", HANGS, 600, ""), ("notes", NOTES, 60, "found.json")]
    assert step(tmp_path, *tasks, seconds=18).wait() == 1  # fifteen are kept for the table
    assert [task["exit"] for task in found(tmp_path).values()] == ["late", "unrun"]


def test_without_a_card_the_day_says_so_and_ends(tmp_path):
    command = [sys.executable, str(DAY), "check", "--out", str(tmp_path)]
    here = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=here, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "there is no CUDA device here; `make doctor` says what is missing" in done.stdout
    assert list(found(tmp_path, "step-check")) == ["here"]


@pytest.mark.parametrize(
    ("words", "said"),
    [(["2"], "need --text FILE"), (["1", "--text", "gone.parquet"], "there is no gone.parquet")],
)
def test_a_step_that_cannot_work_is_refused_before_it_begins(words, said, tmp_path):
    command = [sys.executable, str(DAY), *words, "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and said in done.stderr
    assert not list(tmp_path.iterdir())


def write_step(path: Path, **tasks: dict) -> Path:
    """A step's file of a 4070."""
    packages = {"torch": "2.13.0", "transformers": "5.23.0", "accelerate": "1.15.0"}
    here = {"device": "NVIDIA GeForce RTX 4070", "total_gib": 11.99, "packages": packages, "date": "2026-12-01"}
    here |= {"python": "3.12.3", "commit": None, "driver": "NVML Shared Library Not Found"}
    whole = {"here": {"exit": 0, "seconds": 1.0, "result": here}} | tasks
    path.write_text(json.dumps({"recipe": NIGHT.name, "arguments": [], "tasks": whole}))
    return path


def report(*words: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(REPORT), *map(str, words)], capture_output=True, text=True, check=False)


def test_the_predictions_are_the_plans_own(tmp_path):
    size = {"rows": 32, "fits": True, "first_seconds": 30.0, "tokens_per_second": 1e5, "graphs": 1, "graph_breaks": 0}
    size |= {"peak_gib": 7.0, "beside_gib": 0.5}
    memory = {"exit": 0, "seconds": 60.0, "result": [size]}
    train = {"kind": "train", "iteration": 1, "gib": 6.5}
    small = {"exit": 0, "seconds": 60.0, "result": {"environment": {"micro-batch": "32 rows"}, "records": [train]}}
    page = tmp_path / "gpu.md"
    shutil.copy(ROOT / "docs" / "gpu.md", page)
    probe = {"attention": "flash", "micro_batch": 32, "tokens_per_second": 1e5, "mfu": 0.5, "watts": None}
    tasks = {"probe": {"exit": 0, "seconds": 60.0, "result": probe}, "memory": memory, "small_card": small}
    done = report(write_step(tmp_path / "step-1.json", **tasks), "--page", page)
    assert done.returncode == 0, done.stderr
    recipe, gpu = load(NIGHT), gpu_named("rtx-4070")
    gib = memory_gib(recipe, 32)
    assert (
        f"| GiB at 32 rows | {gib:.2f} | 7.50, {7.5 / gib - 1:+.1%}; 0.50 of it not the allocator's |"
        in page.read_text()
    )
    speed = speed_of(recipe, gpu, by_formula(recipe, gpu).micro_batch).tokens_per_second
    assert f"| tokens a second, random tokens | {speed:,.0f} | 100,000 |" in page.read_text()
    assert f"| micro-batch on 12 GB | {by_formula(recipe, gpu).micro_batch} rows | 32 rows |" in page.read_text()
    assert (
        "GPU day has not been run" not in page.read_text()
        and "NVIDIA GeForce RTX 4070, torch 2.13.0" in page.read_text()
    )


def test_a_task_that_was_cut_off_has_the_rows_that_it_came_to_and_one_that_says_so(tmp_path):
    failed = {"exit": 1, "seconds": 9.0, "output": "Traceback\nRuntimeError: no such kernel\n"}
    records = [{"kind": "train", "iteration": i, "loss": 5.0, "tokens_per_second": 9e4} for i in range(1, 9)]
    late = {"environment": {"validation_tokens": 4096}, "records": records, "before_kill": []}
    late = {"exit": "late", "seconds": 470.0, "output": "iter 8/350\n", "result": late}
    done = report(write_step(tmp_path / "step-1.json", losses=failed, killed=late))
    assert done.returncode == 0, done.stderr
    rows = [line.split("  ")[0] for line in done.stdout.splitlines()]
    assert "losses: not whole" in rows and "1 after 9 s: RuntimeError: no such kernel" in done.stdout
    assert "tokens a second, median of the run" in rows and "90,000" in done.stdout
    assert "finished and exported" not in rows and "late after 470 s: iter 8/350" in done.stdout


def test_a_report_of_other_files_or_into_another_page_is_refused(tmp_path):
    (tmp_path / "no.json").write_text("{}")
    (tmp_path / "page.md").write_text("# A page\n")
    whole = write_step(tmp_path / "step-1.json")
    for words, said in (
        ((tmp_path / "no.json",), "not what a step"),
        ((whole, "--page", tmp_path / "page.md"), "has no"),
    ):
        done = report(*words)
        assert done.returncode == 2 and said in done.stderr
    assert (tmp_path / "page.md").read_text() == "# A page\n"


def test_the_page_says_that_nothing_was_measured_until_something_is():
    text = (ROOT / "docs" / "gpu.md").read_text()
    measured = text.partition("<!-- measured -->")[2].partition("<!-- /measured -->")[0]
    assert "has not been run on a GPU yet" in measured or "| figure | predicted | measured |" in measured


def test_iterations_made_twice_are_those_behind_the_checkpoint():
    differences = runpy.run_path(str(FOLDER / "figures.py"))["differences"]
    before = [{"kind": "train", "iteration": i, "loss": 5.0 - i} for i in (1, 2, 3, 4)]
    resumed = {"kind": "event", "event": "resumed", "iteration": 2}
    after = [*before[:2], resumed, *({"kind": "train", "iteration": i, "loss": 5.25 - i} for i in (3, 4, 5))]
    assert differences(before, after) == {3: 0.25, 4: 0.25}
    assert differences(before, before) == {}


NANOGPT = '''
"""A stand-in for nanoGPT's model.py: the same names, a model of one layer."""
import dataclasses, torch

@dataclasses.dataclass
class GPTConfig:
    n_layer: int; n_head: int; n_embd: int; vocab_size: int; block_size: int; dropout: float; bias: bool

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wte = torch.nn.Embedding(config.vocab_size, config.n_embd)

    def forward(self, ids, targets):
        logits = self.wte(ids) @ self.wte.weight.T
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def configure_optimizers(self, decay, lr, betas, device):
        print("using fused AdamW")
        return torch.optim.AdamW(self.parameters(), lr=lr, betas=betas, weight_decay=decay)
'''


@pytest.mark.slow
def test_all_of_the_day_runs_in_a_small_shape_and_fills_the_page(tmp_path):
    (tmp_path / "nano").mkdir()
    (tmp_path / "nano" / "model.py").write_text(NANOGPT)
    page = tmp_path / "gpu.md"
    shutil.copy(ROOT / "docs" / "gpu.md", page)
    words = ["1", "2", "3", "--device", "cpu", "--small", "--out", "out", "--nanogpt", "nano"]
    words += ["--text", str(write_parquet(tmp_path / "books.parquet", paragraphs()))]
    done = subprocess.run([sys.executable, str(DAY), *words], cwd=tmp_path, capture_output=True, text=True, check=False)
    logs = "".join(path.read_text() for path in sorted((tmp_path / "out").glob("*.log")))
    assert done.returncode == 0, done.stdout + done.stderr + logs[-5_000:]
    steps = [tmp_path / "out" / f"step-{name}.json" for name in "123"]
    assert report(*steps, "--page", page).returncode == 0
    for said in (
        "invariants on this device | all passed |",
        "iterations made again after SIGKILL",
        "nanogpt, a step of 1x32",
        "out of memory at 6: 4 to 2 rows",
        "evaluation in bfloat16",
    ):
        assert said in page.read_text(), said
    assert "| the run after that | finished | finished |" in page.read_text()


def test_whatever_the_short_look_runs_is_a_task_of_the_day_too(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    steps = importlib.import_module("steps")
    words = {
        name: [task.words for task in make(steps.Settings("cpu", small=True))] for name, make in steps.STEPS.items()
    }
    assert all(any(task in words[step] for step in "123") for task in words["check"])


def test_a_machine_without_nvml_has_that_noted_in_place_of_its_driver(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)  # what an import of it then raises is ImportError
    found = runpy.run_path(str(FOLDER / "here.py"))["driver"]()
    assert "nvidia-ml-py is not installed" in found
