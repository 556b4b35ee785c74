"""What a run reports while it trains: lines on the screen, records in metrics.jsonl, numbers for the trackers.

Nothing here ends a run: one guard, `informs`, stands around all that only informs.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

from overnight.core.console import duration, step_line
from overnight.data.ngrams import ngram_losses, seen_tokens
from overnight.device.faults import lost, with_room
from overnight.errors import first_line
from overnight.model.checkpoint import Saved
from overnight.recipe.schedule import iterations_left, lr_at
from overnight.report.status import baseline_line, print_finished
from overnight.run_dir.layout import iteration_of
from overnight.run_dir.metrics import baselines_of
from overnight.training.state import RATE_WINDOW, RISING, QuickEval, Run

P = ParamSpec("P")
T = TypeVar("T")


def informs(what: str) -> Callable[[Callable[Concatenate[Run, P], T]], Callable[Concatenate[Run, P], T | None]]:
    """Mark a function of a run whose failure must not end it: it then returns None, and that is told once.

    Out of memory it is tried once more. A device that is lost is raised: without it there is no run.
    """

    def marked(act: Callable[Concatenate[Run, P], T]) -> Callable[Concatenate[Run, P], T | None]:
        @functools.wraps(act)
        def guarded(run: Run, *args: P.args, **kwargs: P.kwargs) -> T | None:
            try:
                return with_room(run.device, lambda: act(run, *args, **kwargs))
            except Exception as error:
                if lost(error):
                    raise
                tell(run, what, error)
                return None

        return guarded

    return marked


def tell(run: Run, what: str, error: Exception) -> None:
    """Say and record why something failed, the first time that it does."""
    if what in run.failed:
        return
    run.failed.add(what)
    problem = f"{type(error).__name__}: {first_line(error)}"
    with contextlib.suppress(Exception):  # it may be the screen itself, or the log
        if run.accelerator.is_main_process:
            run.record("event", event="failed", what=what, problem=problem)
        run.console.log(f"{what}: failed ({problem}); the run continues without it; this is said once")


@informs("trackers")
def begin_tracking(run: Run) -> None:
    """Let the trackers that the recipe names begin."""
    run.accelerator.init_trackers(run.recipe.name)


@informs("power")
def watts(run: Run) -> float | None:
    """Board power now."""
    return run.device.power.watts()


@informs("memory")
def used_gib(run: Run) -> float:
    """Memory that this process holds on the device."""
    return run.device.used_gib()


@informs("the line of an iteration")
def log_step(run: Run, loss: float, grad_norm: float) -> None:
    """One line on the screen, one record in metrics.jsonl, the same numbers to the trackers."""
    if not run.accelerator.is_main_process:
        return
    batch, schedule = run.recipe.batch, run.schedule
    seconds = run.throughput.since_last_line()
    rate = batch.tokens_per_iter / seconds if seconds else None
    record = run.record(
        "train",
        epoch=run.iteration * batch.tokens_per_iter / run.shards.train.tokens,
        loss=loss,
        grad_norm=grad_norm,
        lr=run.recipe.optim.lr * lr_at(run.iteration - 1, schedule),
        tokens_per_second=rate,
        mfu=run.derived.mfu(rate, run.device.peak_flops),
        gib=used_gib(run),
        watts=watts(run),
    )
    shown = record | {"val": run.history.last_val, "gib_total": run.device.total_gib, **time_left(run, seconds)}
    run.console.log(step_line(shown, schedule.max_iters))
    log_trouble(run)
    if (fall := run.throughput.fell_by()) is not None:
        log_slow(run, fall)
    run.console.progress(run.iteration, schedule.max_iters)
    log_quick_evals(run, wait=False)
    track(
        run, {f"train/{key}": record[key] for key in ("loss", "grad_norm", "lr", "tokens_per_second", "mfu", "watts")}
    )


def log_slow(run: Run, fall: float) -> None:
    """Say and record that the run became slower than it was."""
    run.record("event", event="slower", fall=fall)
    run.console.log(
        f"the rate is {fall:.0%} below that of the first {RATE_WINDOW} warm iterations: another program on the device,"
        " heat, or on WSL memory that spilled to the host; said once"
    )


def time_left(run: Run, seconds_per_iteration: float | None) -> dict[str, float]:
    """`eta_seconds` to the next finished model, `whole_seconds` where this command makes others after it.

    Validations are included. While a run with a time limit has not chosen what it can finish, its end is the time's.
    """
    if run.time_limit and run.time_limit.target_iters is None:
        return {"eta_seconds": run.time_limit.left()}
    if not seconds_per_iteration:
        return {}
    every, target = run.recipe.validation.every, run.target_iters
    looks = -(-target // every) - run.iteration // every
    validation = run.throughput.validation_seconds
    left = {"eta_seconds": (target - run.iteration) * seconds_per_iteration + looks * validation}
    if target in run.targets[:-1]:
        ahead = run.targets[run.targets.index(target) :]
        of_all = iterations_left(run.recipe.schedule, run.iteration, ahead)
        left["whole_seconds"] = of_all * (seconds_per_iteration + validation / every)
    return left


@informs("the line of a validation")
def log_validation(run: Run, loss: float, samples: list[str], seconds: float) -> None:
    """The validation loss, and how the model as it stands continues the recipe's prompts."""
    if not run.accelerator.is_main_process:
        return
    run.record("val", loss=loss, seconds=seconds, samples=samples)
    tokens = f"{run.shards.val.tokens:,} tokens in {duration(seconds)}"
    run.console.log(f"validation loss {loss:.4f} at iteration {run.iteration} ({tokens})")
    if (best := run.history.rising_since()) is not None:
        run.console.log(
            f"the validation loss has risen {RISING} times since iteration {best}: the model may be learning its text"
            " by heart; more text, or fewer iterations, would end lower"
        )
    for prompt, text in zip(run.recipe.validation.prompts, samples, strict=False):
        run.console.log(f"  {prompt} >{' '.join([' ', *text.split()])}")
    track(run, {"val/loss": loss})


