"""The oldest versions that pyproject.toml admits, as constraints for pip; with --installed, whether they are here.

`make test-floors` runs the tests on them.
"""

import importlib.metadata
import platform
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTED = ("gpu", "figures", "prepare", "eval", "test")
"""The extras that the tests need."""


def floors() -> Iterator[tuple[str, str]]:
    """(name, oldest version) of every direct dependency and of what the extras in `TESTED` add."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    for line in [*project["dependencies"], *(line for extra in TESTED for line in extras[extra])]:
        if not line.startswith("overnight["):
            name, version = re.fullmatch(r"([\w.-]+)(?:\[\w+\])?>=([\d.]+)", line).groups()
            yield name, version


def same(installed: str, floor: str) -> bool:
    """Whether a version is the floor: `2.11.0+cpu` is 2.11."""
    release = [int(part) for part in re.match(r"[\d.]+\d", installed)[0].split(".")]
    wanted = [int(part) for part in floor.split(".")]
    return release[: len(wanted)] == wanted and not any(release[len(wanted) :])


def main(arguments: list[str]) -> int:
    """Print the constraints; with --installed the versions that are installed, exit code 1 when one is no floor."""
    if arguments != ["--installed"]:
        print("\n".join(f"{name}=={version}" for name, version in floors()))
        return 0
    found = [(name, floor, importlib.metadata.version(name)) for name, floor in floors()]
    print(f"Python {platform.python_version()}, " + ", ".join(f"{name} {version}" for name, _, version in found))
    others = [
        f"{name} {version} is installed, {floor} is the floor"
        for name, floor, version in found
        if not same(version, floor)
    ]
    print("\n".join(others), end="\n" if others else "")
    return 1 if others else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
