"""What a rehearsal counts, by formula: FLOPs, traffic and bytes; and estimates of unseen layouts.

Per token and matrix weight 2 FLOPs forward, 2 for the input's gradient and 2 for the weight's.
Causal attention of B sequences of S tokens and width H: 2 products forward and 5 backward (the
scores are computed again), each of 2 · B · S · S/2 · H FLOPs.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.harness import found_on_a_rank

pytestmark = pytest.mark.distributed

LAYERS, HIDDEN, KEYS, FFN, VOCAB, SEQ, BATCH = 4, 64, 32, 96, 256, 48, 2
LAYER_MATRICES = HIDDEN * (HIDDEN + 2 * KEYS) + HIDDEN * HIDDEN + 3 * HIDDEN * FFN
LAYER = LAYER_MATRICES + 2 * HIDDEN
HEAD = HIDDEN * VOCAB
TOKENS = BATCH * SEQ
PRODUCT = BATCH * SEQ * SEQ * HIDDEN  # one product of attention
TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
DIST, BF16 = {"use_distributed_optimizer": True}, {"bf16": True}
FROZEN = {"lisa_layers": 1, "lisa_train_embedding": False, "lisa_train_norm": False}

# name: (ranks, parallel, lisa, active layers of the first stage)
CASES: dict[str, tuple[int, dict, dict, list[int] | None]] = {
    "one": (1, {}, {}, None),
    "full": (1, {"recompute_granularity": "full"}, {}, None),
    "selective": (1, {"recompute_granularity": "selective"}, {}, None),
    "frozen": (1, {}, FROZEN, [1]),
    "tp2": (2, TP2, {}, None),
    "tp2 sp": (2, {**TP2, "sequence_parallel": True}, {}, None),
    "pp2": (2, {**PP2, **BF16}, {}, None),
    "dp2": (2, {}, {}, None),
    "dp4 bf16": (4, BF16, {}, None),
    "dp4 bf16 dist": (4, {**BF16, **DIST}, {}, None),
}
# Layouts that are estimated from those of few layers: name: (ranks, parallel, lisa)
ESTIMATED: dict[str, tuple[int, dict, dict]] = {
    "tp2 dp4 dist": (8, {**TP2, **DIST, **BF16, "sequence_parallel": True}, {}),
    "pp2 lisa": (4, {**PP2, **BF16}, {"lisa_layers": 2, "lisa_interval": 5}),
    "pp2 vpp2": (2, {**PP2, "num_layers_per_virtual_pipeline_stage": 1, **BF16}, {}),
    "tp2 pp2 cp2 dist": (8, {**TP2, **PP2, **DIST, **BF16, "context_parallel_size": 2}, {}),
}  # fmt: skip


def load(parallel: dict, lisa: dict) -> Any:
    from megatron_scalebio.config_loader import load_config

    entries = [{"name": name, "path": name} for name in ("a", "b")]
    return load_config(None, {
        "data": {"sources": entries, "validation": entries[:1], "seq_length": SEQ},
        "model": {
            "num_layers": LAYERS, "hidden_size": HIDDEN, "num_attention_heads": 4,
            "num_query_groups": 2, "ffn_hidden_size": FFN, "vocab_size": VOCAB,
            "untie_embeddings_and_output_weights": True,
        },
        "parallel": parallel, "lisa": lisa,
        "train": {"micro_batch_size": BATCH, "global_batch_size": 32, "train_iters": 20},
    })  # fmt: skip


def rehearse_all() -> dict[str, Any]:
    from megatron_scalebio.plan.estimate import Estimator
    from megatron_scalebio.plan.hardware import gpu_named
    from megatron_scalebio.plan.layout import Layout
    from megatron_scalebio.plan.planner import make_plan
    from megatron_scalebio.plan.rehearsal import rehearse

    gpu = gpu_named("cpu")
    found: dict[str, Any] = {}
    for name, (ranks, parallel, lisa, active) in CASES.items():
        config = load(parallel, lisa)
        memory = rehearse(config, Layout.of(config, ranks, gpu), 0, active)
        found[name] = {
            "flops": memory.flops_per_pass, "pass": memory.sent_per_pass_bytes,
            "step": memory.sent_per_step_bytes, "held": memory.held_bytes,
            "parameters": [memory.parameters, memory.trainable, memory.layer_parameters],
            "logits": memory.activation_bytes.get("logits", 0),
        }  # fmt: skip
    estimator = Estimator(0.4)
    for name, (ranks, parallel, lisa) in ESTIMATED.items():
        config = load(parallel, lisa)
        layout = Layout.of(config, ranks, gpu)
        plans = estimator.estimate(config, layout).plan, make_plan(config, layout, 0.4)
        found[name] = [plan.as_json() for plan in plans]
    return found


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return found_on_a_rank(rehearse_all)


def test_flops_of_a_pass(found: dict[str, Any]) -> None:
    whole = TOKENS * 6 * (LAYERS * LAYER_MATRICES + HEAD) + LAYERS * 7 * PRODUCT
    assert found["one"]["flops"] == whole
    forward = LAYERS * (2 * TOKENS * LAYER_MATRICES + 2 * PRODUCT)
    assert found["full"]["flops"] == whole + forward
    assert found["selective"]["flops"] == whole + LAYERS * 2 * PRODUCT
    # A layer forward alone, one whole, two and the head without their weights' gradients.
    frozen = TOKENS * LAYER_MATRICES * (2 + 6 + 2 * 4) + TOKENS * 4 * HEAD
    assert found["frozen"]["flops"] == frozen + (2 + 3 * 7) * PRODUCT
    assert found["tp2"]["flops"] == whole / 2
    assert found["pp2"]["flops"] == (whole - TOKENS * 6 * HEAD) / 2
    assert found["dp2"]["flops"] == whole


def test_parameters_and_bytes_by_kind(found: dict[str, Any]) -> None:
    whole = LAYERS * LAYER + 2 * HEAD + HIDDEN
    assert found["one"]["parameters"] == [whole, whole, LAYER]
    assert found["frozen"]["parameters"] == [whole, LAYER, LAYER]
    half = LAYERS * (LAYER_MATRICES // 2 + 2 * HIDDEN) + HEAD + HIDDEN
    assert found["tp2"]["parameters"][0] == half
    assert found["pp2"]["parameters"][0] == LAYERS // 2 * LAYER + HEAD
    one = found["one"]["held"]
    assert (one["weights w"], one["weights u"]) == (4 * whole, 4 * whole)
    assert (one["gradients"], one["Adam state"]) == (2 * 4 * whole, 2 * 8 * whole)
    frozen = found["frozen"]["held"]
    assert (frozen["weights w"], frozen["weights u"]) == (4 * whole, 4 * LAYER)
    assert (frozen["gradients"], frozen["Adam state"]) == (8 * LAYER, 16 * LAYER)
    bf16, shards = found["dp4 bf16"]["held"], found["dp4 bf16 dist"]["held"]
    assert (bf16["weights w"], bf16["weights u"]) == (2 * whole, 2 * whole)
    assert (bf16["fp32 masters"], bf16["Adam state"]) == (2 * 4 * whole, 2 * 8 * whole)
    # Megatron pads a shard's end.
    assert shards["fp32 masters"] == pytest.approx(2 * whole, rel=0.01)
    assert shards["Adam state"] == 2 * shards["fp32 masters"]
    assert found["one"]["logits"] % (TOKENS * VOCAB * 4) == 0


def test_traffic_of_a_pass(found: dict[str, Any]) -> None:
    """A ring all-reduce over n ranks sends 2 (n − 1)/n of the whole, a gather or scatter half."""
    assert found["one"]["pass"] == {"TP": 0, "CP": 0, "EP": 0, "PP": 0}
    hidden, row = 4 * TOKENS * HIDDEN, 4 * TOKENS
    # Two a layer forward, two backward; the embedding; the head's input gradient; and the loss:
    # largest logit, the label's, the sum.
    tp2 = (4 * LAYERS + 2) * hidden + 3 * row
    assert found["tp2"]["pass"]["TP"] == pytest.approx(tp2, rel=1e-3)
    # A layer: gathers before its two column-parallel products, scatters behind the row-parallel
    # ones, the same turned round, and each gathered input once more for its weights' gradient. The
    # embedding scatters, the head gathers. Norms of u and w are reduced once in three passes.
    norms = 2 * 4 * (2 * LAYERS + 1) * HIDDEN / 3
    sp = (10 * LAYERS + 5) * hidden / 2 + 3 * row + norms
    assert found["tp2 sp"]["pass"]["TP"] == pytest.approx(sp, rel=1e-3)
    assert found["pp2"]["pass"]["PP"] == 2 * TOKENS * HIDDEN  # bf16, to the next stage


def test_traffic_of_a_step(found: dict[str, Any]) -> None:
    whole = LAYERS * LAYER + 2 * HEAD + HIDDEN
    assert sum(found["one"]["step"].values()) == 0
    assert found["dp2"]["step"]["DP"] == pytest.approx(2 * 4 * whole, rel=1e-3)
    assert found["dp4 bf16"]["step"]["DP"] == pytest.approx(2 * 4 * whole * 1.5, rel=1e-3)
    # To shards at 4 bytes and back at 2, three quarters of each, of w and u.
    dist = found["dp4 bf16 dist"]["step"]["DP"]
    assert dist == pytest.approx(2 * (4 + 2) * whole * 0.75, rel=0.01)


@pytest.mark.parametrize("name", ESTIMATED)
def test_estimates_from_few_layers_are_the_rehearsals(found: dict[str, Any], name: str) -> None:
    estimate, plan = found[name]
    assert estimate["layout"] == plan["layout"]
    for ours, theirs in zip(estimate["stages"], plan["stages"], strict=True):
        for field in ("layers", "active_layers"):
            assert ours[field] == theirs[field]
        for field in ("parameters", "trainable", "layer_parameters"):
            assert ours[field] == theirs[field]
        # What the ends of a stage pad or share is not a sum over layers.
        assert ours["held_bytes"] == pytest.approx(theirs["held_bytes"], rel=0.01)
        assert ours["flops_per_pass"] == pytest.approx(theirs["flops_per_pass"], rel=1e-6)
        for link in ("TP", "CP"):
            sent = theirs["sent_per_pass_bytes"][link]
            assert ours["sent_per_pass_bytes"][link] == pytest.approx(sent, rel=0.01), link
        assert ours["total_bytes"] == pytest.approx(theirs["total_bytes"], rel=0.1)
    assert estimate["cost"]["step_s"] == pytest.approx(plan["cost"]["step_s"], rel=0.03)
