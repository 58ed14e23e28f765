"""A made-up run folder of `reweight`, for the tests of logs and report: no training behind it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

FIVE = ["gpt4_alpaca", "alpaca", "stdlib_code", "shuffled_words", "random_bytes"]
PHASES = {"data": 0.004, "flush": 0.31, "update": 0.05, "mixture": 0.002, "log": 0.0006}


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Writes a synthetic run folder; takes `write_run`'s arguments."""

    def make(*args: Any, **options: Any) -> Path:
        return write_run(tmp_path / "run", *args, **options)

    return make


def write_run(
    path: Path,
    names: list[str] | None = None,
    *,
    steps: int = 600,
    train_iters: int = 600,
    converged: bool | None = True,
    known: bool = True,
    seed: int = 0,
) -> Path:
    """Writes a run of `steps` steps over `names`.

    Args:
        converged: what weights.json says; None leaves a run in progress, without weights.json.
        known: whether the configuration gives the true mixture.
    """
    names = names or FIVE
    path.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    truth = _true_mixture(len(names), rng)
    records = simulate(truth, steps, train_iters, rng)
    with open(path / "metrics.jsonl", "w") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    natural = rng.dirichlet(np.full(len(names), 1.5))
    known_weights = {
        name: round(float(w), 4) for name, w in zip(names, truth, strict=True) if w > 1e-3
    }
    _write_json(path / "run.json", run_info(names, natural, ended=converged is not None))
    config = config_tree(names, train_iters, known_weights if known else None)
    (path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (path / "command.txt").write_text("megatron-scalebio reweight --config run.yaml --lr 3e-4\n")
    if converged is not None:
        tail = np.mean([r["weights"] for r in records[-max(1, steps // 5) :]], axis=0)
        write_weights(path, names, tail, converged, steps)
    return path


def simulate(
    truth: np.ndarray, steps: int, train_iters: int, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """Exponentiated gradient towards `truth` under noise, with losses that decay."""
    size = len(truth)
    logits = np.zeros(size)
    base = 3.0 + rng.random(size)
    records = []
    for step in range(1, steps + 1):
        probs = np.exp(logits - logits.max())
        probs /= probs.sum()
        decay = np.exp(-step / 150)
        excess = 1.2 * (probs - truth) + 0.08 * rng.standard_normal(size)
        loss_w = base + 4 * decay + 0.1 * rng.standard_normal(size)
        warm = min(1.0, step / (0.03 * train_iters))
        lr = 3e-4 * warm * 0.5 * (1 + np.cos(np.pi * step / train_iters))
        logits -= 0.03 * warm * 10 * excess / np.maximum(0.15, probs * size) * probs * size
        time_s = {phase: s * (1 + 0.05 * rng.standard_normal()) for phase, s in PHASES.items()}
        l1 = 2.1 + 3.5 * decay + 0.04 * rng.standard_normal()
        records.append(
            {
                "step": step, "alpha": 10.0, "outer_round": 0, "lr_w": lr, "lr_u": lr,
                "lr_lambda": 0.03 * warm, "validation_loss": l1,
                "validation_losses": [l1 - 0.1, l1 + 0.1],
                "train_loss_w": float(probs @ loss_w),
                "train_loss_u": float(probs @ (loss_w - excess)),
                "weights": probs.tolist(), "loss_w": _maybe_absent(loss_w, step),
                "loss_u": _maybe_absent(loss_w - excess, step),
                "excess_loss": _maybe_absent(excess, step),
                "grad_norm_w": float(np.exp(rng.normal(0, 0.2)) * (1 + 6 * decay)),
                "grad_norm_u": float(np.exp(rng.normal(0, 0.2)) * (8 + 20 * decay)),
                "grad_norm_lambda": float(np.abs(excess).mean()),
                "tokens": 24576, "tokens_per_second": 24576 / sum(time_s.values()),
                "step_time_s": sum(time_s.values()), "time_s": time_s,
                "memory_bytes": 1_234_567_890,
                "skipped": f"w: source {step % size}: loss is nan" if step in (41, 310) else None,
                "active_layers": None,
            }
        )  # fmt: skip
    return records


def run_info(names: list[str], natural: np.ndarray, *, ended: bool) -> dict[str, Any]:
    return {
        "sources": names, "validation": ["gpt4_val", "code_val"], "natural": natural.tolist(),
        "world": {"tp": 2, "pp": 1, "dp": 1, "vpp": 1}, "device": "cpu", "parameters": 7_340_032,
        "started": "2025-03-01T10:00:00+00:00",
        "ended": "2025-03-01T10:04:10+00:00" if ended else None,
        "versions": {"megatron-scalebio": "0.1.0", "megatron-core": "0.16.1", "torch": "2.13.0"},
    }  # fmt: skip


def config_tree(names: list[str], train_iters: int, known: dict[str, float] | None) -> dict:
    return {
        "data": {
            "sources": [{"name": name, "path": f"prepared/{i}"} for i, name in enumerate(names)],
            "seq_length": 256,
            "known_weights": known,
        },
        "optimizer": {"lr": 3e-4},
        "bilevel": {"alpha": 10.0, "lr_lambda": 0.03, "tolerance": 0.05},
        "train": {"train_iters": train_iters, "global_batch_size": 32},
    }


def write_weights(
    path: Path, names: list[str], weights: np.ndarray, converged: bool, step: int
) -> None:
    half = 0.01 + 0.12 * np.sqrt(weights * (1 - weights)) * (1 if converged else 3)
    sources = [
        {
            "name": name, "path": f"prepared/{i}", "examples": 1000 + 37 * i, "weight": w,
            "ci_low": max(0.0, w - h), "ci_high": min(1.0, w + h),
            "initial_weight": 1 / len(names),
        }
        for i, (name, w, h) in enumerate(zip(names, weights.tolist(), half.tolist(), strict=True))
    ]  # fmt: skip
    reason = (
        "every 95% interval is within ±0.05 and the weights have stopped drifting"
        if converged
        else f"the interval of {names[0]} is ±0.21, wider than the tolerance ±0.05"
    )
    tree = {
        "step": step, "converged": converged, "confidence": 0.95, "sources": sources,
        "reason": reason,
    }  # fmt: skip
    _write_json(path / "weights.json", tree)
    kept = [s for s in sources if s["weight"] >= 1e-3]
    (path / "blend.txt").write_text(" ".join(f"{s['weight']:.6f} {s['path']}" for s in kept) + "\n")


def _true_mixture(size: int, rng: np.random.Generator) -> np.ndarray:
    if size == len(FIVE):
        return np.array([0.5, 0.3, 0.2, 0.0, 0.0])
    return rng.dirichlet(np.full(size, 0.25))


def _maybe_absent(values: np.ndarray, step: int) -> list[float | None]:
    return [None if (i + step) % 7 == 0 else float(v) for i, v in enumerate(values)]


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2))
