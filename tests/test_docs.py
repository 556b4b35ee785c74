"""The documentation is true: its commands work, its links lead somewhere, its keys and figures are the code's."""

import re
import subprocess
import sys

import pytest
from command_lines import PAGES, ROOT, blocks, of_documents

from overnight import errors
from overnight.planning.model_size import parameter_count
from overnight.recipe.load import leaves, load

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
REAL_RUNS = 4  # each takes seconds; every further command is checked in this process
LAUNCH = ["accelerate", "launch"]


def is_script(command: list[str], *names: str) -> bool:
    """Whether a command runs one of these scripts, directly or through accelerate's launcher."""
    started = command[:2] == LAUNCH or (command[0] == "python" and command[1].startswith("recipes/"))
    return started and any(f"recipes/{name}.py" in command for name in names)


SCRIPTS = [command for command in of_documents() if is_script(command, "train", "prepare", "plan")]


def arguments_of(command: list[str]) -> tuple[list[str], list[str]]:
    """The words of a command up to its script, and those after it without --dry-run."""
    script = next(at for at, word in enumerate(command) if word.startswith("recipes/") and word.endswith(".py"))
    return command[: script + 1], [word for word in command[script + 1 :] if word != "--dry-run"]


def real_runs() -> list:
    """The first command of every way to start a script; several GPUs are not at hand. One in `make test`, all later."""
    chosen = {}
    for command in SCRIPTS:
        started, given = arguments_of(command)
        if not any("multi_" in word for word in started) and given and given != ["--help"]:
            chosen.setdefault(" ".join(started), command)
    runs = list(chosen.values())[:REAL_RUNS]
    return [pytest.param(run, marks=[pytest.mark.slow] * (number > 0)) for number, run in enumerate(runs)]


def test_there_are_commands_to_check():
    assert SCRIPTS and len(real_runs()) > 2


@pytest.mark.parametrize("command", real_runs())
def test_the_command_runs_dry_and_writes_nothing(command, tmp_path):
    started, given = arguments_of(command)
    words = [str(ROOT / word) if (ROOT / word).is_file() else word for word in [*started, *given, "--dry-run"]]
    words = [sys.executable, "-m", "accelerate.commands.launch", *words[2:]] if words[:2] == LAUNCH else words
    words[0] = sys.executable
    result = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
    assert not list(tmp_path.iterdir())


def test_every_key_that_is_named_is_a_key():
    known = {key for key, _ in leaves()}
    sections = "|".join(sorted({key.split(".")[0] for key in known if "." in key}))
    for page in PAGES:
        quoted = " ".join(re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8")))
        for key in re.findall(rf"(?<![\w/.])(?:{sections})\.[a-z_]+", quoted):
            assert key in known or key.endswith((".py", ".safetensors")), f"{page.name}: {key}"


def anchor(heading: str) -> str:
    """A heading's anchor as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading(page):
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, heading = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in map(anchor, headings), target


def tree() -> dict[str, str]:
    """The folders of the README's annotated tree, its last block, and the file of each to open first."""
    folders: list[str] = []
    first = {}
    for line in blocks(ROOT / "README.md", "text")[-1].splitlines():
        depth = (len(line) - len(line.lstrip())) // 4
        folders[depth:] = [line.split()[0]]
        first["".join(folders)] = re.search(r"open ([\w.]+)", line)[1]
    return first


def test_the_tree_names_every_folder_and_a_file_of_it_to_open_first():
    named = tree()
    assert not [f"{folder}{file}" for folder, file in named.items() if not (ROOT / folder / file).is_file()]
    package = [path for path in (ROOT / "src" / "overnight").iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert {f"src/overnight/{path.name}/" for path in package} <= set(named)


def test_the_readme_is_short_and_leads_to_every_page():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 180
    assert all(f"]({page.relative_to(ROOT)})" in readme for page in PAGES if page.parent.name == "docs")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_table_of_recipes_has_the_recipes_own_numbers(path):
    recipe = load(path)
    table = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    row = next(line for line in table.splitlines() if line.startswith(f"| [{path.name}]"))
    tokens = recipe.schedule.max_iters * recipe.batch.tokens_per_iter
    assert f"{parameter_count(recipe.model, recipe.model.vocab_size):,} " in row
    assert f"{recipe.schedule.max_iters:,} iterations" in row
    assert (f"{tokens / 1e9:.2f}B" if tokens > 1e9 else f"{tokens / 1e6:.1f}M") in row


def test_the_predicted_losses_are_those_of_the_law_that_is_shown(capsys):
    log = ROOT / "docs" / "log.md"
    (law,) = blocks(log, "python")
    exec(law, {})
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    for iterations, edu, fineweb in printed:
        assert f"| {iterations} | {edu} | {fineweb} |" in log.read_text(encoding="utf-8")
    edu_losses = " / ".join(edu for iterations, edu, _ in printed if iterations != "8,000")
    assert f"| {edu_losses}, standard error" in (ROOT / "docs" / "status.md").read_text(encoding="utf-8")
    assert f"| {printed[-1][1]}, 90 % interval" in (ROOT / "README.md").read_text(encoding="utf-8")
    table = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    assert f"{printed[-1][1]} on FineWeb-Edu, predicted" in table and f"{printed[-1][2]} on FineWeb, predicted" in table


def test_the_exit_codes_are_those_of_the_code():
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    table = page.partition("\n## Exit codes")[2].partition("\n## ")[0]
    codes = {errors.EXIT_INPUT, errors.EXIT_DAMAGED, errors.EXIT_DIVERGED, errors.EXIT_INTERRUPTED}
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)} == {0, 1, *codes}


def test_every_row_of_the_reliability_page_names_tests_that_exist_and_every_such_test_is_named():
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([A-I]\d[^|]*) \| (.*) \| (.*) \|$", page, re.MULTILINE)
    assert len(rows) > 60 and max(len(cell) for row in rows for cell in row) <= 120
    assert [row for row, *_ in rows] == re.findall(r"^- ([A-I]\d[^:]*): `test_", page, re.MULTILINE)
    code = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "tests").rglob("test_*.py")))
    tests = set(re.findall(r"^def (test_\w+)\(", code, re.MULTILINE))
    named = set(re.findall(r"`(test_\w+)`", page))
    assert named <= tests, named - tests
    of_a_row = {name for name in tests if re.match(r"test_[a-h]\d+_", name)}
    assert of_a_row <= named, of_a_row - named
