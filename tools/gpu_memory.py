"""Two parts of gpu_check: memory against `plan`, and the largest model that fits.

A run's peak is what its own metrics say (`max_memory_allocated`); the plan is the command's, less
what it reserves for the driver and libraries, which the allocator does not count.
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from gpu_tools import ROOT, run

sys.path.insert(0, str(ROOT))

from tests.commands import write_config
from tests.markov import write_problem

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
DEEP = ["--lisa-layers", "1", "--no-lisa-train-embedding", "--recompute-granularity", "full"]
BOUND = 0.05


def memory(check: Any) -> None:
    """Planned and measured bytes of several layouts, and the part that the plan is off by."""
    _write(check.folder, SMALL if check.rehearse else SEVEN_B, 2, check.rehearse)
    with ThreadPoolExecutor(check.jobs) as pool:
        plans = list(pool.map(partial(plan, check.folder, check.rehearse), LAYOUTS))
    for (name, flags), planned in zip(LAYOUTS.items(), plans, strict=True):
        found: dict[str, Any] = {"planned_bytes": planned}
        try:
            found["measured_bytes"] = run_peak(check.folder, name, flags, steps=4)
            found["off"] = found["planned_bytes"] / found["measured_bytes"] - 1
            if not check.rehearse:  # on a CPU the measure is the process's, interpreter included
                found["within_bound"] = abs(found["off"]) <= BOUND
        except RuntimeError as error:
            found["failed"] = str(error)
        check.results.add(name, found)


def largest(check: Any) -> None:
    """The most layers of the 32B's shape whose bilevel LISA step is planned to fit, and do."""
    shape = SMALL if check.rehearse else THIRTY_TWO_B
    planned = {}
    for layers in (4, 8):
        _write(check.folder, shape, layers, check.rehearse)
        planned[layers] = plan(check.folder, check.rehearse, "deep")
    each = (planned[8] - planned[4]) // 4  # what is planned is linear in frozen layers
    room = planned[8] + 4 * each if check.rehearse else _device_bytes()
    most = 8 + (room - planned[8]) // each
    check.results.add("planned", {"layers": most, "bytes_a_layer": each, "room_bytes": room})
    for layers in (most, most - 2, most - 4):
        _write(check.folder, shape, layers, check.rehearse)
        try:
            peak = run_peak(check.folder, f"layers-{layers}", DEEP, steps=2)
        except RuntimeError as error:
            check.results.add(f"layers-{layers}", {"too_many": str(error)})
            continue
        expected = planned[8] + (layers - 8) * each
        found = {"planned_bytes": expected, "measured_bytes": peak, "off": expected / peak - 1}
        check.results.add(f"layers-{layers}", found)
        return


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
        train={"train_iters": 100, "micro_batch_size": 1, "global_batch_size": 2},
    )  # fmt: skip


def plan(folder: Path, rehearse: bool, layout: str) -> int:
    """Bytes of the fullest rank, without what is reserved."""
    flags, told = LAYOUTS.get(layout, DEEP), folder / f"plan-{layout}.json"
    words = ["plan", "--config", str(folder / "x.yaml"), "--gpus", "1", *flags]
    words += ["--gpu", "cpu" if rehearse else "h100-80g", "--json", str(told)]
    run(["-m", "megatron_scalebio", *words], {"CUDA_VISIBLE_DEVICES": ""})
    stages = json.loads(told.read_text())["stages"]
    return max(stage["total_bytes"] - stage["reserved_bytes"] for stage in stages)


def run_peak(folder: Path, name: str, flags: list[str], steps: int) -> int:
    """Peak bytes of a run's first steps; RuntimeError with what it said when it failed.

    The run is ended then: its checkpoint of tens of gigabytes would take longer than its steps.
    """
    log = folder / name / "metrics.jsonl"
    words = ["--config", str(folder / "x.yaml"), "--output", str(folder / name), *flags]

    def seen() -> list[str]:
        return log.read_text().split("\n")[:-1] if log.exists() else []  # whole lines

    run(["-m", "megatron_scalebio", "reweight", *words], until=lambda: len(seen()) >= steps)
    return max(json.loads(line)["memory_bytes"] for line in seen()[:steps])


def _device_bytes() -> int:
    return int(run(["-c", "import torch; print(torch.cuda.mem_get_info()[0])"]))
