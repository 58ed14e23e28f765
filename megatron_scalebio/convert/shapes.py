"""The shape of each of Megatron's tensors, from the model's configuration."""

from megatron_scalebio.config import ModelConfig
from megatron_scalebio.convert.rules import Heads

LAYER = "decoder.layers.{}."


def heads_of(model: ModelConfig) -> Heads:
    """The sizes of the model's attention."""
    attention = model.num_attention_heads
    return Heads(attention, model.num_query_groups or attention, model.head_channels)


def megatron_shape(name: str, model: ModelConfig) -> tuple[int, ...]:
    """The shape of one tensor over all TP ranks, before the vocabulary is padded.

    Of what each expert has, that of one expert's.

    Args:
        name: as in a family's table, with `{}` for the layer.
    """
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    assert ffn is not None and model.vocab_size is not None, "a family sets both"
    heads = heads_of(model)
    fc1 = 2 * ffn if model.gated else ffn
    whole, channels = model.qk_layernorm_whole, heads.channels
    experts, of_expert = model.num_experts or 0, model.moe_ffn_hidden_size or ffn
    shared = model.moe_shared_expert_intermediate_size or 0
    expert_fc1 = 2 * of_expert if model.gated else of_expert
    vocab = (model.vocab_size, hidden)
    attended = heads.attention * (model.v_head_dim if model.multi_latent_attention else channels)
    query = heads.attention * (model.qk_head_dim + model.qk_pos_emb_head_dim)
    of_queries, of_keys = model.q_lora_rank or 0, model.kv_lora_rank
    shapes: dict[str, tuple[int, ...]] = {
        "embedding.word_embeddings.weight": vocab,
        "embedding.position_embeddings.weight": (model.max_position_embeddings or 0, hidden),
        "output_layer.weight": vocab,
        "self_attention.linear_qkv.weight": (sum(heads.rows), hidden),
        "self_attention.linear_qkv.bias": (sum(heads.rows),),
        "self_attention.linear_proj.weight": (hidden, attended),
        "self_attention.linear_q_proj.weight": (query, hidden),
        "self_attention.linear_q_down_proj.weight": (of_queries, hidden),
        "self_attention.linear_q_up_proj.weight": (query, of_queries),
        "self_attention.linear_q_up_proj.layer_norm_weight": (of_queries,),
        "self_attention.linear_kv_down_proj.weight": (of_keys + model.qk_pos_emb_head_dim, hidden),
        "self_attention.linear_kv_up_proj.weight": (
            heads.attention * (model.qk_head_dim + model.v_head_dim),
            of_keys,
        ),
        "self_attention.linear_kv_up_proj.layer_norm_weight": (of_keys,),
        "self_attention.linear_proj.bias": (hidden,),
        "self_attention.core_attention.softmax_offset": (heads.attention,),
        "self_attention.q_layernorm.weight": (heads.rows[0] if whole else channels,),
        "self_attention.k_layernorm.weight": (heads.rows[1] if whole else channels,),
        "mlp.linear_fc1.weight": (fc1, hidden),
        "mlp.linear_fc1.bias": (fc1,),
        "mlp.linear_fc2.weight": (hidden, ffn),
        "mlp.linear_fc2.bias": (hidden,),
        "mlp.router.weight": (experts, hidden),
        "mlp.router.expert_bias": (experts,),
        "mlp.router.bias": (experts,),
        "mlp.experts.experts.linear_fc1.weight": (expert_fc1, hidden),
        "mlp.experts.experts.linear_fc1.bias": (expert_fc1,),
        "mlp.experts.experts.linear_fc2.weight": (hidden, of_expert),
        "mlp.experts.experts.linear_fc2.bias": (hidden,),
        "mlp.shared_experts.linear_fc1.weight": (2 * shared if model.gated else shared, hidden),
        "mlp.shared_experts.linear_fc2.weight": (hidden, shared),
        "mlp.shared_experts.gate_weight": (1, hidden),
    }
    shape = shapes.get(name.removeprefix(LAYER))
    if shape is None:
        assert "norm" in name, f"convert.shapes does not know {name}"
        return (hidden,)
    return shape
