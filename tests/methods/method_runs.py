"""What the tests of rivals' runs share: a problem, and a rank on which commands run in turn."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from tests.commands import command, metrics, note, noted, write_config
from tests.markov import write_problem

SIZES, GIVEN = (300, 180, 120), (1.0, 3.0, 6.0)  # where weights are given, most is junk's
Runs = dict[str, tuple[int, str, list]]  # name: (ranks, method, flags)


def write_configs(folder: Path) -> None:
    """Three sources, the third junk, and two validation sets, which count three to one."""
    sources, [first] = write_problem(
        folder / "data", [0.7, 0.3, 0.0], 0, length=17, examples=SIZES, validation=40
    )
    _, [second] = write_problem(
        folder / "more", [0.3, 0.7, 0.0], 0, length=17, examples=1, validation=20
    )
    validation = [{**first, "weight": 3.0}, {**second, "name": "second", "weight": 1.0}]
    given = [{**s, "initial_weight": w} for s, w in zip(sources, GIVEN, strict=True)]
    for name, entries in (("x", sources), ("given", given)):
        write_config(
            folder / f"{name}.yaml", entries, validation,
            optimizer={"lr": 5e-3, "adam_eps": 1e-5}, checkpoint={"save_interval": 0},
        )  # fmt: skip


def run(folder: Path, output: str, method: str, flags: list, noted_as: str = "") -> None:
    given = output == "manual" or output.startswith(("doremi-few", "regmix-"))
    config = folder / ("given.yaml" if given else "x.yaml")
    words = ["--config", config, "--output", folder / output, "--method", method]
    note(folder / "noted", noted_as or output, command("reweight", *words, *flags))


def stop_and_go_on(
    folder: Path, runs: Runs, output: str, like: str, stops: list[tuple[str, int]]
) -> None:
    """Signals a run after some steps of its parts, and starts it again each time."""
    _, method, flags = runs[like]
    for number, (part, steps) in enumerate(stops):
        sender = threading.Thread(target=send_at, args=(folder / output / part, steps))
        sender.start()
        run(folder, output, method, flags, f"{output}-{number}")
        sender.join()
    run(folder, output, method, flags)


def send_at(run: Path, steps: int) -> None:
    log, deadline = run / "metrics.jsonl", time.monotonic() + 60
    while not log.exists() or log.read_bytes().count(b"\n") < steps:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGTERM)


def weights(run: Path) -> dict:
    return json.loads((run / "weights.json").read_text())


def require_whole(folder: Path, name: str, method: str) -> None:
    code, said = noted(folder / "noted", name)
    assert code == 0, said
    found = weights(folder / name)
    assert found["complete"] and (folder / name / "report.html").is_file()
    assert found["method"] == method and found["converged"] is False
    steps = found["step"] * len(found.get("proxies", [0]))
    assert metrics(folder / name)[-1]["step"] == steps > 0
    shares = [entry["weight"] for entry in found["sources"]]
    assert sum(shares) == pytest.approx(1.0) and min(shares) >= 0


def require_as_undisturbed(folder: Path, stopped: str, times: int, whole: str) -> None:
    for number in range(times):
        code, said = noted(folder / "noted", f"{stopped}-{number}")
        assert code == 3 and "the same command continues" in said, said
    code, said = noted(folder / "noted", stopped)
    assert code == 0 and "from step" in said, said
    assert weights(folder / stopped) == weights(folder / whole)
    assert metrics(folder / stopped) == metrics(folder / whole)
