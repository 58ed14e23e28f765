"""The subcommand ``status``: how far a run is, whether it still runs, and how it goes on.

Reads what the run leaves in its folder, and changes nothing there.
"""

import argparse
import json
import shlex
import time
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_scalebio.config_loader import load_config
from megatron_scalebio.errors import EXIT_OK, UserError
from megatron_scalebio.formatting import duration, percent, printable
from megatron_scalebio.guard.board import read_board
from megatron_scalebio.guard.lock import LOCK_FILE, RENEW_S, Holder
from megatron_scalebio.logs.records import METRICS_FILE, decode_record

_TAIL_BYTES = 2**22  # of the metrics: the last steps
_RECENT = 50  # steps
_SOURCES = 15

Json = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``status``."""
    parser.add_argument("run", metavar="RUN", help="output folder of `reweight` or `train`")


def run(args: argparse.Namespace) -> int:
    """Prints it; returns an exit code.

    Raises:
        UserError: the folder is not one of a run.
    """
    folder = Path(args.run)
    if not (folder / "run.json").is_file():
        raise UserError(
            "not the folder of a run: it has no run.json", where=str(folder),
            fix="name the output of reweight or train, once it has started",
        )  # fmt: skip
    info, records = _json(folder / "run.json"), _last_records(folder / METRICS_FILE)
    weights = _json(folder / "weights.json")
    console = Console(highlight=False, markup=False, soft_wrap=True)
    # A run that a signal stopped has ended in order, and is not at its end.
    done = weights.get("complete", True) if weights else (folder / "evaluation.json").is_file()
    ended = bool(info.get("ended")) and done
    state = "ended" if ended else _state(folder)
    console.print(f"{folder}: {state}" + (f", {info['ended']}" if ended else ""))
    config = load_config(str(folder / "config.yaml"))
    if records:
        for line in _progress(records, config.train.train_iters, running=state == "runs"):
            console.print(line)
    elif not weights:
        console.print("no step has been recorded yet")
    _show_weights(console, info, records, weights)
    if not ended:
        board = read_board(folder)
        for rank in board["ranks"]:
            console.print(f"rank {rank['rank']} ({rank['process']['host']}): {rank['where']}")
        if board["verdict"]:
            console.print(f"why it ended: {board['verdict']}")
    if weights.get("reason") and ended:
        console.print(
            ("converged: " if weights["converged"] else "not converged: ") + weights["reason"]
        )
    if state not in ("ended", "runs"):
        console.print(f"to resume, start it again: {_command(folder, info)}")
    return EXIT_OK


def _state(folder: Path) -> str:
    """`runs`, or what became of it, told by the lock that a run keeps renewing."""
    lock = folder / LOCK_FILE
    try:
        seen = lock.read_bytes()
    except FileNotFoundError:
        return "stopped"
    holder = Holder.read(seen)
    if holder and holder.process.is_near():
        return "killed" if holder.process.is_dead() else "runs"
    time.sleep(RENEW_S + 2)  # on another node: only a renewal shows that it lives
    try:
        return "runs" if lock.read_bytes() != seen else f"no sign of life of {holder}"
    except FileNotFoundError:
        return "stopped"


def _last_records(path: Path) -> list[Json]:
    if not path.is_file():
        return []
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        read = [decode_record(line) for line in file.read().splitlines()]
    return [record for record in read if record is not None][-_RECENT:]


def _progress(records: list[Json], train_iters: int, running: bool) -> list[str]:
    last = records[-1]
    step_s = median(record["step_time_s"] for record in records)
    left = duration(round(step_s * (train_iters - last["step"])))
    lines = [f"step {last['step']:,} of {train_iters:,}, {duration(step_s)} a step"]
    if last["step"] < train_iters:
        lines[0] += f", {left} {'left' if running else 'more to go'}"
    losses = {"validation": "validation_loss", "training": "train_loss_w"}
    known = [f"{name} loss {last[key]:.4f}" for name, key in losses.items() if last.get(key)]
    skipped = [record["step"] for record in records if record.get("skipped")]
    if skipped:
        known.append(f"{len(skipped)} of the last {len(records)} steps were not applied")
    return [*lines, ", ".join(known)]


def _show_weights(console: Console, info: Json, records: list[Json], weights: Json) -> None:
    """Those of weights.json once it is there, else those of the last step."""
    table = Table("source", box=None, padding=(0, 2, 0, 0), header_style="")
    table.add_column("weight", justify="right")
    if weights:
        table.add_column("interval", justify="right")
        shown = sorted(weights["sources"], key=lambda entry: -entry["weight"])
        for entry in shown[:_SOURCES]:
            ends = "–" if entry["ci_low"] is None else (
                f"{percent(entry['ci_low'])} – {percent(entry['ci_high'])}"
            )  # fmt: skip
            table.add_row(printable(entry["name"]), percent(entry["weight"]), ends)
        count = len(shown)
    elif records and records[-1].get("weights"):
        pairs = zip(info.get("sources", []), records[-1]["weights"], strict=True)
        ranked = sorted(pairs, key=lambda pair: -pair[1])
        for name, weight in ranked[:_SOURCES]:
            table.add_row(printable(name), percent(weight))
        count = len(ranked)
    else:
        return
    console.print(table)
    if count > _SOURCES:
        console.print(f"... and {count - _SOURCES:,} more sources")


def _command(folder: Path, info: Json) -> str:
    """The words that the run was started with."""
    try:
        words = shlex.split((folder / "command.txt").read_text())
    except (OSError, ValueError):
        return "with the command that it was started with"
    ranks = prod(size for name, size in (info.get("world") or {}).items() if name != "vpp")
    head = "megatron-scalebio"
    if ranks > 1:
        head = f"torchrun or srun, {ranks} ranks, of python -m megatron_scalebio"
    return " ".join([head, *words[1:]])


def _json(path: Path) -> Json:
    """{} where there is no such file, or it is being written."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
