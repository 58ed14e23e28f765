"""The `compare` command: runs every method under every seed, and writes one comparison.

Every stage is the command that a user would give, in a process of its own; what it prints goes to a
file beside what it makes. A stage that has made its product is not run again, so a comparison that
was stopped continues where it was.
"""

import argparse
import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, get_args

import yaml
from rich.console import Console

from megatron_scalebio.compare.config import VARIANTS, CompareConfig, load, resolved_text
from megatron_scalebio.compare.results import collect, write
from megatron_scalebio.compare.stages import WEIGHTS_FILE, Plan, Stage, seconds_left
from megatron_scalebio.config.baseline import Method
from megatron_scalebio.config_loader import build, read_yaml
from megatron_scalebio.errors import (
    EXIT_OK,
    EXIT_SIGNALLED,
    EXIT_USER_ERROR,
    UserError,
    disk_errors_named,
    sigterm_interrupts,
)
from megatron_scalebio.formatting import duration
from megatron_scalebio.whole_files import write_json, write_text

# What may change between two starts of one comparison: runs are added, none made invalid.
EXTENDABLE = ("methods", "seeds", "tasks", "ranks", "launcher", "variants", "weights")
CONFIG_FILE = "compare.yaml"
NARROWEST = 120  # columns of the closing table
_LOG_TAIL = 15  # lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``compare``."""
    parser.epilog = (
        f"methods: {', '.join([*get_args(Method), *VARIANTS])}; docs/methods.md tells what each "
        "does, and shows a file"
    )
    add = parser.add_argument
    add("--config", required=True, type=Path, metavar="FILE", help="YAML file of the comparison")
    add("--methods", nargs="+", metavar="METHOD", help="instead of the file's")
    add("--seeds", nargs="+", type=int, metavar="N", help="instead of the file's")
    add("--output", metavar="DIR", help="instead of the file's")
    add("--dry-run", action="store_true", help="show the commands that are still to run")


def run(args: argparse.Namespace) -> int:
    given = {name: getattr(args, name) for name in ("methods", "seeds", "output")}
    config = load(args.config, {k: v for k, v in given.items() if v is not None})
    plan = Plan(config)
    console = Console(highlight=False, markup=False, width=max(NARROWEST, Console().width))
    whole = _joined_with_earlier(config, plan)
    if args.dry_run:
        todo = [stage for stage in plan if not stage.done]
        for stage in todo:
            console.print(f"# {stage.title}\n{' '.join(plan.command(stage))}", soft_wrap=True)
        if not todo:
            console.print(f"nothing is left to run in {config.output}")
        return EXIT_OK
    write_text(Path(config.output) / CONFIG_FILE, resolved_text(whole))
    stages = list(plan)
    try:
        with sigterm_interrupts():
            for number, stage in enumerate(stages, 1):
                if not stage.done:
                    console.print(f"[{number}/{len(stages)}] {stage.title} ...")
                    seconds = run_stage(stage, plan.command(stage), plan.environment(stage))
                    left = seconds_left(stages)
                    more = f"; {duration(round(left))} left" if left else ""
                    console.print(f"    {duration(round(seconds))}{more}")
                _drop_training_state(stage)
    except KeyboardInterrupt:
        console.print("compare: stopped; the same command continues from there")
        return EXIT_SIGNALLED
    finally:
        comparison = collect(Plan(whole))
        if comparison["methods"]:
            write(plan.output, comparison, console)
    return EXIT_OK


def _joined_with_earlier(config: CompareConfig, plan: Plan) -> CompareConfig:
    """The comparison in its output with what this one adds, or this one where none has begun.

    Raises:
        UserError: if the one there differs in what would make its runs invalid.
    """
    path = Path(config.output) / CONFIG_FILE
    if not path.exists() or not any(stage.done for stage in plan):
        return config
    earlier = read_yaml(str(path), known=vars(config))
    now = yaml.safe_load(resolved_text(config))
    for name, value in now.items():
        if name not in EXTENDABLE:
            _refuse_difference(f"{path}: {name}", earlier.get(name), value)
    for name in ("methods", "seeds"):
        kept = [each for each in earlier.get(name) or [] if each not in now[name]]
        now[name] = [*kept, *now[name]]
    for name in ("variants", "weights"):
        now[name] = {**(earlier.get(name) or {}), **now[name]}
    return build(CompareConfig, now, str(path))


def _refuse_difference(where: str, earlier: Any, now: Any) -> None:
    """Refuses a changed value by its own name, however deep it lies."""
    if isinstance(earlier, dict) and isinstance(now, dict):
        for name in {**earlier, **now}:
            _refuse_difference(f"{where}.{name}", earlier.get(name), now.get(name))
    elif earlier != now:
        raise UserError(
            f"{where}: is {now!r}, but this comparison began with {earlier!r} (set it back, or "
            "choose a new output)"
        )


def run_stage(stage: Stage, command: list[str], environment: dict[str, str]) -> float:
    """Runs a stage to its end; returns its seconds, those of earlier attempts included.

    Raises:
        UserError: with the stage's own line, if it refuses its input.
        SystemExit: with its exit code, if it fails otherwise; the tail of its log is shown.
    """
    with disk_errors_named(stage.log.parent):
        stage.log.parent.mkdir(parents=True, exist_ok=True)
    if stage.config is not None:
        path, sections = stage.config
        write_text(path, yaml.safe_dump(sections, sort_keys=False, allow_unicode=True))
    begun = time.monotonic()
    with open(stage.log, "a", encoding="utf-8") as log:
        log.write(f"$ {' '.join(command)}\n")
        log.flush()
        child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            code = child.wait()
        except KeyboardInterrupt:
            child.terminate()  # it saves, and exits with 3
            child.wait()
            raise
        finally:
            seconds = _add_time(stage, time.monotonic() - begun)
    if code == EXIT_SIGNALLED:
        raise KeyboardInterrupt
    if code or not stage.done:
        _refuse(stage, code)
    return seconds


def _refuse(stage: Stage, code: int) -> None:
    lines = stage.log.read_text(encoding="utf-8", errors="replace").splitlines()
    mark = "megatron-scalebio: error: "
    said = next((line for line in reversed(lines) if mark in line), None)
    if said is not None:  # torchrun turns the stage's 2 into a 1
        raise UserError(f"{stage.title}: {said.partition(mark)[2]}")
    tail = "\n".join(lines[-_LOG_TAIL:])
    print(f"{tail}\ncompare: {stage.title} failed with exit code {code}; all of it: {stage.log}")
    raise SystemExit(code if code not in (EXIT_OK, EXIT_USER_ERROR) else 1)


def _add_time(stage: Stage, seconds: float) -> float:
    path = stage.timing
    if path.exists():
        seconds += json.loads(path.read_text())["seconds"]
    write_json(path, {"seconds": seconds})
    return seconds


def _drop_training_state(stage: Stage) -> None:
    """Removes the models of a finished search: at 70B they would fill the disk, method by method.

    The weights, the report and every step's record stay.
    """
    if stage.product.name == WEIGHTS_FILE:
        for path in stage.product.parent.rglob("checkpoints"):
            shutil.rmtree(path)
