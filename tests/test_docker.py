"""The Dockerfile without a container engine: its paths exist, and its entry point starts as an unprivileged user."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from runs import make_workplace

NOBODY = 65534


def instructions(root: Path) -> list[tuple[str, str]]:
    """The Dockerfile as (instruction, arguments), continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (root / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]


def entry_point(root: Path) -> list[str]:
    """The image's entry point with this Python; without tini where this machine has none."""
    command = json.loads(dict(instructions(root))["ENTRYPOINT"])
    if command[:2] == ["tini", "--"] and shutil.which("tini") is None:
        command = command[2:]
    return [sys.executable if word == "python" else word for word in command]


def environment(root: Path) -> dict[str, str]:
    """What ENV sets."""
    return dict(pair.split("=", 1) for pair in dict(instructions(root))["ENV"].split())


def laid_out_like_the_image(root: Path, image: Path) -> None:
    """Do the COPY and the mkdir lines of the Dockerfile in the folder `image`."""
    for instruction, arguments in instructions(root):
        if instruction == "COPY":
            *sources, target = arguments.split()
            for source in sources:
                destination = image / target / (Path(source).name if target.endswith("/") else "")
                destination.parent.mkdir(parents=True, exist_ok=True)
                if (root / source).is_dir():
                    skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
                    shutil.copytree(root / source, destination, dirs_exist_ok=True, ignore=skip)
                else:
                    shutil.copy(root / source, destination)
    for folder in ("data", "runs", "cache"):
        (image / folder).mkdir()
        (image / folder).chmod(0o1777)


@pytest.fixture
def image(root: Path):
    """A folder like the image's /overnight that every user may enter (pytest's own folders are private)."""
    folder = Path(tempfile.mkdtemp(prefix="overnight-image-"))
    folder.chmod(0o755)
    laid_out_like_the_image(root, folder)
    yield folder
    shutil.rmtree(folder)


def unprivileged() -> dict:
    """subprocess arguments of a user without rights, where root runs the tests and that user may run this Python."""
    if os.getuid() != 0:
        return {}
    chosen = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
    try:
        tried = subprocess.run([sys.executable, "-c", ""], capture_output=True, check=False, **chosen)
    except PermissionError:  # the environment lies in a private folder
        return {}
    return chosen if tried.returncode == 0 else {}


def test_every_copied_path_is_in_the_project(root: Path):
    ignored = {line.rstrip("/") for line in (root / ".dockerignore").read_text().splitlines()}
    sources = [word for name, rest in instructions(root) if name == "COPY" for word in rest.split()[:-1]]
    assert sources
    for source in sources:
        assert (root / source).exists(), source
        assert source not in ignored, source


def test_every_cache_lies_on_the_volume(root: Path):
    volume = dict(instructions(root))["VOLUME"]
    for name in ("HOME", "HF_HOME", "XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        assert environment(root)[name].startswith(volume), name


def test_the_entry_point_starts_as_a_user_without_rights(root: Path, image: Path):
    caches = {name: value.replace("/cache", f"{image}/cache") for name, value in environment(root).items()}
    path = os.pathsep.join([str(image / "src"), os.environ["PYTHONPATH"]])
    child = subprocess.run(
        [*entry_point(root), "--help"],
        cwd=image,
        env={"PATH": os.environ["PATH"], **caches, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
        **unprivileged(),
    )
    assert child.returncode == 0, child.stderr
    assert "--schedule.max_iters" in child.stdout


@pytest.mark.slow
def test_sigterm_reaches_the_trainer_behind_the_entry_point(root: Path, image: Path):
    make_workplace(image)
    caches = {name: value.replace("/cache", f"{image}/cache") for name, value in environment(root).items()}
    path = os.pathsep.join([str(image / "src"), os.environ["PYTHONPATH"]])
    process = subprocess.Popen(
        [*entry_point(root), "tiny.yaml", "--schedule.max_iters", "2000"],
        cwd=image,
        env={"PATH": os.environ["PATH"], **caches, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **unprivileged(),
    )
    for line in process.stdout:
        if line.startswith("iter    5/2000"):
            process.terminate()
            break
    rest = process.stdout.read()
    assert process.wait() == 75, rest
    assert "\ninterrupted after iteration" in rest
