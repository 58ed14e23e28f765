"""What the benchmarks share: building a run in this process, tables, result files."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for `tests.markov`
warnings.filterwarnings("ignore", category=UserWarning, module="megatron")

import torch  # noqa: E402

from megatron_scalebio import runtime  # noqa: E402
from megatron_scalebio.config.presets import PRESETS  # noqa: E402
from megatron_scalebio.config_loader import load_config  # noqa: E402
from megatron_scalebio.methods.scalebio import TrainState, train_step, verdict  # noqa: E402

# The mixture as the method was published: AdamW on λ under a cosine, u never reset, equal counts.
PUBLISHED = {key: PRESETS["paper"]["bilevel"][key] for key in (
    "mixture_optimizer", "lr_lambda", "lr_lambda_decay_style", "resync_interval", "floor_share"
)}  # fmt: skip


def prepare(files: dict[str, Path], out: Path, pieces: int, seq_length: int) -> None:
    """Tokenizes files by name, with a SentencePiece model trained on them."""
    command = [sys.executable, "-m", "megatron_scalebio", "prepare", "--out", str(out)]
    command += ["--train-sentencepiece", str(pieces), "--seq-length", str(seq_length)]
    for name, file in files.items():
        command += ["--input", f"{name}={file}"]
    subprocess.run(command, check=True, cwd=ROOT)


def add_precision_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--transformer-impl", default="auto")
    parser.add_argument("--fp8-recipe", help="FP8 (hybrid) with this scaling; needs --bf16")


def precision(args: Any) -> dict[str, Any]:
    """Section `parallel` of a configuration, as `add_precision_arguments` says."""
    fp8 = {"fp8_format": "hybrid", "fp8_recipe": args.fp8_recipe} if args.fp8_recipe else {}
    return {"bf16": args.bf16, **fp8}


def build(settings: dict[str, dict[str, Any]], cache: Path) -> TrainState:
    """The state of a run, on the ranks that the launcher started (one if there is none)."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    config = load_config(None, settings)
    config.validate(runtime.world_size_from_environment())
    runtime.start(config)
    return TrainState(config, cache)


def learn(state: TrainState, trace_every: int = 0) -> dict[str, Any]:
    """Runs all steps; the weights, their intervals, the verdict and the mixture's trajectory."""
    trace = []
    while state.step < state.config.train.train_iters:
        if trace_every and state.step % trace_every == 0:
            trace.append(state.training.mixture.probs_S.tolist())
        result = train_step(state)
        assert result.skipped is None, result.skipped
    state.check_weights()
    intervals = state.intervals()
    judged = verdict(state)
    return {
        "weights": intervals.weight_S.tolist(),
        "low": intervals.low_S.tolist(),
        "high": intervals.high_S.tolist(),
        "draw": state.check and state.check.draw_SS.diagonal().sqrt().tolist(),
        "last": state.training.mixture.probs_S.tolist(),
        "converged": judged.converged,
        "reason": judged.reason,
        "trajectory": trace,
    }


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table, columns padded to one width."""
    cells = [list(head), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[n]) for line in cells) for n in range(len(head))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) + " |"
             for r in cells]  # fmt: skip
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def write_json(path: Path | None, content: Any) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n")
