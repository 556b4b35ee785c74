"""Command lines that the project writes down or starts, and whether the script that they name would take them."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

from overnight.__main__ import MODULES
from overnight.core.scripts import RECIPES, recipe_file
from overnight.errors import InputError
from overnight.recipe.load import load

ROOT = Path(__file__).resolve().parents[1]
TOPOLOGIES = ROOT / "recipes" / "accelerate_configs" / "README.md"
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "recipes/README.md")]
PAGES += [*sorted((ROOT / "docs").glob("*.md")), TOPOLOGIES]
OURS = ("recipes/", "benchmarks/", "tests/")
INTERPRETERS = ("python", "python3", sys.executable)


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language, with a list's indentation taken away."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{indent}", "", text, flags=re.MULTILINE) for indent, text in found]


def inline(page: Path) -> list[str]:
    """The commands that stand inside a sentence or a table."""
    quoted = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", page.read_text(encoding="utf-8"))
    begins = r"make \S|python3? (-m overnight|\w+/\w)|accelerate launch recipes/|overnight \w"
    return [text for text in quoted if re.match(begins, text)]


def split(text: str) -> list[list[str]]:
    """The commands of a shell's lines, as words; comments and line continuations resolved."""
    parts = [part for line in text.replace("\\\n", " ").splitlines() for part in line.split(" && ")]
    return [words for part in parts if (words := shlex.split(part, comments=True))]


def of_documents() -> list[list[str]]:
    """Every command of the documentation, and of the comments in the Dockerfile, once."""
    texts = [text for page in PAGES for text in [*blocks(page, "sh"), *inline(page)]]
    comments = re.findall(r"^#   (.*)$", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    words = [words for text in [*texts, "\n".join(comments)] for words in split(text)]
    return [list(command) for command in dict.fromkeys(map(tuple, words))]


def targets() -> list[str]:
    """The targets of the Makefile."""
    listed = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    return " ".join(listed).split()


def of_make(*words: str) -> list[list[str]]:
    """What `make WORDS` starts of ours; the loop of `bench` unrolled."""
    make = ["make", "-n", "--no-print-directory", *words, "RUN=python"]
    outer = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKEOVERRIDES")}
    said = subprocess.run(make, cwd=ROOT, env=outer, capture_output=True, text=True, check=True).stdout.replace(
        "\\\n", " "
    )
    loop = re.search(r"for words in (.*?); do", said)
    texts = [f"python benchmarks/{words}" for words in shlex.split(loop[1])] if loop else []
    texts += re.findall(r"^(?:exec )?(python .*)$", said, re.MULTILINE)
    return [words for words in map(shlex.split, texts) if ours(words)]


def started_by(function: Callable[[], object]) -> list[str]:
    """The words of the process that `function` would start first; nothing is started."""

    class Begun(Exception):
        pass

    def begin(command: list[str], *_: object, **__: object) -> None:
        raise Begun(*command)

    try:
        with patch.object(subprocess, "Popen", begin):
            function()
    except Begun as begun:
        return list(begun.args)
    raise AssertionError("it starts nothing")


def ours(words: list[str]) -> list[str] | None:
    """The words from our script or module on, whatever launches it; None where a command is none of ours."""
    if words[:2] == ["docker", "run"]:
        return in_container(words)
    if words[:3] == ["srun", "bash", "-c"]:
        return ours(shlex.split(words[3]))
    if words[0] == "nice":
        return ours(words[1:])
    if words[:2] == ["accelerate", "launch"]:
        return launched(words[2:])
    if words[0] == "overnight":
        return in_command(words[1:])
    if words[0] == "torchrun":
        return words[next(at for at, word in enumerate(words) if word.endswith(".py")) :]
    if words[0] not in INTERPRETERS:
        return None
    given = words[3:] if words[1:2] == ["-W"] else words[1:]
    if given[:2] == ["-m", "accelerate.commands.launch"]:
        return launched(given[2:])
    if given[:2] == ["-m", "overnight.core.processes"]:  # and the process that it is tied to
        return ours(given[3:])
    module = given[0] == "-m" and given[1].partition(".")[0] in ("overnight", "pytest")
    script = given[0].removeprefix(f"{ROOT}/").startswith(OURS)
    return given if module or script else None


def launched(given: list[str]) -> list[str]:
    """What accelerate's launcher would run, by its own parser."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    options, _, _ = _validate_launch_command(launch_command_parser().parse_args(given))
    return [options.training_script, *options.training_script_args]


def in_command(given: list[str]) -> list[str]:
    """The script or module that a part of the command `overnight` is."""
    part, *rest = given
    return ["-m", MODULES[part][0], *rest] if part in MODULES else [f"recipes/{part}.py", *rest]


def in_container(words: list[str]) -> list[str] | None:
    """What the image would run: our trainer, or what --entrypoint names."""
    given = words[words.index("overnight") + 1 :]
    entry = words[words.index("--entrypoint") + 1] if "--entrypoint" in words else "trainer"
    return ["recipes/train.py", *given] if entry == "trainer" else ours([entry, *given])


class Parsed(BaseException):
    """A command line was parsed: what was known of it, and the rest."""


def take(words: list[str]) -> None:
    """Raise AssertionError unless the script or module takes these words; it is ended when it has parsed them."""
    known = argparse.ArgumentParser.parse_known_args

    def parse_some(parser: argparse.ArgumentParser, given: list[str] | None = None, space: object = None) -> None:
        raise Parsed(*known(parser, given, space))

    def parse_all(parser: argparse.ArgumentParser, given: list[str] | None = None, space: object = None) -> None:
        found, rest = known(parser, given, space)
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        raise Parsed(found, [])

    script, given = ROOT / words[0], words[1:]
    if words[0] == "-m":
        found = importlib.util.find_spec(words[1])
        assert found and found.origin, f"there is no module {words[1]}"
        script, given = Path(found.origin), words[2:]
        script = script.with_name("__main__.py") if script.name == "__init__.py" else script
    before = set(sys.modules)
    with (
        patch.object(argparse.ArgumentParser, "parse_known_args", parse_some),
        patch.object(argparse.ArgumentParser, "parse_args", parse_all),
        patch.object(sys, "argv", [str(script), *given]),
        patch.object(sys, "path", [str(script.parent), *sys.path]),
    ):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except Parsed as parsed:
            take_recipe(given, parsed.args[1])
        except SystemExit as end:
            if end.code not in (None, 0, 1):  # 1: a doctor, which finds something on this machine
                raise AssertionError(f"{' '.join(words)} is refused") from None
        else:
            raise AssertionError(f"{words[0]} parses no command line")
        finally:
            for name in set(sys.modules) - before:  # the scripts beside it, whose names others have too
                if (getattr(sys.modules[name], "__file__", None) or "").startswith(f"{ROOT}/benchmarks"):
                    del sys.modules[name]


def take_recipe(given: list[str], overrides: list[str]) -> None:
    """Load the recipe that a command line begins with under its overrides."""
    if given and (given[0].endswith(".yaml") or (RECIPES / f"{given[0]}.yaml").exists()):
        try:
            load(recipe_file(given[0]), overrides)
        except InputError as error:
            raise AssertionError(f"{' '.join(given)}: {error}") from None
    else:
        assert not overrides, f"{overrides} without a recipe"
