"""What makes a run this run: the keys that decide what it computes."""

from __future__ import annotations

from typing import Any

from overnight.recipe.schema import Recipe


def meaning(recipe: Recipe) -> dict[str, Any]:
    """The keys that decide what a run computes, dotted; a run can only be resumed while these stay as they were.

    Left out are names, prompts, the budgets beside the last, intervals of measuring, saving and printing, what changes
    speed alone (micro-batch, threads, compile), and two for which a run directory keeps what was really found: the
    data, by the fingerprint of its shards, and the precision that the device took.
    """
    chosen = recipe.model_dump(include={"seed", "model", "batch", "optim", "schedule"})
    del chosen["batch"]["micro_batch"], chosen["model"]["attention"]
    for key in ("milestones", "branches", "hours"):
        del chosen["schedule"][key]
    return flat(chosen)


def lasting(recipe: Recipe) -> set[str]:
    """The keys of a run's meaning that nothing can change: tensors would not fit, or iterations not be comparable."""
    shape = {key for key in meaning(recipe) if key.startswith("model.")} - {"model.dropout"}
    return shape | {"optim.name", "batch.tokens_per_iter"}


def flat(nested: dict, prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    out: dict[str, Any] = {}
    for key, value in nested.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[dict[str, Any]]:
    """What differs between two meanings: `{"key", "before", "now"}` each."""
    return [
        {"key": key, "before": before.get(key), "now": now.get(key)}
        for key in now | before
        if now.get(key) != before.get(key)
    ]


def told(differing: list[dict[str, Any]]) -> str:
    """Each difference on a line of its own."""
    return "\n".join(f"  `{change['key']}` was {change['before']!r}, now {change['now']!r}" for change in differing)


def grown(differing: list[dict[str, Any]]) -> bool:
    """Whether the run became longer, and the share of its decay stayed: then its trunk is the same."""
    changed = {change["key"]: change for change in differing}
    length = changed.get("schedule.max_iters")
    same_trunk = not changed.keys() & {"schedule.kind", "schedule.decay_fraction"}
    return length is not None and length["now"] > length["before"] and same_trunk
