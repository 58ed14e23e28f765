"""The subcommand ``status``: how far a run is, whether it still runs, and how it goes on.

Reads what the run leaves in its folder, and changes nothing there.
"""

import argparse
import json
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_scalebio.config_loader import load_config
from megatron_scalebio.errors import EXIT_OK, UserError
from megatron_scalebio.formatting import duration, percent, printable
from megatron_scalebio.guard.board import BOARD_FILE, read_board
from megatron_scalebio.guard.lock import LOCK_FILE, RENEW_S, Holder
from megatron_scalebio.logs.records import METRICS_FILE, decode_record

_TAIL_BYTES = 2**22  # of the metrics: the last steps
_RECENT = 50  # steps
_SHOWN = 15  # groups, sources

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
        age = "" if ended else f"; the last step ended {_age(folder / METRICS_FILE)}"
        lines = _progress(records, config.train.train_iters, running=state == "runs")
        lines[0] += age
        for line in lines:
            console.print(line)
    elif not weights:
        console.print("no step has been recorded yet")
    _show_weights(console, info, records, weights)
    if not ended:
        board = read_board(folder)
        for rank in board["ranks"]:
            name = f"rank {rank['rank']} ({rank['process']['host']})"
            console.print(f"{name}, {_age(folder / BOARD_FILE)}: {rank['where']}")
        if board["verdict"]:
            console.print(f"why it ended: {board['verdict']}")
    if weights.get("reason") and ended:
        console.print(
            ("converged: " if weights["converged"] else "not converged: ") + weights["reason"]
        )
    if state not in ("ended", "runs"):
        console.print("to resume, start it again, in the folder in which it was started:")
        console.print(_command(folder))
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
        lines[0] += f", {left} {'left' if running else 'of training left'}"
    losses = {"validation": "validation_loss", "training": "train_loss_w"}
    known = [f"{name} loss {last[key]:.4f}" for name, key in losses.items() if last.get(key)]
    skipped = [record["step"] for record in records if record.get("skipped")]
    if skipped:
        known.append(f"{len(skipped)} of the last {len(records)} steps were not applied")
    return [*lines, ", ".join(known)]


def _show_weights(console: Console, info: Json, records: list[Json], weights: Json) -> None:
    """Those of weights.json once it is there, else those of the last step; groups before sources.

    Of groups in several levels, those of the first.
    """
    if weights:
        groups, sources = weights.get("groups", []), weights["sources"]
        groups = [group for group in groups if group["level"] == groups[0]["level"]]
    else:
        last = records[-1] if records else {}
        groups = _entries(last.get("group_weights", {}).items())
        sources = _entries(zip(info.get("sources", []), last.get("weights") or [], strict=False))
    for kind, entries in (("group", groups), ("source", sources)):
        _show_largest(console, kind, entries)


def _entries(pairs: Iterable[tuple[str, float]]) -> list[Json]:
    return [{"name": name, "weight": weight} for name, weight in pairs]


def _show_largest(console: Console, kind: str, entries: list[Json]) -> None:
    if not entries:
        return
    table = Table(kind, box=None, padding=(0, 2, 0, 0), header_style="")
    table.add_column("weight", justify="right")
    if "ci_low" in entries[0]:
        table.add_column("interval", justify="right")
    for entry in sorted(entries, key=lambda entry: -entry["weight"])[:_SHOWN]:
        cells = [printable(entry["name"]), percent(entry["weight"])]
        if "ci_low" in entry:
            known = entry["ci_low"] is not None
            ends = f"{percent(entry['ci_low'])} – {percent(entry['ci_high'])}"
            cells.append(ends if known else "–")
        table.add_row(*cells)
    console.print(table)
    if len(entries) > _SHOWN:
        console.print(f"... and {len(entries) - _SHOWN:,} more {kind}s")


def _age(path: Path) -> str:
    """How long ago a file was written to."""
    return f"{duration(max(0, round(time.time() - path.stat().st_mtime)))} ago"


def _command(folder: Path) -> str:
    """What the run was started with."""
    try:
        return (folder / "command.txt").read_text().strip()
    except OSError:
        return "(command.txt, which would name the command, is not there)"


def _json(path: Path) -> Json:
    """{} where there is no such file, or it is being written."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
