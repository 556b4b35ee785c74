"""What is written for others: foreign text as text, and no secret of a URL. Cards, comparisons and records share it."""

from __future__ import annotations

import re
from typing import Any

from overnight.core.console import plain

# Names of parameters, in URLs that are signed or carry a token: those of AWS, Google and Azure among them.
_SECRET = (
    r"[\w.-]*(?:signature|token|secret|passw|credential|api_?key|access_?key|key-pair|auth(?!or)|jwt|session)[\w.-]*"
    r"|x-amz-[\w-]+|x-goog-[\w-]+|sig|key|pwd|code|sas|policy|expires"
)
_PARAMETER = re.compile(rf"([?&;#](?:{_SECRET})=)[^&;#\s\"']+", re.IGNORECASE)
_LOGIN = re.compile(r"(://)[^/\s@\"']+@")


def redacted(content: Any) -> Any:
    """A text, or what a file of JSON or YAML holds, with `***` in place of the logins and secrets of its URLs."""
    if isinstance(content, dict):
        return {key: redacted(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [redacted(value) for value in content]
    return _LOGIN.sub(r"\1***@", _PARAMETER.sub(r"\1***", content)) if isinstance(content, str) else content


def text(value: object) -> str:
    """Foreign text as Markdown that shows it: no HTML, no links, no tables, no control characters, one line."""
    line = " ".join(plain(redacted(str(value))).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = line.replace("://", "&#58;//").replace("www.", "www&#46;").replace("@", "&#64;")  # they would become links
    return re.sub(r"([\\`*_{}\[\]|~$!])", r"\\\1", line)


def fenced(code: str, language: str) -> str:
    """A block of code that its content cannot end."""
    longest = max((len(run) for run in re.findall(r"`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{plain(redacted(code)).rstrip()}\n{fence}"
