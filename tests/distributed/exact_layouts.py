"""The model, the data's sizes and the layouts of the tests of exact steps."""

from __future__ import annotations

# Steps before the flush: the fewer, the more of what little w and u differ in is rounding.
VOCAB, SEQ, WARM_STEPS = 61, 24, 4
# Of the steps that are compared; and between resets of u, or draws of layers, so that two are seen.
STEPS, INTERVAL = 7, 3
MODEL = {
    "num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2,
    "ffn_hidden_size": 48, "make_vocab_size_divisible_by": 16, "init_method_std": 0.1,
}  # fmt: skip
UNTIED = {"untie_embeddings_and_output_weights": True}

# Losses of the routers large enough to be seen beside the others.
EXPERTS = {
    "num_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 16,
    "moe_shared_expert_intermediate_size": 24, "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True, "moe_router_bias_update_rate": 0.02,
    "moe_aux_loss_coeff": 0.3, "moe_z_loss_coeff": 0.1,
}  # fmt: skip
REPLAY = {**EXPERTS, "moe_enable_routing_replay": True}
ON_INPUT = {**EXPERTS, "moe_router_topk": 1, "moe_apply_probs_on_input": True}
BIAS = "decoder.layers.mlp.router.expert_bias"
EP2 = {"expert_model_parallel_size": 2}

# name: (ranks, parallel, model, lisa, data)
Layout = tuple[int, dict, dict, dict, dict]
TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
VPP = {**PP2, "num_layers_per_virtual_pipeline_stage": 1}
CP2 = {"context_parallel_size": 2}
DIST = {"use_distributed_optimizer": True}
FULL, SELECTIVE = {"recompute_granularity": "full"}, {"recompute_granularity": "selective"}
LISA = {"lisa_layers": 2}
FROZEN = {**LISA, "lisa_train_embedding": False, "lisa_train_norm": False}
TOKEN = {"loss_mean": "token"}
LAYOUTS: dict[str, Layout] = {
    "one": (1, {}, {}, {}, {}),
    "one-untied-token": (1, {}, UNTIED, {}, TOKEN),
    "one-distributed-optimizer": (1, DIST, {}, {}, {}),
    "one-lisa": (1, {}, {}, LISA, {}),
    "one-lisa-frozen": (1, {}, {}, FROZEN, {}),
    "one-lisa-frozen-recompute": (1, FULL, {}, FROZEN, {}),
    "one-recompute-selective": (1, SELECTIVE, {}, {}, {}),
    "tp2": (2, TP2, {}, {}, {}),
    "tp2-untied-token": (2, TP2, UNTIED, {}, TOKEN),
    "tp2-sequence-parallel": (2, {**TP2, "sequence_parallel": True}, {}, {}, {}),
    "pp2": (2, PP2, {}, {}, {}),
    "pp2-untied-recompute": (2, {**PP2, **FULL}, UNTIED, {}, {}),
    "vpp": (2, VPP, {}, {}, {}),
    "pp2-lisa": (2, PP2, {}, LISA, {}),
    "dp2": (2, {}, {}, {}, {}),
    "dp2-token": (2, {}, {}, {}, TOKEN),
    "dp2-distributed-optimizer": (2, DIST, {}, {}, {}),
    "dp2-distributed-optimizer-lisa": (2, DIST, {}, LISA, {}),
    "cp2": (2, CP2, {}, {}, {}),
    "cp2-token-recompute": (2, {**CP2, **FULL}, {}, {}, TOKEN),
    "cp2-distributed-optimizer-lisa": (2, {**CP2, **DIST}, {}, LISA, {}),
    "tp2-pp2": (4, {**TP2, **PP2}, {}, {}, {}),
    "vpp-tp2": (4, {**VPP, **TP2}, {}, {}, {}),
    "vpp-dp2-distributed-optimizer": (4, {**VPP, **DIST}, {}, {}, {}),
    "cp2-tp2-recompute-selective": (
        4,
        {**CP2, **TP2, **SELECTIVE, "sequence_parallel": True},
        {},
        {},
        {},
    ),
    "cp2-pp2-recompute": (4, {**CP2, **PP2, **FULL}, {}, {}, {}),
    "one-experts": (1, {}, EXPERTS, {}, {}),
    "one-distributed-optimizer-experts": (1, DIST, EXPERTS, {}, {}),
    "one-experts-lisa": (1, {}, EXPERTS, LISA, {}),
    "one-experts-replay": (1, {}, REPLAY, {}, {}),
    "ep2-experts-recompute-lisa-frozen": (
        2,
        {**EP2, **FULL},
        EXPERTS,
        {**FROZEN, "lisa_train_routers": True},
        {},
    ),
    "ep2-experts": (2, EP2, EXPERTS, {}, {}),
    "ep2-experts-lisa": (2, EP2, EXPERTS, LISA, {}),
    "ep2-distributed-optimizer-experts": (2, {**EP2, **DIST}, EXPERTS, {}, {}),
    "ep2-distributed-optimizer-experts-lisa": (2, {**EP2, **DIST}, EXPERTS, LISA, {}),
    "cp2-ep2-experts": (2, {**CP2, **EP2}, EXPERTS, {}, {}),
    "ep2-tp2-experts": (4, {**EP2, **TP2, "sequence_parallel": True}, EXPERTS, {}, {}),
    "ep2-tp2-experts-lisa": (
        4,
        {**EP2, **TP2, "sequence_parallel": True},
        EXPERTS,
        LISA,
        {},
    ),
    # Each expert whole, on two ranks.
    "ep2-tp2-distributed-optimizer-experts-lisa": (
        4,
        {**EP2, **TP2, **DIST, "sequence_parallel": True, "expert_tensor_parallel_size": 1},
        EXPERTS,
        LISA,
        {},
    ),
    "ep2-pp2-experts": (4, {**EP2, **PP2}, EXPERTS, {}, {}),
    "ep2-pp2-experts-lisa": (4, {**EP2, **PP2}, EXPERTS, LISA, {}),
    "ep2-vpp-experts-recompute": (4, {**EP2, **VPP, **FULL}, EXPERTS, {}, {}),
    "ep2-vpp-experts-recompute-replay": (4, {**EP2, **VPP, **FULL}, REPLAY, {}, {}),
    "ep2-tp2-experts-replay": (4, {**EP2, **TP2, "sequence_parallel": True}, REPLAY, {}, {}),
    "one-experts-on-input": (1, {}, ON_INPUT, {}, {}),
    "ep2-tp2-experts-on-input": (4, {**EP2, **TP2, "sequence_parallel": True}, ON_INPUT, {}, {}),
    "tp2-pp2-experts": (4, {**TP2, **PP2, "sequence_parallel": True}, EXPERTS, {}, {}),
}


