"""The whole night in one command: checks, prepare, train, evaluate, each step skipped when it is done.

The trainer is started under a configuration of accelerate's, with two things of our own. Where it means one process,
that process is started directly: accelerate's launcher turns every exit code into 1, and dies of a signal without
passing it on. And the trainer gets a process group of its own, so that Ctrl-C reaches it once, through us.
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from overnight.cli import default_recipe, recipe_command, user_path
from overnight.core.processes import handled, tied
from overnight.core.scripts import ROOT
from overnight.data.manifest import MANIFEST, is_prepared
from overnight.doctor import checks
from overnight.errors import EXIT_INTERRUPTED, InputError, first_line, script_command
from overnight.recipe.schema import Recipe
from overnight.run_dir.directory import RunDirectory
from overnight.run_dir.layout import evaluated, evaluation_of, finished, folder_name, iteration_of

if TYPE_CHECKING:
    from accelerate.commands.config.config_args import ClusterConfig

EXIT_DOCTOR = 1
MAX_RESTARTS = 10


class Child:
    """A step that runs as a process; the signals that we are sent can be passed on to it."""

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None
        self.stopped_by: signal.Signals | None = None

    def run(self, command: list[str], environment: dict[str, str]) -> int:
        """Run to the end and return the exit code: a shell's, 128 and its number, where a signal ended the step.

        75 where we were sent one, and it did not end well.
        """
        if self.stopped_by:
            return EXIT_INTERRUPTED
        self.process = subprocess.Popen(tied(*command), env=environment, process_group=0)
        code = self.process.wait()
        if code and self.stopped_by:
            return EXIT_INTERRUPTED
        return code if code >= 0 else 128 - code

    def pass_on(self, number: int, frame: object) -> None:
        """Answer a signal: the running step gets it, and no further step is started."""
        self.stopped_by = signal.Signals(number)
        if self.process is not None:
            self.process.send_signal(number)


def night(
    recipe: Recipe, arguments: list[str], config_file: Path, *, until: str | None = None, dry_run: bool = False
) -> int:
    """Do every step of the night that is not done; `arguments` are what the scripts in recipes/ get.

    With `until`, HH:MM, or `schedule.hours` the trainer continues from the last night, as far as this one is long.
    Returns the exit code of the step that failed, 75 when interrupted, otherwise 0.
    """
    hours = recipe.schedule.hours
    time = f"until {until}" if until else f"in {hours:g} hours" if hours else None
    print(f"The night of {recipe.name}, the steps that are done are skipped:")
    for number, line in enumerate(steps(recipe, time), start=1):
        print(f"  {number}. {line}", flush=True)
    if dry_run:
        return 0
    if not checks.examine(recipe):
        print("The lines that begin with `fail` would stop the training; mend them, then type the same command again.")
        return EXIT_DOCTOR
    child = Child()
    with handled(child.pass_on):
        ready = recipe.data.local or is_prepared(Path(recipe.data.dir))
        code = 0 if ready else run_prepare(arguments, child)
        timed = ["--until", until] if until else []
        code = code or run_train(recipe, [*arguments, *timed], config_file, child)
        code = code or run_evaluate(target_model(recipe, timed=time is not None), config_file, child)
        return code or run_publish(recipe, child)


def steps(recipe: Recipe, time: str | None = None) -> list[str]:
    """One line a step: what will be done, or why it is skipped; `time` says what the night is limited to."""
    if is_prepared(Path(recipe.data.dir)):
        prepare = f"skipped: {recipe.data.dir}/{MANIFEST} is there"
    elif recipe.data.local:
        prepare = "skipped: the trainer makes the shards of text that lies on this machine itself"
    else:
        size = f", {recipe.data.fetched_gb:g} GB to download" if recipe.data.fetched_gb else ""
        prepare = f"recipes/prepare.py, into {recipe.data.dir}{size}"
    done = max(map(iteration_of, RunDirectory(recipe).resumable(recipe.schedule)), default=None)
    finished = target_model(recipe)
    if time:
        train = f"recipes/train.py, continues at iteration {done or 0:,} to the budget that can be finished {time}"
    elif finished.exists():
        train = f"done: {finished} is there; the trainer is only asked for its results"
    elif done is not None:
        train = f"recipes/train.py, continues at iteration {done:,} of {recipe.schedule.max_iters:,}"
    else:
        train = f"recipes/train.py, {recipe.schedule.max_iters:,} iterations into runs/{recipe.name}"
    if time or not finished.exists():
        train += f"; restarted when interrupted, up to {MAX_RESTARTS} times, each time only after new progress"
    if not time and evaluated(finished):
        compare = f"skipped: {evaluation_of(finished)} has it"
    else:
        against = ", ".join(recipe.evaluation.against) or "nothing"
        compare = f"recipes/eval.py, {len(recipe.evaluation.tasks)} tasks, against {against}"
    publish = f"what {recipe.hub.repo_id} lacks" if recipe.hub.repo_id else "skipped: no `hub.repo_id`"
    return [
        "doctor   checks this machine",
        f"prepare  {prepare}",
        f"train    {train}",
        f"eval     {compare}",
        f"publish  {publish}",
    ]


def target_model(recipe: Recipe, *, timed: bool = False) -> Path:
    """Where the run's finished model lies once the run is over; of a run in nights, the longest budget's so far."""
    directory = RunDirectory(recipe)
    last = directory.flat_end() or recipe.schedule.max_iters
    return directory.models / folder_name(max(finished(directory.path) if timed else [], default=last))


def checkpoints(recipe: Recipe) -> set[Path]:
    """All there are, on the trunk and of every decay: another set is progress."""
    return set(RunDirectory(recipe).checkpoints.glob("**/iter-*"))


def script(name: str, *arguments: str) -> list[str]:
    """The command of a script in recipes/."""
    return [sys.executable, str(ROOT / "recipes" / name), *arguments]


def run_prepare(arguments: list[str], child: Child) -> int:
    """Prepare the shards, again when the network stayed away for a minute; returns the last exit code."""
    restarts = 0
    while (code := child.run(script("prepare.py", *arguments), dict(os.environ))) == EXIT_INTERRUPTED:
        if child.stopped_by or restarts == MAX_RESTARTS:
            break
        restarts += 1
        print(f"Preparing was interrupted: restart {restarts} of {MAX_RESTARTS}", flush=True)
    return code


def run_train(recipe: Recipe, arguments: list[str], config_file: Path, child: Child) -> int:
    """Run the trainer until it ends, starting it again where `goes_on` says so; returns its last exit code."""
    command, environment, one_process = launched(config_file, "train.py", arguments)
    for restarts in itertools.count():
        before = checkpoints(recipe)
        code = child.run(command, environment)
        if child.stopped_by:
            print(f"{child.stopped_by.name}: the trainer ended with code {code}; the same command continues from there")
            return code
        if not goes_on(code, one_process, checkpoints(recipe) != before, restarts):
            break
        again = f"restart {restarts + 1} of {MAX_RESTARTS}"
        print(f"The trainer was interrupted (code {code}) after new progress: {again}", flush=True)
    if code == EXIT_INTERRUPTED or code > 128:
        print(f"The trainer was interrupted (code {code}) and is not started again: no new progress, or too often")
    return code


def goes_on(code: int, one_process: bool, progressed: bool, restarts: int) -> bool:
    """Whether to start the trainer again: it was interrupted, it saved something new, and the limit is not reached.

    Interrupted is exit code 75, or the death by a signal (the kernel's out-of-memory killer sends one). The launcher of
    several processes ends with 1 whatever the trainer said, so there 1 counts as well.
    """
    interrupted = code == EXIT_INTERRUPTED or code > 128 or (code == 1 and not one_process)
    return interrupted and progressed and restarts < MAX_RESTARTS


def run_evaluate(model: Path, config_file: Path, child: Child) -> int:
    """Measure a finished model as its recipe says, unless that was done; returns the exit code."""
    if evaluated(model):
        return 0
    command, environment, _ = launched(config_file, "eval.py", [str(model)])
    code = child.run(command, environment)
    if code and not child.stopped_by:
        print(f"{model} is finished, its evaluation is not (code {code}): {script_command('eval.py', model)}")
    return code


def run_publish(recipe: Recipe, child: Child) -> int:
    """Send what the evaluation added, and what the trainer may have left; returns the exit code."""
    if not recipe.hub.repo_id:
        return 0
    return child.run(script("publish.py", str(RunDirectory(recipe).path)), dict(os.environ))


def launched(config_file: Path, name: str, arguments: list[str]) -> tuple[list[str], dict[str, str], bool]:
    """A script's command and environment under an accelerate configuration, and whether it is one process.

    What it says beside devices and processes is overruled: neither DeepSpeed, FSDP and Megatron nor fp8 is asked for.
    """
    from accelerate.utils import DistributedType

    config, command = read_config(config_file), script(name, *arguments)
    sharded = config.distributed_type in ("DEEPSPEED", "FSDP", "MEGATRON_LM")
    alone = config.distributed_type in (DistributedType.NO, DistributedType.XLA)
    if alone or (sharded and config.num_processes == 1):
        return command, dict(os.environ) | environment_of(config), True
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(config_file), "--mixed_precision", "no"]
    launcher += ["--multi_gpu"] if sharded else []
    return [command[0], *launcher, *command[1:]], dict(os.environ), False


def read_config(path: Path) -> ClusterConfig:
    """An accelerate configuration. Raises `InputError` for a file that is none, or one of a cloud."""
    from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

    try:
        config = load_config_from_file(str(path))
    except Exception as error:  # what PyYAML, json and accelerate raise has no class in common
        raise InputError(f"`--config_file` is {path}, which accelerate cannot read: {first_line(error)}") from error
    if not isinstance(config, ClusterConfig):
        raise InputError(f"`--config_file` is {path}, for SageMaker; accelerate_config.yaml would work")
    return config


def environment_of(config: ClusterConfig) -> dict[str, str]:
    """What accelerate's launcher tells its one process of a configuration; the number of threads is the recipe's."""
    told = {
        "ACCELERATE_USE_CPU": str(config.use_cpu),
        "ACCELERATE_MIXED_PRECISION": config.mixed_precision or "no",
        **{f"ACCELERATE_{key.upper()}": str(value) for key, value in config.dynamo_config.items()},
    }
    if config.debug:
        told["ACCELERATE_DEBUG_MODE"] = "true"
    if config.gpu_ids not in (None, "all"):
        told["CUDA_VISIBLE_DEVICES"] = config.gpu_ids
    return told


def accelerate_config() -> Path:
    """The user's own default configuration where there is one, as `accelerate launch` takes it; otherwise ours."""
    from accelerate.commands.config.config_args import default_config_file

    own = Path(default_config_file)
    return own if own.is_file() else ROOT / "accelerate_config.yaml"


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the night takes beside a recipe and its overrides."""
    says = "finish by this time of day (`--schedule.hours H` finishes within H hours)"
    parser.add_argument("--until", metavar="HH:MM", help=says)
    says = "accelerate's configuration (default: your own where there is one, otherwise accelerate_config.yaml)"
    parser.add_argument("--config_file", type=user_path, help=says)


def run(recipe: Recipe, options: argparse.Namespace) -> int:
    """Find accelerate's configuration and go through the night."""
    config_file = options.config_file or accelerate_config()
    if not config_file.is_file():
        raise InputError(f"`--config_file` is {config_file}: there is no such file; accelerate_config.yaml would work")
    return night(recipe, options.arguments, config_file, until=options.until, dry_run=options.dry_run)


if __name__ == "__main__":
    try:
        sys.exit(recipe_command(__doc__ or "", run, default=default_recipe, options=add_options))
    except KeyboardInterrupt:  # between the steps; a running step is interrupted, and answers, itself
        sys.exit(EXIT_INTERRUPTED)
