"""A plan of a mixture of experts: its weights, gradients, traffic and shards, by formula."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.harness import found_on_a_rank

pytestmark = pytest.mark.distributed

LAYERS, HIDDEN, VOCAB, SEQ, BATCH, EXPERTS, TOPK, WIDTH, SHARED = 2, 32, 128, 16, 2, 8, 2, 24, 40
ATTENTION = HIDDEN * 3 * HIDDEN + HIDDEN * HIDDEN + 2 * HIDDEN
EXPERT, OF_ALL = 3 * HIDDEN * WIDTH, 3 * HIDDEN * SHARED + HIDDEN * EXPERTS
ENDS = 2 * HIDDEN * VOCAB + HIDDEN
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
EP4 = {"expert_model_parallel_size": 4}
# name: (ranks, parallel)
CASES: dict[str, tuple[int, dict]] = {
    "one": (1, {}), "ep4": (4, EP4), "ep2 of dp4": (4, {"expert_model_parallel_size": 2}),
    "ep4 pp2 tp2": (16, {**EP4, **TP2, "pipeline_model_parallel_size": 2}),
    "ep4 tp2 whole": (4, {**EP4, **TP2, "expert_tensor_parallel_size": 1}),
    "mixed ep2 pp2": (8, {"expert_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
}  # fmt: skip
ESTIMATED = ("ep2 of dp4", "ep4 pp2 tp2", "mixed ep2 pp2")
# Some layers without experts, and as wide as twelve of them.
MIXED = {"num_layers": 6, "moe_layer_freq": [0, 1, 1, 0, 0, 1], "ffn_hidden_size": 12 * WIDTH}


def plan_all() -> dict[str, Any]:
    from megatron_scalebio.config_loader import load_config
    from megatron_scalebio.plan.checks import build_ranks, problems
    from megatron_scalebio.plan.estimate import Estimator
    from megatron_scalebio.plan.hardware import gpu_named
    from megatron_scalebio.plan.layout import Layout
    from megatron_scalebio.plan.planner import make_plan
    from megatron_scalebio.plan.search import candidates

    entries = [{"name": name, "path": name} for name in ("a", "b")]
    found: dict[str, Any] = {}
    gpu = gpu_named("h100-80g")
    for name, (ranks, parallel) in CASES.items():
        config = load_config(None, {
            "data": {"sources": entries, "validation": entries[:1], "seq_length": SEQ},
            "model": {
                "num_layers": LAYERS, "hidden_size": HIDDEN, "num_attention_heads": 4,
                "vocab_size": VOCAB, "untie_embeddings_and_output_weights": True,
                "num_experts": EXPERTS, "moe_router_topk": TOPK, "moe_ffn_hidden_size": WIDTH,
                "moe_shared_expert_intermediate_size": SHARED, "moe_aux_loss_coeff": 0.01,
                "qk_l2_norm": True,  # without weights
                **(MIXED if "mixed" in name else {}),
            },
            "parallel": {**parallel, "bf16": True, "use_distributed_optimizer": ranks > 1},
            "train": {"micro_batch_size": BATCH, "global_batch_size": 32},
        })  # fmt: skip
        layout = Layout.of(config, ranks, gpu)
        plan = make_plan(config, layout, 0.4)
        [first, *_] = plan.stages
        found[name] = {
            "parameters": first.parameters, "held": first.held_bytes, "layout": str(layout),
            "sent": first.sent_per_pass_bytes, "problems": problems(
                config, plan, build_ranks(config, layout)
            ), "seconds": plan.cost.expert_parallel_s, "passes": layout.passes,
        }  # fmt: skip
        if name in ESTIMATED:
            estimate = Estimator(0.4).estimate(config, layout).plan
            found[name]["plans"] = [
                [each.worst_bytes, each.cost.step_s] for each in (estimate, plan)
            ]
    config.parallel = type(config.parallel)(bf16=True)
    shapes = {
        (p.tensor_model_parallel_size, p.pipeline_model_parallel_size,
         p.expert_model_parallel_size, p.expert_tensor_parallel_size)
        for p in (candidate.parallel for candidate in candidates(config, 4, gpu))
    }  # fmt: skip
    return {**found, "candidates": sorted(shapes, key=str)}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return found_on_a_rank(plan_all)


@pytest.mark.parametrize(("name", "shared_by"), [("one", 1), ("ep4", 4), ("ep2 of dp4", 2)])
def test_a_rank_holds_its_share_of_the_experts(found: dict, name: str, shared_by: int) -> None:
    dense, experts = ATTENTION + OF_ALL, EXPERTS // shared_by * EXPERT
    weights = LAYERS * (dense + experts) + ENDS
    plan = found[name]
    assert plan["parameters"] == weights
    held = plan["held"]
    # Buffers of the distributed optimizer are padded.
    assert held["weights w"] == pytest.approx(2 * weights, rel=0.02)
    assert held["gradients"] == pytest.approx(8 * weights, rel=0.02)
    # fp32 masters of w and u: an expert's are dealt among the ranks that hold it.
    ranks = CASES[name][0]
    masters = 8 * ((LAYERS * dense + ENDS) / ranks + LAYERS * experts / (ranks // shared_by))
    assert plan["held"]["fp32 masters"] == pytest.approx(masters, rel=0.02)


@pytest.mark.parametrize("name", CASES)
def test_shards_of_all_ranks_make_up_the_model(found: dict, name: str) -> None:
    assert found[name]["problems"] == []
    assert ("(EP 4)" in found[name]["layout"]) == ("ep4" in name)


def test_tokens_travel_to_their_experts_and_back(found: dict) -> None:
    """Forward and backward, there and back: bf16 vectors, and fp32 weights there alone."""
    assert found["one"]["sent"]["EP"] == 0 and found["one"]["seconds"] == 0
    copies = BATCH * SEQ * TOPK
    vectors = 4 * LAYERS * copies * HIDDEN * 2
    sent = found["ep4"]["sent"]["EP"]
    assert 0.75 * vectors <= sent <= 0.75 * (vectors + 2 * LAYERS * copies * 4) + 1000
    rate = 450e9  # of NVLink, as plan.hardware has it
    assert found["ep4"]["seconds"] == pytest.approx(found["ep4"]["passes"] * sent / rate, rel=0.01)


@pytest.mark.parametrize("name", ESTIMATED)
def test_an_estimate_of_a_search_is_what_a_rehearsal_counts(found: dict, name: str) -> None:
    estimate, plan = found[name]["plans"]
    assert estimate == pytest.approx(plan, rel=0.01)


def test_a_search_tries_every_sharing_of_the_experts(found: dict) -> None:
    one = {(1, 1, ep, None) for ep in (1, 2, 4)} | {(1, 2, ep, None) for ep in (1, 2)}
    split = {(tp, 1, ep, 1) for tp in (2, 4) for ep in (1, 2, 4)} | {(2, 2, e, 1) for e in (1, 2)}
    assert one | split <= set(map(tuple, found["candidates"]))