PACKED = [name for name in LAYOUTS if not name.startswith("cp2")]
CLIP = 0.01  # below every gradient's norm
# Layouts whose steps are compared with one rank's; of the others a flush is enough.
SAME = {
    "one": [
        "tp2", "tp2-sequence-parallel", "pp2", "vpp", "dp2", "dp2-distributed-optimizer", "cp2",
        "tp2-pp2", "vpp-dp2-distributed-optimizer",
    ],
    "one-lisa-frozen": ["one-lisa-frozen-recompute"],
    "one-untied-token": ["tp2-untied-token"],
    "one-lisa": ["dp2-distributed-optimizer-lisa"],
    "one-experts": ["ep2-tp2-experts"],
    "one-experts-lisa": ["ep2-distributed-optimizer-experts-lisa"],
}  # fmt: skip


def settings(problem: dict, name: str, interval: int) -> dict:
    _, parallel, model, lisa, data = LAYOUTS[name]
    return {
        "data": {
            "seq_length": SEQ,
            "sources": problem["sources"],
            "validation": problem["validation"],
            **data,
        },
        "model": {**MODEL, **model},
        "parallel": parallel,
        # Adam divides by the gradient's size: with a smaller eps, an entry whose gradient is
        # rounding noise takes a full step either way, after each of LISA's restarts above all.
        "optimizer": {"lr": 3e-3, "adam_eps": 1e-5},
        "lisa": {**lisa, "lisa_interval": interval},
        "bilevel": {"alpha": 7.0, "resync_interval": interval},
        "train": {
            "train_iters": 12, "micro_batch_size": 3, "global_batch_size": 12,
            "validation_batch_size": 12,
        },
    }  # fmt: skip
