"""Two parts of gpu_check: memory against `plan`, and the largest model that fits.

A run's peak is what its own metrics say (`max_memory_allocated`); the plan is the command's, less
what it reserves for the driver and libraries, which the allocator does not count.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.commands import write_config  # noqa: E402
from tests.markov import write_problem  # noqa: E402

# Layers of Qwen2.5-7B's and 32B's shape; the rehearsal's are small.
SEVEN_B = {
    "hidden_size": 3584, "ffn_hidden_size": 18944, "num_attention_heads": 28,
    "num_query_groups": 4, "add_qkv_bias": True, "vocab_size": 152064,
    "untie_embeddings_and_output_weights": True,
}  # fmt: skip
THIRTY_TWO_B = {**SEVEN_B, "hidden_size": 5120, "ffn_hidden_size": 27648,
                "num_attention_heads": 40, "num_query_groups": 8}  # fmt: skip
SMALL = {"hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4, "vocab_size": 512}
LAYOUTS: dict[str, list[str]] = {
    "full": [],
    "lisa": ["--lisa-layers", "1", "--lisa-interval", "2"],
    "recompute": ["--recompute-granularity", "full"],
    "lisa-recompute": ["--lisa-layers", "1", "--recompute-granularity", "full"],
}
BOUND = 0.05


def memory(folder: Path, rehearse: bool) -> dict[str, Any]:
    """Planned and measured bytes of several layouts, and the part that the plan is off by."""
    _write(folder, SMALL if rehearse else SEVEN_B, layers=4, rehearse=rehearse)
    result: dict[str, Any] = {}
    for name, flags in LAYOUTS.items():
        planned = plan(folder, flags, rehearse)
        measured = run(folder, name, flags)
        if isinstance(measured, str):
            result[name] = {"planned_bytes": planned, "failed": measured}
            continue
        off = planned / measured - 1
        result[name] = {"planned_bytes": planned, "measured_bytes": measured, "off": off}
        if not rehearse:  # on a CPU the measure is the process's, interpreter included
            result[name]["within_bound"] = abs(off) <= BOUND
    return result


def largest(folder: Path, rehearse: bool) -> dict[str, Any]:
    """The most layers of the 32B's shape whose bilevel LISA step is planned to fit, and do."""
    flags = ["--lisa-layers", "4", "--no-lisa-train-embedding", "--recompute-granularity", "full"]
    shape = SMALL if rehearse else THIRTY_TWO_B
    room = 10**9 if rehearse else _device_bytes()
    low, high = 4, 8 if rehearse else 96
    while low < high:  # what is planned to fit, by halving
        middle = (low + high + 1) // 2
        _write(folder, shape, middle, rehearse)
        low, high = (middle, high) if plan(folder, flags, rehearse) <= room else (low, middle - 1)
    result: dict[str, Any] = {"planned_layers": low}
    if rehearse:
        return result
    for layers in range(low + 2, low - 6, -1):
        _write(folder, shape, layers, rehearse)
        measured = run(folder, f"layers-{layers}", flags)
        if not isinstance(measured, str):
            planned = plan(folder, flags, rehearse)
            return {**result, "layers": layers, "bytes": measured, "planned_bytes": planned}
    return {**result, "failed": measured}


def _write(folder: Path, shape: dict[str, Any], layers: int, rehearse: bool) -> None:
    length = 64 if rehearse else 4096
    data = folder / "data"
    if not (folder / "problem.json").exists():
        problem = write_problem(data, [0.5, 0.5], 0, length=length + 1, examples=8, validation=8)
        (folder / "problem.json").write_text(json.dumps(problem))
    sources, validation = json.loads((folder / "problem.json").read_text())
    write_config(
        folder / "x.yaml", sources, validation,
        data={"seq_length": length},
        model={"num_layers": layers, "make_vocab_size_divisible_by": 128, **shape},
        parallel={"bf16": True}, checkpoint={"save_interval": 0},
        train={"train_iters": 4, "micro_batch_size": 1, "global_batch_size": 2},
    )  # fmt: skip


def plan(folder: Path, flags: list[str], rehearse: bool) -> int:
    """Bytes of the fullest rank, without what is reserved."""
    words = ["plan", "--config", str(folder / "x.yaml"), "--gpus", "1", *flags]
    words += ["--gpu", "cpu" if rehearse else "h100-80g", "--json", str(folder / "plan.json")]
    _command(words, {"CUDA_VISIBLE_DEVICES": ""})
    stages = json.loads((folder / "plan.json").read_text())["stages"]
    return max(stage["total_bytes"] - stage["reserved_bytes"] for stage in stages)


def run(folder: Path, name: str, flags: list[str]) -> int | str:
    """Peak bytes of a run of four steps, or what it said when it failed."""
    output = folder / name
    words = ["reweight", "--config", str(folder / "x.yaml"), "--output", str(output), *flags]
    try:
        _command(words, {})
    except RuntimeError as error:
        return str(error)
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return max(record["memory_bytes"] for record in records)


def _command(words: list[str], environment: dict[str, str]) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "megatron_scalebio", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if ended.returncode:
        raise RuntimeError(f"exit {ended.returncode}: {ended.stderr[-800:]}")


def _device_bytes() -> int:
    said = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.cuda.mem_get_info()[0])"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return int(said.stdout)
