"""The plan against real runs on gloo ranks: what they hold, by rank and kind, and activations.

Weights, gradients and optimizer state must be equal to the byte. Activations are what autograd
saves, seen by its hooks, and the chunks' outputs, which the schedule keeps: an account of its own.
"""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import numpy as np
import pytest

from tests.distributed.harness import next_layout, run_distributed
from tests.markov import VOCAB, write_source

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SEQ, STEPS = 32, 4  # two periods of LISA
TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
VPP = {**PP2, "num_layers_per_virtual_pipeline_stage": 2}
BF16, DIST = {"bf16": True}, {"use_distributed_optimizer": True}
FULL, SELECTIVE = {"recompute_granularity": "full"}, {"recompute_granularity": "selective"}
LISA = {"lisa_layers": 2, "lisa_interval": 2}
FROZEN = {**LISA, "lisa_train_embedding": False, "lisa_train_norm": False}
UNTIED = {"untie_embeddings_and_output_weights": True}
NORMS = {"qk_l2_norm": True, "no_rope_freq": [4], "rotary_interleaved": True}
EP2 = {"expert_model_parallel_size": 2}
EXPERTS = {"num_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 48}
GPT = {"swiglu": False, "normalization": "LayerNorm", "add_bias_linear": True}

# name: (ranks, parallel, lisa, model)
CASES: dict[str, tuple[int, dict, dict, dict]] = {
    "fp32": (1, {}, {}, {}),
    "bf16-lisa": (1, BF16, LISA, {}),
    "gpt-lisa-frozen": (1, BF16, FROZEN, GPT),
    "norms-without-weights-lisa": (1, BF16, LISA, NORMS),
    "fp32-distributed-optimizer-lisa": (1, DIST, LISA, {}),
    "recompute-full": (1, {**BF16, **FULL}, {}, UNTIED),
    "recompute-selective-lisa": (1, {**BF16, **SELECTIVE}, LISA, {}),
    "pp2-fp32": (2, PP2, {}, {}),
    "pp2-bf16-lisa": (2, {**PP2, **BF16}, LISA, UNTIED),
    "pp2-recompute-full-lisa": (2, {**PP2, **BF16, **FULL}, LISA, {}),
    "vpp-bf16-lisa": (2, {**VPP, **BF16}, LISA, {}),
    "vpp-fp32": (2, VPP, {}, UNTIED),
    "tp2-sequence-parallel-lisa": (2, {**TP2, **BF16, "sequence_parallel": True}, LISA, {}),
    "dp2-distributed-optimizer-lisa": (2, {**BF16, **DIST}, LISA, {}),
    "cp2-lisa": (2, {**BF16, "context_parallel_size": 2}, LISA, {}),
    "ep2-lisa": (2, {**BF16, **EP2}, LISA, EXPERTS),
    "vpp-dp2-distributed-optimizer": (4, {**VPP, **BF16, **DIST}, {}, {}),
}


def load(folder: Path, name: str):
    from megatron_scalebio.config_loader import load_config

    _, parallel, lisa, model = CASES[name]
    entries = [{"name": n, "path": str(folder / n)} for n in ("a", "b", "validation")]
    settings = {
        "data": {"seq_length": SEQ, "sources": entries[:2], "validation": entries[2:]},
        "model": {
            "num_layers": 8, "hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2,
            "vocab_size": VOCAB, **model,
        },
        "parallel": parallel,
        "lisa": lisa,
        "train": {"micro_batch_size": 2, "global_batch_size": 8, "train_iters": STEPS},
    }  # fmt: skip
    return load_config(None, settings)


def run_for_real(folder: str, names: list[str]) -> None:
    import torch

    from megatron_scalebio import runtime

    for name in names:
        config = load(Path(folder), name)
        config.validate(CASES[name][0])
        runtime.start(config)
        found = measure(config, Path(folder))
        (Path(folder) / f"{name}-{torch.distributed.get_rank()}.json").write_text(json.dumps(found))
        next_layout()


def measure(config, folder: Path) -> list[dict]:
    """Bytes by kind in each step."""
    import torch

    from megatron_scalebio.methods.scalebio import TrainState, train_step

    state = TrainState(config, folder / "cache")
    found = []
    for _ in range(STEPS):
        twins = state.training.enter_period().twins
        saved = Saved(state)
        for twin in twins:
            twin.register_forward_hook(lambda *call, saved=saved: saved.pack(call[2]))
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
            train_step(state)
        found.append({"activations": saved.most, **held(state)})
    return found


class Saved:
    """Bytes that autograd keeps for backward passes: each storage once, weights left out."""

    def __init__(self, state) -> None:
        chunks = [*state.training.w, *state.training.u]
        tensors = [t for c in chunks for t in (*c.parameters(), *c.buffers())]
        self._known = {t.untyped_storage()._cdata for t in tensors}
        self._live: dict[int, tuple] = {}
        self.most = 0

    def pack(self, tensor):
        import torch

        storage = tensor.untyped_storage()
        key = storage._cdata
        recomputed = torch._C._current_graph_task_id() != -1
        if not recomputed and key not in self._known and key not in self._live:
            forget = weakref.ref(storage, lambda _: self._live.pop(key))
            self._live[key] = (storage.nbytes(), forget)
            self.most = max(self.most, sum(size for size, _ in self._live.values()))
        return tensor


def held(state) -> dict[str, int]:
    """Bytes of weights, gradients, masters and Adam's moments, from the optimizers' own state."""
    period, seen = state.training.period, set()

    def new_bytes(tensors) -> int:
        total = 0
        for tensor in tensors:
            pointer = tensor.untyped_storage().data_ptr()
            total += tensor.untyped_storage().nbytes() if pointer not in seen else 0
            seen.add(pointer)
        return total

    parts = [
        part.optimizer
        for optimizer in period.optimizers.values()
        for part in optimizer.chained_optimizers
        if not part.is_stub_optimizer
    ]
    ddps = [ddp for of_model in period.ddp.values() for ddp in of_model]
    states = [moments for part in parts for moments in part.state.values()]
    return {
        "weights w": new_bytes(p.data for chunk in state.training.w for p in chunk.parameters()),
        "weights u": new_bytes(p.data for chunk in state.training.u for p in chunk.parameters()),
        "gradients": new_bytes(
            b.grad_data for ddp in ddps for b in (*ddp.buffers, *ddp.expert_parallel_buffers)
        ),
        "fp32 masters": new_bytes(
            p for part in parts for group in part.param_groups for p in group["params"]
        ),
        "Adam state": new_bytes(m[k] for m in states for k in ("exp_avg", "exp_avg_sq")),
    }  # fmt: skip


def rehearse_all(folder: str) -> None:
    from megatron_scalebio.plan.hardware import gpu_named
    from megatron_scalebio.plan.layout import Layout, draws
    from megatron_scalebio.plan.rehearsal import rehearse

    for name, (ranks, *_) in CASES.items():
        config = load(Path(folder), name)
        layout = Layout.of(config, ranks, gpu_named("cpu"))
        drawn = draws(config, layout)
        found = [
            [
                {"activations": sum(memory.activation_bytes.values()), **memory.held_bytes}
                for memory in (rehearse(config, layout, stage, active) for active in drawn)
                for _ in range(STEPS // len(drawn))
            ]
            for stage in range(layout.pp)
        ]
        (Path(folder) / f"{name}-plan.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    for name in ("a", "b", "validation"):
        rows = np.random.default_rng(3).integers(VOCAB, size=(40, SEQ + 1))
        write_source(folder, name, list(rows))
    run_distributed(rehearse_all, 1, str(folder))
    for ranks in (1, 2, 4):
        names = [name for name in CASES if CASES[name][0] == ranks]
        run_distributed(run_for_real, ranks, str(folder), names)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_plan_equals_the_run(folder: Path, name: str) -> None:
    planned = json.loads((folder / f"{name}-plan.json").read_text())
    ranks = CASES[name][0]
    for rank in range(ranks):
        stage = rank * len(planned) // ranks
        measured = json.loads((folder / f"{name}-{rank}.json").read_text())
        for step, (plan, real) in enumerate(zip(planned[stage], measured, strict=True)):
            where = f"rank {rank} step {step}: {plan} {real}"
            assert plan["FP8 copies"] == 0
            for kind in ("weights w", "weights u", "gradients"):
                assert plan[kind] == real[kind], f"{kind} {where}"
            for kind in ("fp32 masters", "Adam state"):
                # A shard of the distributed optimizer ends where parameters do.
                assert abs(plan[kind] - real[kind]) <= 0.01 * real[kind], f"{kind} {where}"
            assert abs(plan["activations"] / real["activations"] - 1) <= 0.1, where
