"""What a person writes, in a recipe's file or behind an override, as values: YAML, and text where text is meant."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from overnight.errors import InputError, first_line
from overnight.recipe.identity import nested
from overnight.recipe.schema import Recipe, repository

UNREADABLE = (yaml.YAMLError, UnicodeDecodeError)
DEEPEST = 10
_BASE_60_OR_8 = re.compile(r"[-+]?(0[\d_]+|[\d_]+:[\d_:.]+)")


class _Loader(yaml.SafeLoader):
    """YAML with numbers as YAML 1.2 has them, `1e-3` one, `7:30` and `010` none, and dates as text: no key is a date.

    Duplicate keys, which PyYAML drops in silence, are refused, and so are keys that are no names, and aliases: a few
    lines of these can stand for more values than a memory holds.
    """

    depth = 0

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> Any:
        tag = super().resolve(kind, value, implicit)
        text = tag == "tag:yaml.org,2002:timestamp" or (isinstance(value, str) and _BASE_60_OR_8.fullmatch(value))
        return "tag:yaml.org,2002:str" if text else tag

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise _refusal(event.start_mark, f"`*{event.anchor}` is an alias; write the value out")
        self.depth += 1
        if self.depth > DEEPEST:
            raise _refusal(self.peek_event().start_mark, "nested deeper than any key of a recipe")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise _refusal(key_node.start_mark, f"`{key}` is no name for a key; in quotes it would be one")
            if key in seen:
                raise _refusal(key_node.start_mark, f"`{key}` stands twice")
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError, IndexError, AttributeError) as error:
            raise _refusal(node.start_mark, f"`{shown(node.value)}` cannot be read ({first_line(error)})") from None


def _refusal(mark: yaml.Mark, problem: str) -> InputError:
    return InputError(f"{mark.name} line {mark.line + 1}: {problem}")


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(path: Path) -> dict:
    """The mapping in a file. Raises `InputError` for what is none, or no recipe can hold, and OSError as it comes."""
    try:
        with path.open(encoding="utf-8") as file:
            data = yaml.load(file, Loader=_Loader)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, *UNREADABLE) as error:
        raise InputError(f"{path}: not a readable YAML file: {error}") from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: holds {type(data).__name__}, where a recipe is `key: value` lines")
    return data


def pairs(overrides: Sequence[str], problems: list[str]) -> Iterator[tuple[str, Any]]:
    """`--key value` and `--key=value`; what has no value is added to `problems`."""
    rest = list(overrides)
    while rest:
        option = rest.pop(0)
        key, equals, value = option.removeprefix("--").partition("=")
        if not option.startswith("--") or not key:
            problems.append(f"`{option}` is not an override; they look like `--optim.lr 2e-3`")
        elif not equals and (not rest or rest[0].startswith("--")):
            yield key, True
        else:
            yield key, typed(value if equals else rest.pop(0), key)


def typed(text: str, key: str = "") -> Any:
    """The value of what was typed for a key: YAML's, but as it stands where the key takes text.

    There only null, a list and what is in quotes are YAML, and each only if the key takes it. What is no YAML is text.
    """
    try:
        value = yaml.load(text, Loader=_Loader)
    except (InputError, *UNREADABLE):
        return text
    meant = value is None or isinstance(value, list) or text[:1] in ("'", '"')
    if meant and not objections(key, value):
        return value
    return text if value is None or not objections(key, text) else value


def objections(key: str, value: Any) -> list[Any]:
    """What pydantic has against a value of a dotted key, whatever the others are."""
    try:
        Recipe.model_validate(nested({key: value}))
    except ValidationError as error:
        return list(error.errors(include_url=False))
    return []


def shown(value: Any) -> str:
    """A value in a message: as it would be typed, and not all of a long one."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def is_path(name: str) -> bool:
    """Whether a name is a path: nobody asks the Hub for a repository of such a name."""
    try:
        return name != repository(name) or name.startswith("runs/")
    except ValueError:
        return True
