"""What the tasks of the GPU day found, as rows: a figure, what the plan expected of it, what was measured."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from overnight.planning.gpus import Gpu, gpu_named
from overnight.planning.memory import by_formula
from overnight.planning.model_size import memory_gib
from overnight.planning.roofline import speed_of, validation_share
from overnight.recipe.schema import Recipe

TWELVE_GB = "rtx-4070"  # the card that step 3 emulates
COLD = 3  # iterations at the start of a session that are in no rate
NOTHING = "-"


class Row(NamedTuple):
    """One figure. Where nothing was predicted, `predicted` is a dash."""

    figure: str
    predicted: str
    measured: str


class Where(NamedTuple):
    """What the predictions depend on."""

    recipe: Recipe
    gpu: Gpu | None  # None for a device that facts/gpus.csv does not have

    @property
    def tokens_per_second(self) -> float | None:
        """The plan's."""
        speed = speed_of(self.recipe, self.gpu, by_formula(self.recipe, self.gpu).micro_batch) if self.gpu else None
        return speed.tokens_per_second if speed else None

    @property
    def validation_seconds_per_token(self) -> float | None:
        """The plan's."""
        if self.gpu is None or self.tokens_per_second is None:
            return None
        rows = by_formula(self.recipe, self.gpu).micro_batch
        return validation_share(self.recipe, self.gpu, rows) / self.tokens_per_second


def number(value: float | None, form: str) -> str:
    """A formatted value, or a dash."""
    return NOTHING if value is None else format(value, form)


def of_invariants(task: dict[str, Any], where: Where) -> Iterator[Row]:
    yield Row("invariants on this device", "all passed", task["output"].strip().splitlines()[-1].strip("= "))


def of_probe(task: dict[str, Any], where: Where) -> Iterator[Row]:
    found = task["result"]
    yield Row("attention", "fused, no mask", found["attention"])
    yield Row("micro-batch, chosen by itself", NOTHING, f"{found['micro_batch']} rows")
    expected = number(where.tokens_per_second, ",.0f")
    yield Row("tokens a second, random tokens", expected, f"{found['tokens_per_second']:,.0f}")
    yield Row("share of the dense peak", NOTHING, number(found["mfu"], ".1%"))
    yield Row("watts", number(where.gpu and where.gpu.tdp_watts, ".0f"), number(found["watts"], ".0f"))


def of_memory(task: dict[str, Any], where: Where) -> Iterator[Row]:
    for size in task["result"]:
        peak = size["peak_gib"] + (size["beside_gib"] or 0.0)
        expected, beside = memory_gib(where.recipe, size["rows"]), number(size["beside_gib"], ".2f")
        if where.gpu is None:  # the formula is a card's
            said = f"{peak:.2f}"
        else:
            said = f"{peak:.2f}, {peak / expected - 1:+.1%}; {beside} of it not the allocator's"
        said = said if size["fits"] else "does not fit"
        yield Row(f"GiB at {size['rows']} rows", f"{expected:.2f}" if where.gpu else NOTHING, said)
        if size["fits"]:
            yield Row(f"tokens a second at {size['rows']} rows", NOTHING, f"{size['tokens_per_second']:,.0f}")
    first = [f"{size['first_seconds']:.0f}" for size in task["result"]]
    yield Row("seconds of each size's first iteration", NOTHING, ", ".join(first))
    compiled = "one a size, 0" if any(size["graphs"] for size in task["result"]) else NOTHING
    graphs, breaks = (sum(size[key] for size in task["result"]) for key in ("graphs", "graph_breaks"))
    yield Row("graphs compiled, graph breaks", compiled, f"{graphs} of {len(first)} sizes, {breaks}")


def of_parts(task: dict[str, Any], where: Where) -> Iterator[Row]:
    groups = dict(task["result"]["groups"])
    for name, part in groups.pop("ceilings").items():
        yield Row(name, ceiling(part, where.gpu), shown_part(part))
    products = groups.pop("matrix products of a block")
    times = [part["ms"] for part in products.values() if "ms" in part]
    yield Row(f"{len(times)} matrix products of a block", NOTHING, f"{sum(times):.3f} ms")
    for group, parts in groups.items():
        for name, part in parts.items():
            yield Row(f"{group}: {name}", NOTHING, shown_part(part))


def ceiling(part: dict[str, Any], gpu: Gpu | None) -> str:
    """What the vendor says of a product or a copy."""
    if gpu is None or "failed" in part:
        return NOTHING
    return f"{gpu.tflops:.3g} TFLOP/s" if "tflops" in part else f"{gpu.memory_bandwidth_gb_s / 1000:.3g} TB/s"


def shown_part(part: dict[str, Any]) -> str:
    """Its time and rate, or why it did not run."""
    if "failed" in part:
        return part["failed"]
    rates = [f"{part[key]:.3g} {unit}" for key, unit in (("tflops", "TFLOP/s"), ("tb_s", "TB/s")) if key in part]
    return ", ".join([f"{part['ms']:.3f} ms", *rates])


def of_prepare(task: dict[str, Any], where: Where) -> Iterator[Row]:
    tokens = sum(record["tokens"] for side in ("train", "val") for record in task["result"][side])
    yield Row("tokens prepared", NOTHING, f"{tokens:,} in {task['seconds']:.0f} s, Python's start included")


