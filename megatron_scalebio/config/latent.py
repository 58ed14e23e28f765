"""What the options of latent attention (DeepSeek) must be for it to work, alone and with others."""

from typing import Any

from megatron_scalebio.config.checks import require_positive
from megatron_scalebio.errors import UserError

OPTIONS = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
# What latent attention, here or in Megatron-Core, does not have.
_WITHOUT = (
    "qk_layernorm_whole", "add_qkv_bias", "add_bias_linear", "post_norms",
    "parallel_residual", "no_rope_freq", "rotary_interleaved",
    "attn_logit_softcapping", "softmax_scale",
)  # fmt: skip


def check_latent(model: Any) -> None:
    """Refuses options of a `ModelConfig` that do not go with latent attention, or without it."""
    defaults = {name: spec.default for name, spec in model.__dataclass_fields__.items()}
    if not model.multi_latent_attention:
        for name in OPTIONS:
            if getattr(model, name) != defaults[name]:
                raise UserError(
                    f"{name}: {getattr(model, name)!r} needs multi_latent_attention (set it)"
                )
        return
    require_positive(model, *OPTIONS)
    for name in _WITHOUT:
        if getattr(model, name) != defaults[name]:
            raise UserError(
                f"{name}: {getattr(model, name)!r} does not go with multi_latent_attention (drop "
                "one of them)"
            )
    if not model.qk_layernorm:
        raise UserError(
            "multi_latent_attention: True needs qk_layernorm, the norms of its narrow vectors "
            "(set it)"
        )
    heads = model.num_attention_heads
    if model.num_query_groups not in (None, heads):
        raise UserError(
            f"num_query_groups: {model.num_query_groups!r} is not num_attention_heads {heads}, as "
            "in latent attention (drop it)"
        )
    _check_rope(model)


def _check_rope(model: Any) -> None:
    if model.position_embedding_type != "rope" or model.rotary_percent != 1:
        raise UserError(
            "multi_latent_attention: True needs rope, on all of qk_pos_emb_head_dim (set "
            "position_embedding_type to rope and rotary_percent to 1)"
        )
    scaling = model.rope_scaling
    if scaling is None:
        return
    plain = scaling.truncate and scaling.attention_factor is None
    if scaling.rope_type != "yarn" or not plain or (
        (scaling.mscale is None) != (scaling.mscale_all_dim is None)
    ):  # fmt: skip
        raise UserError(
            f"rope_scaling.rope_type: {scaling.rope_type!r} with multi_latent_attention: "
            "Megatron-Core has yarn alone there, truncated, with both or none of mscale and "
            "mscale_all_dim, and no attention_factor (write it so, or drop it)"
        )


def widths_of_latent(model: Any, tp: int) -> list[tuple[str, int | None, int]]:
    """Fields, their values, and a side of the matrices that they make on each TP rank."""
    heads, rope = model.num_attention_heads, model.qk_pos_emb_head_dim
    return [
        (name, getattr(model, name), side)
        for name, side in (
            ("q_lora_rank", model.q_lora_rank or 0),
            ("kv_lora_rank", model.kv_lora_rank),
            ("qk_pos_emb_head_dim", model.kv_lora_rank + rope),
            ("qk_pos_emb_head_dim", heads * (model.qk_head_dim + rope) // tp),
            ("qk_head_dim", heads * (model.qk_head_dim + model.v_head_dim) // tp),
            ("v_head_dim", heads * model.v_head_dim // tp),
        )
    ]


def check_latent_layout(model: Any, parallel: Any) -> None:
    """Refuses a layout that latent attention does not fit."""
    tp = parallel.tensor_model_parallel_size
    if not model.multi_latent_attention or tp == 1:
        return
    if not parallel.sequence_parallel:
        raise UserError(
            f"parallel.tensor_model_parallel_size: {tp!r} needs sequence_parallel with "
            "multi_latent_attention (set it)"
        )
    for name, size in (
        ("kv_lora_rank", model.kv_lora_rank + model.qk_pos_emb_head_dim),
        ("q_lora_rank", model.q_lora_rank or tp),
    ):
        if size % tp:
            raise UserError(
                f"model.{name}: makes a matrix of {size} rows, which TP {tp} does not divide "
                "(choose a divisor)"
            )
