"""The `compare` command: runs every method under every seed, and writes one comparison.

Every stage is the command that a user would give, in a process of its own; what it prints goes to a
file beside what it makes. A stage that has made its product is not run again, so a comparison that
was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import yaml
from rich.console import Console

from megatron_scalebio.compare.config import CompareConfig, load, resolved_text
from megatron_scalebio.compare.results import collect, write
from megatron_scalebio.compare.stages import Plan, Stage
from megatron_scalebio.config_loader import read_yaml
from megatron_scalebio.errors import (
    EXIT_OK,
    EXIT_SIGNALLED,
    EXIT_USER_ERROR,
    UserError,
    sigterm_interrupts,
)
from megatron_scalebio.report.summary import duration

# What may change between two starts of one comparison: runs are added, none made invalid.
EXTENDABLE = ("methods", "seeds", "tasks", "ranks", "launcher", "variants", "weights")
TIMING_FILE = "timing.json"
_LOG_TAIL = 15  # lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``compare``."""
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
    console = Console(highlight=False)
    if args.dry_run:
        for stage in plan:
            if not stage.product.exists():
                console.print(f"# {stage.title}\n{' '.join(plan.command(stage))}", soft_wrap=True)
        return EXIT_OK
    _keep_or_refuse(config)
    stages = list(plan)
    try:
        with sigterm_interrupts():
            for number, stage in enumerate(stages, 1):
                if not stage.product.exists():
                    console.print(f"[{number}/{len(stages)}] {stage.title} ...", markup=False)
                    seconds = run_stage(stage, plan.command(stage))
                    console.print(f"    {duration(round(seconds))}")
                _drop_training_state(stage)
    except KeyboardInterrupt:
        console.print("compare: stopped; the same command goes on from there")
        return EXIT_SIGNALLED
    finally:
        comparison = collect(plan)
        if comparison["methods"]:
            write(plan.output, comparison, console)
    return EXIT_OK


def _keep_or_refuse(config: CompareConfig) -> None:
    """Writes the comparison's configuration to its output, or checks that it is the one there."""
    path = Path(config.output) / "compare.yaml"
    if path.exists():
        earlier = read_yaml(str(path), known=vars(config))
        now = yaml.safe_load(resolved_text(config))
        for name, value in now.items():
            if name not in EXTENDABLE and earlier.get(name) != value:
                raise UserError(
                    f"{value!r} is not {earlier.get(name)!r}, with which this comparison began",
                    where=f"{path}: {name}",
                    mend="set it back, or choose a new output",
                )
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, resolved_text(config))


def run_stage(stage: Stage, command: list[str]) -> float:
    """Runs a stage to its end; returns its seconds, those of earlier attempts included.

    Raises:
        UserError: with the stage's own line, if it refuses its input.
        SystemExit: with its exit code, if it fails otherwise; the tail of its log is shown.
    """
    stage.log.parent.mkdir(parents=True, exist_ok=True)
    if stage.config is not None:
        path, sections = stage.config
        _write(path, yaml.safe_dump(sections, sort_keys=False, allow_unicode=True))
    begun = time.monotonic()
    with open(stage.log, "a", encoding="utf-8") as log:
        log.write(f"$ {' '.join(command)}\n")
        log.flush()
        child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
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
    if code or not stage.product.exists():
        _refuse(stage, code)
    return seconds


def _refuse(stage: Stage, code: int) -> None:
    lines = stage.log.read_text(encoding="utf-8", errors="replace").splitlines()
    mark = "megatron-scalebio: error: "
    said = next((line for line in reversed(lines) if mark in line), None)
    if said is not None:  # torchrun turns the stage's 2 into a 1
        raise UserError(said.partition(mark)[2], where=stage.title)
    tail = "\n".join(lines[-_LOG_TAIL:])
    print(f"{tail}\ncompare: {stage.title} failed with exit code {code}; all of it: {stage.log}")
    raise SystemExit(code if code not in (EXIT_OK, EXIT_USER_ERROR) else 1)


def _add_time(stage: Stage, seconds: float) -> float:
    path = stage.log.with_suffix("." + TIMING_FILE)
    if path.exists():
        seconds += json.loads(path.read_text())["seconds"]
    _write(path, json.dumps({"seconds": seconds}) + "\n")
    return seconds


def _drop_training_state(stage: Stage) -> None:
    """Removes the models of a finished search: at 70B they would fill the disk, method by method.

    The weights, the report and every step's record stay.
    """
    if stage.product.name == "weights.json" and stage.product.exists():
        for path in stage.product.parent.rglob("checkpoints"):
            shutil.rmtree(path)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write: {error.strerror}", where=str(path)) from None
