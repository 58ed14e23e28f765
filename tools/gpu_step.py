"""Two parts of gpu_check: where a step waits for the GPU, and what steps of large layers cost."""

from __future__ import annotations

import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from gpu_tools import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

# Qwen2.5-7B's layers, but for as many key heads as query heads.
SHAPE = {"layers": 3, "hidden": 3584, "ffn": 18944, "head-dim": 128, "seq-length": 4096}
LISA_SHAPE = {**SHAPE, "layers": 8, "lisa-layers": 1}
SMALL = {"layers": 4, "hidden": 128, "ffn": 256, "head-dim": 32, "seq-length": 64}
DENSE_BF16_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


def speed(check: Any) -> None:
    """Each kind of layer in turn: against Megatron's plain step in the same process."""
    import step_cost

    kinds = [("local", "")]
    if not check.rehearse:
        te = "transformer_engine"
        kinds = [(te, ""), (te, "tensorwise"), (te, "blockwise"), (te, "delayed"), *kinds]
    for kind, recipe in kinds:
        for part, shape in (("bilevel", SHAPE), ("lisa", LISA_SHAPE)):
            name = "-".join(filter(None, (kind, recipe, part)))
            arguments = _Arguments(SMALL if check.rehearse else shape, kind, recipe)
            start = time.perf_counter()
            try:
                found = getattr(step_cost, part)(check.folder / name, arguments)
                _add_use(found, part, arguments)
            except RuntimeError as error:
                found = {"failed": str(error)}
            found["all_seconds"] = time.perf_counter() - start
            check.results.add(name, found)
            _free()


def _add_use(found: dict[str, Any], part: str, arguments: _Arguments) -> None:
    """Adds what the card was used for: tokens a second, and its peak's share (MFU)."""
    tokens = 3 * arguments.micro_batches * arguments.seq_length
    found["plain_tokens_per_second"] = tokens / found[part]["unit_seconds"]
    peak = _peak_flops()
    if peak:
        seconds = tokens * _flops_per_token(arguments) / peak
        found["plain_mfu"] = seconds / found[part]["unit_seconds"]
        if part == "bilevel":
            found["bilevel_mfu"] = seconds / found[part]["seconds"]


def _free() -> None:
    """Gives back what the last models held, for the next ones."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        from transformer_engine.pytorch.quantization import FP8GlobalStateManager

        FP8GlobalStateManager.reset()
        torch.cuda.empty_cache()


def _flops_per_token(of: _Arguments) -> float:
    """Forward and backward, of matrix products alone; attention's causal half."""
    weights = 4 * of.hidden**2 + 3 * of.hidden * of.ffn
    attention = 2 * of.seq_length * of.hidden  # QKᵀ and its product with V, halved
    return 3.0 * of.layers * (2 * weights + attention)


def _peak_flops() -> float | None:
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((flops for card, flops in DENSE_BF16_FLOPS.items() if card in name), None)


def waits(check: Any) -> None:
    """Lines that block the host until the GPU is done, and the GPU's idle share, of one step."""
    from common import build
    from step_cost import settings, write_data

    from megatron_scalebio.methods.scalebio import train_step

    shape = SMALL if check.rehearse else SHAPE
    arguments = _Arguments(shape, "local" if check.rehearse else "transformer_engine")
    data = write_data(check.folder / "five", 5, arguments.seq_length)
    state = build(settings(data, arguments), Path(check.folder))
    for _ in range(3):
        train_step(state)
    state.clock.take()
    check.results.add("waiting_lines", _waiting_lines(lambda: train_step(state)))
    check.results.add("profile", _profile(lambda: train_step(state), steps=3))
    spent = state.clock.take()
    check.results.add("host_seconds", spent)


class _Arguments:
    """step_cost's."""

    def __init__(self, shape: dict[str, int], kind: str, recipe: str = "") -> None:
        self.layers, self.hidden, self.ffn = shape["layers"], shape["hidden"], shape["ffn"]
        self.head_dim, self.seq_length = shape["head-dim"], shape["seq-length"]
        self.lisa_layers, self.rounds = shape.get("lisa-layers", 1), 3
        self.micro_batches, self.micro_batch_size = 4, 1
        self.transformer_impl, self.bf16, self.fp8_recipe = kind, True, recipe
        self.experts: int | None = None
        self.vocab_size: int | None = None


def _waiting_lines(step: Any) -> dict[str, int]:
    """How often each line of this package or of Megatron waits; torch says so while it runs."""
    import torch

    if not torch.cuda.is_available():
        return {}
    lines: Counter[str] = Counter()

    def note(message: Any, *rest: Any, **more: Any) -> None:
        if "synchroniz" not in str(message):
            return
        frames = [f for f in traceback.extract_stack() if "megatron" in f.filename]
        ours = [f for f in frames if "megatron_scalebio" in f.filename]
        told = [f"{Path(f.filename).name}:{f.lineno} {f.line}" for f in ours[-1:] + frames[-1:]]
        lines[" < ".join(dict.fromkeys(told))] += 1

    shown, warnings.showwarning = warnings.showwarning, note
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = note
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        warnings.showwarning = shown
    return dict(lines.most_common())


def _profile(step: Any, steps: int) -> dict[str, Any]:
    import torch
    from torch.profiler import ProfilerActivity, profile

    if not torch.cuda.is_available():
        return {}
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
        wall = time.perf_counter() - start
    averages = seen.key_averages()
    on_gpu = [each for each in averages if each.self_device_time_total > 0]
    on_gpu.sort(key=lambda each: -each.self_device_time_total)
    busy = sum(each.self_device_time_total for each in on_gpu if each.device_type.name == "CUDA")
    calls = {each.key: each.count / steps for each in averages if "ynchronize" in each.key}
    return {
        "wall_s": wall / steps,
        "gpu_busy": busy / 1e6 / wall,
        "synchronizing_calls_a_step": calls,
        "most_time": {
            each.key[:90]: [round(each.self_device_time_total / 1e3 / steps, 2), each.count / steps]
            for each in on_gpu[:25] if each.device_type.name == "CUDA"
        },
    }  # fmt: skip
