"""Runs the `megatron-scalebio` command as users do, and many times over in one spawned process.

A start of the command takes seconds, most of them imports. `main` may be called again and again in
a rank, so that a scenario of many commands costs one start.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

ROOT = Path(__file__).resolve().parents[1]
MODEL = {
    "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 48,
    "make_vocab_size_divisible_by": 16,
}  # fmt: skip
# What differs between two runs of the same steps.
UNSTABLE = ("tokens_per_second", "step_time_s", "time_s", "memory_bytes", "straggler")
_DRAWN: set[str] = set()


def write_config(path: Path, sources: list[dict], validation: list[dict], **sections: dict) -> Path:
    """A run of 8 small steps; `sections` add to or replace its options."""
    tree: dict[str, dict[str, Any]] = {
        "data": {"seq_length": 16, "sources": sources, "validation": validation},
        "model": dict(MODEL),
        "train": {"train_iters": 8, "micro_batch_size": 2, "global_batch_size": 8},
        "checkpoint": {"save_interval": 2},
        "parallel": {"distributed_timeout_minutes": 1},
    }
    for name, section in sections.items():
        tree.setdefault(name, {}).update(section)
    path.write_text(yaml.safe_dump(tree))
    return path


def command(*argv: object) -> tuple[int | None, str]:
    """Calls `main` on this rank; its exit code (None: it crashed) and what it wrote to stderr."""
    from megatron.core import parallel_state

    from megatron_scalebio import runtime
    from megatron_scalebio.cli import main
    from megatron_scalebio.report import charts
    from tests.distributed.harness import next_layout

    said = io.StringIO()
    code: int | None = None
    with (
        contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()),
        mock.patch.object(charts, "render", _render_once),
    ):  # fmt: skip
        try:
            code = main([str(word) for word in argv])
        except Exception:  # noqa: BLE001  a crash is an outcome here
            said.write(traceback.format_exc())
    if parallel_state.model_parallel_is_initialized():
        if code is None:  # a rank that crashed can't wait for the others
            runtime.stop_model_parallel()
        else:
            next_layout()
    return code, said.getvalue()


def _render_once(chart: Any) -> Any:
    """Draws each chart of a report once in a process: they take a third of a small run's time."""
    from megatron_scalebio.report import svg

    drawn = chart.title in _DRAWN
    _DRAWN.add(chart.title)
    return "" if drawn else svg.render(chart)


def note(folder: Path, name: str, outcome: tuple[int | None, str]) -> None:
    """Leaves an outcome on this rank for pytest's process."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}-{os.environ['RANK']}.json").write_text(json.dumps(outcome))


def noted(folder: Path, name: str, rank: int = 0) -> tuple[int | None, str]:
    code, said = json.loads((folder / f"{name}-{rank}.json").read_text())
    return code, said


def ended_well(folder: Path, name: str) -> str:
    """What a noted command wrote, which has to have ended with 0."""
    code, said = noted(folder / "noted", name)
    assert code == 0, said
    return said


def found_weights(folder: Path, name: str) -> tuple[dict[str, Any], str]:
    """The weights.json of a noted run that ended well, in a folder of its name; what it wrote."""
    said = ended_well(folder, name)
    return json.loads((folder / name / "weights.json").read_text()), said


def refused(folder: Path, name: str, words: str) -> None:
    """Asserts that a noted command was refused, in one line with these words."""
    code, said = noted(folder / "noted", name)
    assert code == 2 and words in the_only_line(said), said


def start_command(*argv: object, ranks: int = 1) -> subprocess.Popen[str]:
    """Starts the real command, bare or under torchrun, in a session of its own."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    words = [*launcher, "-m", "megatron_scalebio", *(str(word) for word in argv)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment["PYTHONFAULTHANDLER"] = "1"  # for `processes.finish`
    return subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def wait_for_steps(run: Path, steps: int) -> None:
    log, deadline = run / "metrics.jsonl", time.monotonic() + 180
    while not log.exists() or log.read_bytes().count(b"\n") < steps:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def metrics(run: Path) -> list[dict[str, Any]]:
    """The steps of a run without what no two runs share."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in UNSTABLE} for record in records]


def the_only_line(said: str) -> str:
    """The one line that a mistake may cost, without its head."""
    lines = said.splitlines()
    assert len(lines) == 1, said
    assert lines[0].startswith("megatron-scalebio: error: "), said
    return lines[0].removeprefix("megatron-scalebio: error: ")
