"""Training needs what pyproject.toml's `dependencies` name and no more; what else is asked for is named in one line."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from runs import ROOT, records, slow

from overnight.core.extras import EXTRAS
from overnight.doctor import machine
from overnight.doctor.machine import canonical_name

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def with_what_they_need(requirements: list[str]) -> dict[str, importlib.metadata.Distribution]:
    """The installed distributions that `requirements` name, and those that these need in turn, by name."""
    found: dict[str, importlib.metadata.Distribution] = {}
    left = [Requirement(line) for line in requirements]
    while left:
        wanted = left.pop()
        if canonical_name(wanted.name) in found:
            continue
        distribution = importlib.metadata.distribution(wanted.name)
        found[canonical_name(wanted.name)] = distribution
        needs = map(Requirement, distribution.requires or [])
        left += [each for each in needs if each.marker is None or each.marker.evaluate({"extra": ""})]
    return found


def link_files(distribution: importlib.metadata.Distribution, place: Path) -> None:
    """Link what a distribution has installed into another environment: whole top-level folders and files."""
    tops = {path.parts[0] for path in distribution.files or [] if path.parts[0] not in ("..", "__pycache__")}
    for top in tops:
        if not (place / top).exists():
            (place / top).symlink_to(distribution.locate_file(top))


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> str:
    """The Python of an environment that holds the project, its `dependencies`, what these need, and nothing else."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder / "venv", symlinks=True)
    (place,) = (folder / "venv" / "lib").glob("python*/site-packages")
    for distribution in with_what_they_need(PROJECT["dependencies"]).values():
        link_files(distribution, place)
    (place / "overnight").symlink_to(ROOT / "src" / "overnight")
    return str(folder / "venv" / "bin" / "python")


def run(python: str, folder: Path, script: str, *arguments: str) -> subprocess.CompletedProcess:
    """A script of the project, run in `folder` by the Python of the bare environment, to its end."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests" / "no_network"), "CUDA_VISIBLE_DEVICES": ""}
    command = [python, str(ROOT / "recipes" / script), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def prepared_as_embedded(workplace: Path, folder: Path) -> None:
    """The workplace's shards, as a preparation of the embedded corpus would have left them."""
    shutil.copytree(workplace / "data", folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["source"] |= {"source": "embedded", "path": None}
    del manifest["sha256"]  # of itself
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_run_on_prepared_data_trains_resumes_and_exports_with_the_dependencies_alone(bare, workplace, tmp_path):
    prepared_as_embedded(workplace, tmp_path / "data")
    data = ("--data.source", "embedded", "--data.path", "null", "--data.dir", str(tmp_path / "data"))
    command = ("train.py", str(workplace / "tiny.yaml"), *data, "--schedule.max_iters")
    begun = run(bare, tmp_path, *command, "10")
    assert (begun.returncode, begun.stderr) == (0, "")  # no library warns of anything
    resumed = run(bare, tmp_path, *command, "20")  # a longer run continues from the trunk of the shorter one
    assert resumed.returncode == 0, resumed.stderr
    assert "runs/tiny is finished" in resumed.stdout
    assert [record["event"] for record in records(tmp_path, "tiny", "event")].count("finished") == 2
    again = json.loads((tmp_path / "runs" / "tiny" / "environment.json").read_text())
    assert again["packages"]["torch"] == importlib.metadata.version("torch")


@pytest.mark.slow
def test_a_finished_model_writes_and_a_device_is_probed_with_the_dependencies_alone(bare, workplace, undisturbed):
    written = run(bare, workplace, "sample.py", "runs/tiny/models/iter-000040", "--prompt", "The", "--tokens", "4")
    assert written.returncode == 0, written.stderr
    assert written.stdout.startswith("The")
    probed = run(bare, workplace, "plan.py", "tiny.yaml", "--probe")
    assert probed.returncode == 0, probed.stderr
    assert "20 iterations of 512 random tokens" in probed.stdout


RUN, MODEL = "runs/tiny", "runs/tiny/models/iter-000040"


@pytest.mark.parametrize(
    ("script", "arguments", "needs"),
    [
        ("prepare.py", ("tiny.yaml", "--data.dir", "elsewhere"), ("preparing data", "datatrove, pyarrow", "prepare")),
        slow(
            "plan.py",
            (str(ROOT / "recipes/fineweb_40m.yaml"), "--plot", "a.png"),
            ("`--plot`", "matplotlib", "figures"),
        ),
        slow("report.py", (RUN,), ("a curve", "matplotlib", "figures")),
        slow("publish.py", (RUN, "--repo-id", "a/b"), ("the curve on a card", "matplotlib", "figures")),
        slow("eval.py", (MODEL,), ("an evaluation", "datasets, evaluate, lm_eval, matplotlib, scipy", "eval")),
        slow("train.py", ("tiny.yaml", "--hub.repo_id", "a/b"), ("`hub.repo_id`", "matplotlib", "figures")),
        slow(
            "train.py",
            ("tiny.yaml", "--evaluation.at_milestones", "5"),
            ("`evaluation.at_milestones`", "lm_eval", "eval"),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_asked_for_and_not_installed_is_one_line_and_code_2(script, arguments, needs, bare, workplace, request):
    if arguments[0] in (RUN, MODEL):
        request.getfixturevalue("undisturbed")
    refused = run(bare, workplace, script, *arguments)
    assert refused.returncode == 2, refused.stderr
    (line,) = refused.stderr.splitlines()
    what, modules, extra = needs
    assert line.startswith(what) and modules in line and f"`pip install 'overnight[{extra}]'`" in line


def test_the_embedded_corpus_is_one_line_too_where_it_is_not_prepared(bare, tmp_path):
    refused = run(bare, tmp_path, "train.py", str(ROOT / "recipes" / "quickstart.yaml"))
    assert refused.returncode == 2, refused.stderr
    (line,) = refused.stderr.splitlines()
    assert line.startswith("`data.dir`: data/quickstart holds no prepared data; preparing it needs datatrove, pyarrow")
    assert not list(tmp_path.iterdir())


def test_every_module_that_an_extra_is_asked_for_is_brought_by_it():
    brought = importlib.metadata.packages_distributions()
    for extra, modules in EXTRAS.items():
        lines = PROJECT["optional-dependencies"][extra]
        lines += [
            each
            for line in lines
            if line == "overnight[figures]"
            for each in PROJECT["optional-dependencies"]["figures"]
        ]
        names = {canonical_name(Requirement(line).name) for line in lines}
        for module in modules:
            distributions = {
                canonical_name(name) for name in brought.get(module, [module])
            }  # trackers are not installed
            assert distributions & names, f"{module} is none of {names}"


def test_without_nvidia_ml_py_there_is_no_card_and_nothing_fails(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)  # what an import of it then raises is ImportError
    assert machine.survey().driver is None
