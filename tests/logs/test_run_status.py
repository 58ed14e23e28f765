"""`status` of a run that ended, goes on, or was cut off; no colours without a terminal."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_scalebio.cli import main
from megatron_scalebio.commands import status
from megatron_scalebio.guard.board import Board
from megatron_scalebio.guard.lock import LOCK_FILE, Holder
from megatron_scalebio.guard.status import Status
from tests.commands import ROOT, the_only_line

Capture = pytest.CaptureFixture[str]


def told(capsys: Capture, run: Path) -> list[str]:
    assert main(["status", str(run)]) == 0
    return capsys.readouterr().out.splitlines()


def age(path: Path, seconds: float) -> None:
    """Lets a file look as if it had been written so long ago."""
    os.utime(path, (time.time() - seconds,) * 2)


def test_status_of_a_run_that_ended(make_run: Callable[..., Path], capsys: Capture) -> None:
    run = make_run(steps=20, train_iters=20)
    lines = told(capsys, run)
    assert lines[0] == f"{run}: ended, 2025-03-01T10:04:10+00:00"
    assert lines[1].startswith("step 20 of 20, ") and "left" not in lines[1]
    weights = json.loads((run / "weights.json").read_text())["sources"]
    first = max(weights, key=lambda entry: entry["weight"])
    assert lines[4].split()[0] == first["name"] and "–" in lines[4]
    assert lines[-1].startswith("converged: every 95% interval")


def test_status_of_a_run_that_a_signal_stopped(
    make_run: Callable[..., Path], capsys: Capture
) -> None:
    run = make_run(steps=20, train_iters=50)
    weights = json.loads((run / "weights.json").read_text())
    (run / "weights.json").write_text(json.dumps(weights | {"complete": False}))
    age(run / "metrics.jsonl", 400)
    lines = told(capsys, run)
    assert lines[0] == f"{run}: stopped"
    assert lines[1].endswith(" s of training left; the last step ended 7 min ago")
    assert lines[-2].startswith("to resume, start it again, in the folder in which it was started:")
    assert lines[-1] + "\n" == (run / "command.txt").read_text()
    (run / "command.txt").unlink()
    assert "command.txt" in told(capsys, run)[-1]


def test_pace_and_skipped_steps_are_those_of_the_last_fifty(
    make_run: Callable[..., Path], capsys: Capture
) -> None:
    run = make_run(steps=120, train_iters=170, converged=None)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        early, step = record["step"] <= 70, record["step"]
        record["step_time_s"] = 9.0 if early else 2.0
        record["skipped"] = "w: training loss is nan" if early or step in (71, 90, 120) else None
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    lines = told(capsys, run)
    assert lines[1].startswith("step 120 of 170, 2 s a step, 100 s of training left; ")
    assert lines[2].endswith(", 3 of the last 50 steps were not applied")


def test_status_of_a_run_in_progress(
    make_run: Callable[..., Path], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(steps=20, train_iters=50, converged=None)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        record["step_time_s"] *= 5  # seconds, of which one step is more than rounding hides
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    age(run / "metrics.jsonl", 30)
    lines = told(capsys, run)
    assert lines[0] == f"{run}: stopped"
    step_s = float(np.median([record["step_time_s"] for record in records]))
    left = f"{round(30 * step_s)} s of training left"
    assert lines[1].startswith(f"step 20 of 50, {step_s:.3g} s a step, {left}; the last step ended")
    assert 30 <= int(lines[1].split()[-3]) < 60
    assert f"validation loss {records[-1]['validation_loss']:.4f}" in lines[2]
    largest = max(records[-1]["weights"])
    assert lines[4].split()[1] == f"{100 * largest:.1f}%"

    holder = Holder.this()
    (run / LOCK_FILE).write_bytes(holder.line(1))
    lines = told(capsys, run)
    assert lines[0] == f"{run}: runs" and " s left; the last step ended 3" in lines[1]
    assert not any("to resume" in line for line in lines)
    dead = replace(holder, process=replace(holder.process, started=1))
    (run / LOCK_FILE).write_bytes(dead.line(1))
    assert told(capsys, run)[0] == f"{run}: killed"
    away = replace(holder, process=replace(holder.process, boot="another", host="node7", pid=12))
    (run / LOCK_FILE).write_bytes(away.line(1))
    monkeypatch.setattr(status.time, "sleep", lambda _: None)
    assert told(capsys, run)[0] == f"{run}: no sign of life of node7, pid 12"
    renew = lambda _: (run / LOCK_FILE).write_bytes(away.line(2))  # noqa: E731
    monkeypatch.setattr(status.time, "sleep", renew)
    assert told(capsys, run)[0] == f"{run}: runs"

    board = Board(run)
    board.tell([Status(0, away.process, step=21, phase="flush", place="all_reduce")])
    board.close("rank 1 (node8, pid 3) died")
    age(run / "ranks.json", 200)
    lines = told(capsys, run)
    assert "rank 0 (node7), 3 min ago: step 21, phase flush (all_reduce)" in lines
    assert "why it ended: rank 1 (node8, pid 3) died" in lines


def test_groups_stand_before_their_sources(make_run: Callable[..., Path], capsys: Capture) -> None:
    run = make_run(["web/a", "web/b", "code/c"], steps=20, converged=None)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1]) | {"group_weights": {"code": 0.3, "web": 0.7}}
    (run / "metrics.jsonl").write_text("\n".join([*lines[:-1], json.dumps(last)]) + "\n")
    shown = [line.split() for line in told(capsys, run)]
    at = shown.index(["group", "weight"])
    assert shown[at + 1 : at + 4] == [["web", "70.0%"], ["code", "30.0%"], ["source", "weight"]]

    run = make_run(["web/a", "web/b", "code/c"], steps=20)
    content = json.loads((run / "weights.json").read_text())
    content["groups"] = [
        {"level": 2, "name": f"g{n}", "weight": n / 136, "ci_low": 0.0, "ci_high": 0.5}
        for n in range(17)
    ]
    content["groups"].append({**content["groups"][0], "level": 3, "weight": 1.0, "name": "part"})
    content["groups"][15] |= {"ci_low": None, "ci_high": None}
    (run / "weights.json").write_text(json.dumps(content))
    shown = [line.split() for line in told(capsys, run)]
    at = shown.index(["group", "weight", "interval"])
    assert shown[at + 1] == ["g16", "11.8%", "0%", "–", "50.0%"]
    assert shown[at + 2] == ["g15", "11.0%", "–"] and ["part"] not in [s[:1] for s in shown]
    assert shown[at + 16] == ["...", "and", "2", "more", "groups"]
    assert shown[at + 17] == ["source", "weight", "interval"]


def test_status_of_what_is_no_run(tmp_path: Path, capsys: Capture) -> None:
    assert main(["status", str(tmp_path)]) == 2
    assert "not the folder of a run: it has no run.json" in the_only_line(capsys.readouterr().err)


def test_nothing_is_coloured_or_redrawn_where_there_is_no_terminal(
    make_run: Callable[..., Path], tmp_path: Path, capfd: Capture
) -> None:
    run = make_run(steps=3)
    rows = [json.dumps({"text": "the spam of the eggs"})] * 3
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    tokenizer = ROOT / "tokenizers" / "english-code-1k.model"
    words = ["--input", f"a={tmp_path / 'a.jsonl'}", "--out", str(tmp_path), "--workers", "1"]
    assert main(["prepare", "--tokenizer", str(tokenizer), *words]) == 0
    for command in (["show", str(tmp_path / "a")], ["status", str(run)], ["report", str(run)], []):
        assert main(command) == 0
    out, err = capfd.readouterr()
    assert "spam" in out and not {"\x1b", "\r"} & {*out, *err}
