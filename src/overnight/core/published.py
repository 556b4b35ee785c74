"""What is written for others: foreign text as text, and no secret of a URL. Cards, comparisons and records share it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml

from overnight.core.console import plain
from overnight.core.files import atomic_write
from overnight.errors import listed

# Names of parameters, in URLs that are signed or carry a token: those of AWS, Google and Azure among them.
_SECRET = (
    r"[\w.-]*(?:signature|token|secret|passw|credential|api_?key|access_?key|key-pair|auth(?!or)|jwt|session)[\w.-]*"
    r"|x-amz-[\w-]+|x-goog-[\w-]+|sig|key|pwd|code|sas|policy|expires"
)
_PARAMETER = re.compile(rf"([?&;#](?:{_SECRET})=)[^&;#\s\"']+", re.IGNORECASE)
# Up to the last part of a path: from its slash, a home folder or `..` on; of no URL, and of no name with a slash in it.
_FOLDERS = (
    r"(?:(?<=\\n)|(?<![\w.~/<>-]))(?!//)(?:file:/*|{home}|~[\w.-]*|(?:\.\./)*\.\.)?/"
    r"(?:[^\s/\"'`()\[\]{{}}<>|]+/)*(?=[^\s/])"
)
_LOGIN = re.compile(r"(://)[^/\s@\"']+@")


def redacted(content: Any) -> Any:
    """A text, or what a file of JSON or YAML holds, with `***` in place of the logins and secrets of its URLs."""
    if isinstance(content, dict):
        return {key: redacted(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [redacted(value) for value in content]
    return _LOGIN.sub(r"\1***@", _PARAMETER.sub(r"\1***", content)) if isinstance(content, str) else content


def yaml_text(content: Any) -> str:
    """YAML in the order of its keys, letters of every language as they are; escaped where a mark among them is none."""
    shown = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    return shown if plain(shown) == shown else yaml.safe_dump(content, sort_keys=False)


def for_others(content: Any) -> Any:
    """What leaves this machine: `redacted`, and of each absolute path in it the last part alone."""
    if isinstance(content, dict):
        return {key: for_others(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [for_others(value) for value in content]
    if not isinstance(content, str):
        return content
    home = re.escape(os.path.expanduser("~").rstrip("/"))  # which may have a space in it
    return re.sub(_FOLDERS.format(home=home), "", redacted(content))


def allowed_files(folder: Path, names: re.Pattern[str]) -> dict[str, Path]:
    """The files of a folder whose path in it is allowed; never a link, nor anything behind one."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink())
    found = {path.relative_to(folder).as_posix(): path for path in paths}  # rglob enters no folder that is a link
    return {name: path for name, path in found.items() if names.fullmatch(name) and not folder.is_symlink()}


def copy_for_others(path: Path, there: Path) -> Path:
    """Write a file of text as `for_others` has it, and a figure as it is; returns the copy."""
    there.parent.mkdir(parents=True, exist_ok=True)
    content = path.read_bytes()
    atomic_write(there, content if path.suffix == ".png" else for_others(content.decode("utf-8")))
    return there


def text(value: object) -> str:
    """Foreign text as Markdown that shows it: no HTML, no links, no tables, no control characters, one line."""
    line = " ".join(plain(redacted(listed(value))).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = line.replace("://", "&#58;//").replace("www.", "www&#46;").replace("@", "&#64;")  # they would become links
    return re.sub(r"([\\`*_{}\[\]|~$!])", r"\\\1", line)


def fenced(code: str, language: str) -> str:
    """A block of code that its content cannot end."""
    longest = max((len(run) for run in re.findall(r"`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{plain(redacted(code)).rstrip()}\n{fence}"
