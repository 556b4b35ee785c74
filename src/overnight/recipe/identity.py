"""What makes a run this run: the keys that decide what it computes, and how those of an older version are read.

In `recipe.yaml` and `state.json` an identity is called `meaning`.
"""

from __future__ import annotations

from typing import Any

from overnight.errors import listed
from overnight.recipe.schema import Recipe

MIGRATIONS: dict[str, str | None] = {
    "data.licence": "data.license",
    "hub.licence": "hub.license",
}
"""Keys that runs of older versions have stored, and what each is called now; None where nothing of it is left."""

MIGRATED_VALUES = {"model.attention": ("sdpa", "auto")}
"""A value that runs of older versions have stored under a key, and what it is called now."""


def recipe_identity(recipe: Recipe) -> dict[str, Any]:
    """The keys that decide what a run computes, dotted; a run can only be resumed while these stay as they were.

    Left out are names, prompts, the milestones before the last, intervals of measuring, saving and printing, what
    changes speed alone (micro-batch, threads, compile), and two for which a run directory keeps what was really found:
    the data, by the fingerprint of its shards, and the precision that the device took.
    """
    chosen = recipe.model_dump(include={"seed", "model", "batch", "optim", "schedule"})
    del chosen["batch"]["micro_batch"], chosen["model"]["attention"]
    for key in ("milestones", "branches", "hours"):
        del chosen["schedule"][key]
    return flat(chosen)


def immutable_keys(recipe: Recipe) -> set[str]:
    """The keys of an identity that nothing can change: tensors would not fit, or iterations not be comparable."""
    shape = {key for key in recipe_identity(recipe) if key.startswith("model.")} - {"model.dropout"}
    return shape | {"optim.name", "batch.tokens_per_iter"}


def flat(nested: dict, prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`; nothing is left out, not even a section with nothing in it."""
    out: dict[str, Any] = {}
    for key, value in nested.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return out


def nested(dotted: dict[str, Any]) -> dict[str, Any]:
    """`{"a.b": 1}` as `{"a": {"b": 1}}`."""
    out: dict[str, Any] = {}
    for key, value in dotted.items():
        *sections, name = key.split(".")
        inner = out
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = value
    return out


def stored_recipe(stored: dict[str, Any]) -> Recipe:
    """The recipe that a run directory has stored, whatever version wrote it; pydantic's error where it is none."""
    return Recipe.model_validate(nested(_migrated(flat(stored))))


def stored_identity(stored: dict[str, Any]) -> dict[str, Any]:
    """An identity in the keys of today. One that did not exist yet has its default: without it, that is what was done.

    Otherwise each new key would make every run before it another run.
    """
    return recipe_identity(Recipe.model_construct()) | _migrated(stored)


def _migrated(stored: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys and their values as they are called today."""
    named = {name: value for key, value in stored.items() if (name := MIGRATIONS.get(key, key)) is not None}
    changed = {key: new for key, (old, new) in MIGRATED_VALUES.items() if named.get(key) == old}
    return named | changed


def differences(stored: dict[str, Any], now: dict[str, Any]) -> list[dict[str, Any]]:
    """What differs between a stored identity and one of today: `{"key", "before", "now"}` each."""
    before = stored_identity(stored)
    return [
        {"key": key, "before": before.get(key), "now": now.get(key)}
        for key in now | before
        if now.get(key) != before.get(key)
    ]


def quoted(value: Any) -> str:
    """A value as a message has it."""
    return listed(value) if isinstance(value, list) else repr(value)


def difference_lines(differing: list[dict[str, Any]]) -> str:
    """Each difference on a line of its own."""
    return "\n".join(
        f"  `{change['key']}` was {quoted(change['before'])}, now {quoted(change['now'])}" for change in differing
    )


def grown(differing: list[dict[str, Any]]) -> bool:
    """Whether the run became longer, and the share of its decay stayed: then its trunk is the same."""
    changed = {change["key"]: change for change in differing}
    length = changed.get("schedule.max_iters")
    same_trunk = not changed.keys() & {"schedule.kind", "schedule.decay_fraction"}
    return length is not None and length["now"] > length["before"] and same_trunk
