"""Llama 4's text: layers without rope, experts of which a token chooses one, a shared one beside.

A token sees those of its chunk alone in layers with rope, and in the others scores have another
scale from a certain position on. Up to where the first of these begins it is a plain model.
"""

from dataclasses import replace
from typing import Any

from megatron_scalebio.families.base import HF_LAYER, LAYER, Family, HfConfig, TensorMap, rows
from megatron_scalebio.families.experts import DENSE, no_losses
from megatron_scalebio.families.llama import no_rope, silu_fields

_EXPERTS, _HF_EXPERTS = f"{LAYER}mlp.experts.experts.", f"{HF_LAYER}feed_forward.experts."
_SHARED = "feed_forward.shared_expert."
_TENSORS = (
    *(
        replace(row, hf=tuple(name.replace(".mlp.", ".feed_forward.") for name in row.hf))
        for row in DENSE
    ),
    *rows(
        {
            "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
            "mlp.router.weight": "feed_forward.router.weight",
            "mlp.shared_experts.linear_fc1.weight": (
                f"{_SHARED}gate_proj.weight", f"{_SHARED}up_proj.weight",
            ),
            "mlp.shared_experts.linear_fc2.weight": f"{_SHARED}down_proj.weight",
        },
        layers="experts",
    ),
    *(
        TensorMap(
            f"{_EXPERTS}{megatron}.weight", (f"{_HF_EXPERTS}{hf}[{{}}]",), "transposed",
            layers="experts",
        )
        for megatron, hf in (("linear_fc1", "gate_up_proj"), ("linear_fc2", "down_proj"))
    ),
)  # fmt: skip


def _llama4(config: HfConfig) -> dict[str, Any]:
    config.require("attention_bias", False)
    config.require("num_experts_per_tok", 1)
    config.require("router_jitter_noise", 0.0)
    no_losses(config)
    config.take("interleave_moe_layer_step")  # in the list
    layers, with_experts = config.take("num_hidden_layers"), config.take("moe_layers")
    fields = {**silu_fields(config), **no_rope(config)}
    _check_rope(config, fields)
    width = fields["ffn_hidden_size"]
    return {
        **fields,
        "ffn_hidden_size": config.take("intermediate_size_mlp"),
        "rotary_interleaved": True,
        "qk_l2_norm": config.take("use_qk_norm"),
        "full_attention_length": _full_attention_length(config, fields["no_rope_freq"] is not None),
        "num_experts": config.take("num_local_experts"),
        "moe_layer_freq": [int(layer in with_experts) for layer in range(layers)],
        "moe_ffn_hidden_size": width,
        "moe_shared_expert_intermediate_size": width,
        "moe_router_topk": 1,
        "moe_router_score_function": "sigmoid",
        "moe_apply_probs_on_input": True,
    }


def _check_rope(config: HfConfig, fields: dict[str, Any]) -> None:
    """Refuses what this model's norm of queries and keys, which comes after rope, takes away."""
    scaling = fields.get("rope_scaling", {}).get("rope_type")
    if scaling in ("yarn", "longrope") or fields["rotary_percent"] != 1:
        raise config.refuse("rope_parameters", "supported: a whole head, by default or llama3")


def _full_attention_length(config: HfConfig, has_no_rope: bool) -> int | None:
    """The longest sequence in which nothing is in chunks, and no score has another scale.

    That scale is 1 + attn_scale · log(1 + ⌊tokens so far / floor_scale⌋), in layers without rope.
    """
    kinds = set(config.take("layer_types"))
    chunk, floor = config.take("attention_chunk_size"), config.take("floor_scale")
    scales = config.take("attn_temperature_tuning")
    config.take("attn_scale")
    if not kinds <= {"chunked_attention", "full_attention"}:
        raise config.refuse("layer_types", "supported: chunked_attention and full_attention")
    limits = [chunk] if "chunked_attention" in kinds else []
    return min([*limits, floor - 1] if scales and has_no_rope else limits, default=None)


# As published, beside what reads images.
_TENSORS_BESIDE = tuple(
    replace(row, hf=tuple(f"language_model.{name}" for name in row.hf)) for row in _TENSORS
)
FAMILIES = (
    Family(("Llama4ForCausalLM",), _llama4, _TENSORS),
    Family(
        ("Llama4ForConditionalGeneration",), _llama4, _TENSORS_BESIDE, "language_model.",
        beside=("vision_model.", "multi_modal_projector."),
    ),
)  # fmt: skip