def of_run(found: dict[str, Any], where: Where) -> Iterator[Row]:
    """What a run's records tell: speed, validations, checkpoints, its end."""
    records, speed = found["records"], where.tokens_per_second
    rates = [r["tokens_per_second"] for r in records if r["kind"] == "train" and r["tokens_per_second"]]
    yield Row("tokens a second, median of the run", number(speed, ",.0f"), f"{statistics.median(rates[COLD:]):,.0f}")
    looks = [r for r in records if r["kind"] == "val"]
    yield Row("validation losses, nats", NOTHING, ", ".join(f"{r['loss']:.4f}@{r['iteration']}" for r in looks))
    a_token = where.validation_seconds_per_token
    expected = a_token and found["environment"]["validation_tokens"] * a_token
    yield Row(
        "seconds of a validation, median",
        number(expected, ".2f"),
        f"{statistics.median(r['seconds'] for r in looks):.2f}",
    )
    saves = [r["held_seconds"] for r in records if r.get("event") == "saved"]
    later = f"{max(saves[1:]):.3f}" if saves[1:] else NOTHING
    yield Row(
        "seconds that a checkpoint held the run", "under 0.1 after the first", f"{saves[0]:.3f}, then at most {later}"
    )
    finished = next((r for r in records if r.get("event") == "finished"), None)
    yield Row("finished and exported", "yes", f"in {finished['export_seconds']:.0f} s" if finished else "no")


def of_killed(task: dict[str, Any], where: Where) -> Iterator[Row]:
    found = task["result"]
    apart = list(differences(found["before_kill"], found["records"]).values())
    said = f"{max(apart):.2g} nats over {len(apart)} iterations" if apart else "none were"
    yield Row("iterations made again after SIGKILL, losses apart", "rounding", said)
    yield from of_run(found, where)


def differences(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> dict[int, float]:
    """By iteration that was made before a kill and again after it, how far apart its losses are, in nats."""
    resumed = [record["iteration"] for record in after if record.get("event") == "resumed"]
    first, second = (
        {record["iteration"]: record["loss"] for record in records if record["kind"] == "train"}
        for records in (before, after)
    )
    return {i: abs(first[i] - second[i]) for i in sorted(first.keys() & second.keys()) if resumed and i > resumed[0]}


def of_small_card(task: dict[str, Any], where: Where) -> Iterator[Row]:
    found = task["result"]
    expected, context = (NOTHING, NOTHING)
    if where.gpu:
        memory = by_formula(where.recipe, gpu_named(TWELVE_GB))
        expected, context = f"{memory.micro_batch} rows", f"{memory.peak_gib:.2f} with the context"
    yield Row("micro-batch on 12 GB", expected, found["environment"]["micro-batch"])
    held = max(r["gib"] for r in found["records"] if r["kind"] == "train")
    yield Row("GiB of it, the allocator's", context, f"{held:.2f}")


def of_exhausted(task: dict[str, Any], where: Where) -> Iterator[Row]:
    records = task["result"]["records"]
    full = [r for r in records if "memory" in r.get("event", "")]
    said = [f"{r['event']} at {r['iteration']}: {r['micro_batch']} to {r['next_micro_batch']} rows" for r in full]
    yield Row("memory that ran out", "in iteration 6 and in the validation of 8", "; ".join(said) or "nowhere")
    finished = any(r.get("event") == "finished" for r in records)
    yield Row("the run after that", "finished", "finished" if finished else "ended early")


def of_training_step(task: dict[str, Any], where: Where) -> Iterator[Row]:
    for shape, sides in task["result"]["shapes"].items():
        rates = {side: [each["tokens"] / each["seconds"] for each in found] for side, found in sides.items()}
        for side, found in sides.items():
            said = f"{statistics.median(rates[side]):,.0f} tokens a second, {found[0]['peak_mib'] / 1024:.2f} GiB"
            if side != "ours":
                ratio = statistics.median(a / b for a, b in zip(rates["ours"], rates[side], strict=True))
                said += f" with {found[0]['tokens']:,} tokens a step; ours {ratio:.3f} of it"
            yield Row(f"{side}, a step of {shape}", NOTHING, said)


def of_evaluation(task: dict[str, Any], where: Where) -> Iterator[Row]:
    [scores] = task["result"]["models"]
    said = [f"{name} {each['metrics'][each['metric']]:.4f}" for name, each in scores["tasks"].items()]
    said = [f"{scores['validation']['loss']:.5f} nats", *said, f"{task['seconds']:.0f} s in all"]
    yield Row(f"evaluation in {task['result']['settings']['dtype']}", NOTHING, ", ".join(said))


ROWS: dict[str, Callable[[dict[str, Any], Where], Iterator[Row]]] = {
    "invariants": of_invariants,
    "probe": of_probe,
    "memory": of_memory,
    "parts": of_parts,
    "prepare": of_prepare,
    "killed": of_killed,
    "small_card": of_small_card,
    "exhausted": of_exhausted,
    "training_step": of_training_step,
    "evaluation_float32": of_evaluation,
    "evaluation_bfloat16": of_evaluation,
}


def rows_of(name: str, task: dict[str, Any], where: Where) -> list[Row]:
    """The rows of one task; of one that was cut off those that its result has, and a row that says so."""
    if name not in ROWS:
        return [] if task["exit"] == 0 else [cut_off(name, task)]
    if task["exit"] == 0:
        return list(ROWS[name](task, where))
    found: list[Row] = []
    with contextlib.suppress(LookupError, statistics.StatisticsError):
        for row in ROWS[name](task, where):
            found.append(row)
    return [*found, cut_off(name, task)]


def cut_off(name: str, task: dict[str, Any]) -> Row:
    """How a task ended that did not end well."""
    last = (task.get("output", "").strip().splitlines() or [""])[-1]
    return Row(f"{name}: not whole", "exit 0", f"{task['exit']} after {task['seconds']:.0f} s: {last}")