@informs("the line of a validation")
def log_not_finite(run: Run, loss: float) -> None:
    """Say and record that a validation gave no number."""
    run.console.log(
        f"validation loss {loss} at iteration {run.iteration}: not finite, so the run cannot finish with it"
    )
    if run.accelerator.is_main_process:
        run.record("event", event="validation not finite", loss=str(loss))


@informs("n-gram baselines")
def log_baselines(run: Run) -> None:
    """What unigram and bigram models reach of the tokens that this budget trains on, told once, to set the scale."""
    budget = run.target_iters
    if not (run.recipe.validation.ngram_baselines and run.accelerator.is_main_process):
        return
    if baselines_of(run.directory.records(), budget):
        return
    losses = ngram_losses(seen_tokens(run.batches, budget), run.shards.val.read_all())
    run.record_at(0, "event", event="ngram baselines", max_iters=budget, **losses)
    run.console.log(f"for scale, models of the tokens of {budget:,} iterations: {baseline_line(losses)} nats per token")
    track(run, {f"baseline/{name}": loss for name, loss in losses.items()})


@informs("trackers")
def track(run: Run, values: dict[str, float | None]) -> None:
    """Hand numbers to the trackers that the recipe names."""
    run.accelerator.log({key: value for key, value in values.items() if value is not None}, step=run.iteration)


@informs("the line of an update that was left out")
def log_skip(run: Run, loss: float, grad_norm: float) -> None:
    """Say and record that an update was left out, with the rows of the training set that it would have used."""
    run.console.log(
        f"iteration {run.iteration}: loss {loss}, gradient norm {grad_norm}: not finite, the weights stay as they were"
    )
    if run.accelerator.is_main_process:
        values = {"loss": str(loss), "grad_norm": str(grad_norm)}  # JSON has no NaN
        places = run.batches.places(run.iteration - 1)
        run.record("event", event="skipped", **values, rows=places)


@informs("the line of a spike")
def log_spike(run: Run, loss: float, rise: float) -> None:
    """Say and record that the loss rose far above what it was, with the rows that it was measured on."""
    run.console.log(f"iteration {run.iteration}: loss {loss:.4f}, {rise:.2f} above its median: a spike begins")
    if run.accelerator.is_main_process:
        places = run.batches.places(run.iteration - 1)
        run.record("event", event="spike", loss=loss, rise=rise, rows=places)


def log_saved(run: Run, saved: Saved | None) -> None:
    """Say and record how a save went, once it is known."""
    if saved is None:
        return
    values = {"checkpoint": saved.path.name, "held_seconds": saved.held, "seconds": saved.seconds}
    if saved.problem is None:
        run.console.log(f"saved {saved.path} in {saved.seconds:.1f}s, training waited {saved.held:.2f}s")
        run.record("event", event="saved", **values)
        return
    run.console.log(f"{saved.path} {saved.problem}; older checkpoints stay, and the run continues")
    run.record("event", event="not saved", **values, problem=saved.problem)


def log_trouble(run: Run) -> None:
    """Say when records can no longer be written, and when they can again."""
    trouble = run.directory.metrics.trouble
    if trouble and not run.cannot_log:
        run.console.log(f"{trouble}: records wait in memory until it takes them; the run continues")
    if run.cannot_log and not trouble:
        run.console.log(f"{run.directory.metrics.path} takes records again; none is lost")
    run.cannot_log = trouble is not None


def log_lost(run: Run) -> None:
    """Say at the end which records found no room."""
    if waiting := run.directory.metrics.waiting:
        run.console.log(f"{run.directory.metrics.trouble}: its last {len(waiting)} records are lost")


@informs("benchmarks of a milestone")
def log_quick_evals(run: Run, *, wait: bool) -> None:
    """What finished models score on the first items of each task, of those that are scored, or of all."""
    done = [each for each in run.quick_evals if wait or each.over]
    run.quick_evals = [each for each in run.quick_evals if each not in done]
    for each in done:
        log_quick_eval(run, each)


def log_quick_eval(run: Run, quick_eval: QuickEval) -> None:
    """One finished model's scores."""
    milestone, items = iteration_of(quick_eval.folder), quick_eval.items
    scores, problem = quick_eval.scores(lambda: run.signalled)
    run.directory.append("event", milestone, cooldown=milestone, event="scores", items=items, **scores)
    shown = ", ".join(f"{task} {score:.1%}" for task, score in scores.items())
    run.console.log(f"{quick_eval.folder.name}, first {items} items: {shown or f'not scored: {problem}'}")
    track(run, {f"benchmark/{task}": score for task, score in scores.items()})


@informs("the results")
def log_results(run: Run) -> None:
    """The box at the end."""
    print_finished(run.directory, run.console, run.target_iters)
