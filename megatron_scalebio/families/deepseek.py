"""DeepSeek V2, V3 and what shares their layers (Moonlight): latent attention, a shared expert."""

from typing import Any

from megatron_scalebio.families.base import Family, HfConfig, rows
from megatron_scalebio.families.experts import BIAS, DENSE, SHARED, SIGMOID, experts, shared_experts
from megatron_scalebio.families.llama import common_fields

_TENSORS = (
    *(row for row in DENSE if ".self_attention." not in row.megatron),
    *rows({"input_layernorm.weight": "input_layernorm.weight"}),
    # Queries from a narrow vector or not, as the config.json says.
    *rows(
        {
            "self_attention.linear_q_down_proj.weight": "self_attn.q_a_proj.weight",
            "self_attention.linear_q_up_proj.layer_norm_weight": "self_attn.q_a_layernorm.weight",
            "self_attention.linear_q_up_proj.weight": "self_attn.q_b_proj.weight",
        },
        when="q_lora_rank",
    ),
    *rows(
        {"self_attention.linear_q_proj.weight": "self_attn.q_proj.weight"}, when="direct_queries"
    ),
    *rows(
        {
            "self_attention.linear_kv_down_proj.weight": "self_attn.kv_a_proj_with_mqa.weight",
            "self_attention.linear_kv_up_proj.layer_norm_weight": "self_attn.kv_a_layernorm.weight",
            "self_attention.linear_kv_up_proj.weight": "self_attn.kv_b_proj.weight",
            "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
        }
    ),
    *experts(),
    *SHARED,
)


def _latent(config: HfConfig) -> dict[str, Any]:
    config.require("attention_bias", False)
    config.take("qk_head_dim")  # the sum of two
    return {
        **common_fields(config),
        **shared_experts(config),
        "kv_channels": None,  # the size of a head is in the options below
        "qk_layernorm": True,
        "multi_latent_attention": True,
        "q_lora_rank": config.take("q_lora_rank"),
        "kv_lora_rank": config.take("kv_lora_rank"),
        "qk_head_dim": config.take("qk_nope_head_dim"),
        "qk_pos_emb_head_dim": config.take("qk_rope_head_dim"),
        "v_head_dim": config.take("v_head_dim"),
    }


def _groups(config: HfConfig, best_of_a_group: int) -> dict[str, Any]:
    """Groups of experts, of each of which its best ones decide whether it comes into question.

    Megatron-Core counts as many of them as a token chooses of each group, on average.
    """
    groups, chosen = config.take("n_group"), config.take("topk_group")
    if groups in (None, 1) or groups == chosen:
        return {}
    if chosen is None:
        raise config.refuse("topk_group", "a whole number is expected beside n_group")
    topk = config.take("num_experts_per_tok")
    if topk != best_of_a_group * chosen:
        raise config.refuse(
            "topk_group", f"Megatron-Core compares groups by their best {topk} // {chosen} "
            f"experts, this model by {best_of_a_group}",
        )  # fmt: skip
    return {"moe_router_num_groups": groups, "moe_router_group_topk": chosen}


def _deepseek2(config: HfConfig) -> dict[str, Any]:
    config.require("mlp_bias", False)
    config.require("norm_topk_prob", False)
    method = config.require("topk_method", "greedy", "group_limited_greedy")
    config.take("n_group"), config.take("topk_group")
    return {
        **_latent(config),
        "moe_router_pre_softmax": True,
        **(_groups(config, 1) if method == "group_limited_greedy" else {}),
    }


def _deepseek3(config: HfConfig) -> dict[str, Any]:
    config.require("norm_topk_prob", True)
    config.require("rope_interleave", True)
    config.take("num_mtp_layers")  # see Family.more_layers
    return {**_latent(config), **SIGMOID, **_groups(config, 2)}


FAMILIES = (
    Family(("DeepseekV2ForCausalLM",), _deepseek2, _TENSORS),
    Family(("DeepseekV3ForCausalLM",), _deepseek3, (*_TENSORS, *BIAS), more_layers=True),
)
