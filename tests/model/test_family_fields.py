"""Each family's config.json gives each field of the model, at values that no default has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_scalebio.errors import UserError
from megatron_scalebio.families import FAMILIES, read_family
from megatron_scalebio.families.base import HfConfig

# What these families call their sizes, and what the sizes are here.
SIZES = {
    "num_hidden_layers": 6, "hidden_size": 96, "num_attention_heads": 6, "intermediate_size": 200,
    "max_position_embeddings": 640, "vocab_size": 1013,
}  # fmt: skip
FIELDS = {
    "num_layers": 6, "hidden_size": 96, "num_attention_heads": 6, "ffn_hidden_size": 200,
    "max_position_embeddings": 640, "vocab_size": 1013, "rotary_base": 4321, "rotary_percent": 1.0,
}  # fmt: skip
LLAMA = {**SIZES, "num_key_value_heads": 3, "head_dim": 20, "rms_norm_eps": 3e-5,
         "rope_theta": 4321.0, "tie_word_embeddings": False}  # fmt: skip
RMS_NORM = {
    **FIELDS, "num_query_groups": 3, "kv_channels": 20, "normalization": "RMSNorm",
    "norm_epsilon": 3e-5, "untie_embeddings_and_output_weights": True,
}  # fmt: skip
EVERY_OTHER = ["sliding_attention", "full_attention"] * 3
EVERY_THIRD = ["sliding_attention", "sliding_attention", "full_attention"] * 2

WITHOUT_BASE = {key: value for key, value in LLAMA.items() if key != "rope_theta"}
LINEAR_ROPE = {"rope_type": "linear", "factor": 8.0, "rope_theta": 4321.0}
LAYERED = {
    "full_attention": LINEAR_ROPE,
    "sliding_attention": {"rope_type": "default", "rope_theta": 987.0},
}
LAYERED_FIELDS = {
    "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "window_rotary_base": 987,
    "window_size": [28, 0], "window_attn_skip_freq": 3,
}  # fmt: skip
OLMO = {"swiglu": True, "pre_norms": False, "post_norms": True, "qk_layernorm": True,
        "qk_layernorm_whole": True}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 4, "moe_intermediate_size": 28}
EXPERT_FIELDS = {"swiglu": True, "num_experts": 10, "moe_ffn_hidden_size": 28,
                 "moe_router_topk": 4}  # fmt: skip

LATENT = {
    **{key: value for key, value in LLAMA.items() if key != "head_dim"}, **EXPERTS,
    "num_key_value_heads": 6, "kv_lora_rank": 17, "qk_nope_head_dim": 11, "qk_rope_head_dim": 8,
    "v_head_dim": 7, "n_routed_experts": 10, "n_shared_experts": 3, "first_k_dense_replace": 2,
    "routed_scaling_factor": 1.7,
}  # fmt: skip
LATENT_FIELDS = {
    **RMS_NORM, **EXPERT_FIELDS, "num_query_groups": 6, "kv_channels": None,
    "qk_layernorm": True, "multi_latent_attention": True, "kv_lora_rank": 17, "qk_head_dim": 11,
    "qk_pos_emb_head_dim": 8, "v_head_dim": 7, "moe_layer_freq": [0, 0, 1, 1, 1, 1],
    "moe_shared_expert_intermediate_size": 84, "moe_router_topk_scaling_factor": 1.7,
    "moe_router_dtype": "fp32",
}  # fmt: skip

# architecture: (model type, config.json, fields of the model)
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "LlamaForCausalLM": ("llama", LLAMA, {**RMS_NORM, "swiglu": True}),
    "MistralForCausalLM": (
        "mistral", {**LLAMA, "sliding_window": 37},
        {**RMS_NORM, "swiglu": True, "window_size": [36, 0]},
    ),
    "Qwen2ForCausalLM": (
        "qwen2",
        {**LLAMA, "use_sliding_window": True, "sliding_window": 41, "layer_types": EVERY_THIRD},
        {**RMS_NORM, "swiglu": True, "add_qkv_bias": True, "window_size": [40, 0],
         "window_attn_skip_freq": 3},
    ),
    "Qwen3ForCausalLM": (
        "qwen3", LLAMA,
        {**RMS_NORM, "swiglu": True, "add_qkv_bias": False, "qk_layernorm": True},
    ),
    "SmolLM3ForCausalLM": (
        "smollm3",
        {**{key: value for key, value in LLAMA.items() if key != "head_dim"},
         "no_rope_layers": [1, 1, 0, 1, 0, 1, 0]},
        {**RMS_NORM, "kv_channels": 16, "swiglu": True, "no_rope_freq": [0, 0, 1, 0, 1, 0]},
    ),
    "Phi3ForCausalLM": (
        "phi3",
        {**{key: value for key, value in LLAMA.items() if key != "head_dim"},
         "sliding_window": 37, "original_max_position_embeddings": 512,
         "partial_rotary_factor": 0.75},
        {**RMS_NORM, "kv_channels": 16, "swiglu": True, "rotary_percent": 0.75,
         "window_size": [36, 0]},
    ),
    "Gemma2ForCausalLM": (
        "gemma2",
        {**LLAMA, "query_pre_attn_scalar": 64, "attn_logit_softcapping": 33.0,
         "final_logit_softcapping": 17.0, "sliding_window": 29, "layer_types": EVERY_OTHER},
        {**RMS_NORM, "swiglu": False, "activation": "geglu_tanh", "apply_layernorm_1p": True,
         "post_norms": True, "scale_embedding": True, "softmax_scale": 0.125,
         "attn_logit_softcapping": 33.0, "final_logit_softcapping": 17.0, "window_size": [28, 0],
         "window_attn_skip_freq": 2},
    ),
    "Gemma3ForCausalLM": (
        "gemma3_text",
        {**WITHOUT_BASE, "query_pre_attn_scalar": 64, "sliding_window": 29,
         "layer_types": EVERY_THIRD, "rope_parameters": LAYERED},
        {**RMS_NORM, "swiglu": False, "activation": "geglu_tanh", "apply_layernorm_1p": True,
         "post_norms": True, "scale_embedding": True, "softmax_scale": 0.125,
         "attn_logit_softcapping": None, "final_logit_softcapping": None, "qk_layernorm": True,
         **LAYERED_FIELDS},
    ),
    "Olmo2ForCausalLM": ("olmo2", LLAMA, {**RMS_NORM, **OLMO}),
    "Olmo3ForCausalLM": (
        "olmo3",
        {**WITHOUT_BASE, "sliding_window": 29, "layer_types": EVERY_THIRD,
         "rope_parameters": LAYERED},
        {**RMS_NORM, **OLMO, **LAYERED_FIELDS},
    ),
    "Qwen3MoeForCausalLM": (
        "qwen3_moe",
        {**LLAMA, **EXPERTS, "num_experts": 10, "decoder_sparse_step": 2, "mlp_only_layers": [3],
         "norm_topk_prob": False},
        {**RMS_NORM, **EXPERT_FIELDS, "qk_layernorm": True, "moe_layer_freq": [0, 1, 0, 0, 0, 1],
         "moe_router_pre_softmax": True},
    ),
    "Glm4MoeForCausalLM": (
        "glm4_moe",
        {**LLAMA, **EXPERTS, "n_routed_experts": 10, "n_shared_experts": 3,
         "first_k_dense_replace": 2, "routed_scaling_factor": 1.7, "use_qk_norm": True,
         "attention_bias": True, "partial_rotary_factor": 0.5},
        {**RMS_NORM, **EXPERT_FIELDS, "rotary_percent": 0.5, "add_qkv_bias": True,
         "qk_layernorm": True, "moe_layer_freq": [0, 0, 1, 1, 1, 1],
         "moe_shared_expert_intermediate_size": 84, "moe_router_score_function": "sigmoid",
         "moe_router_enable_expert_bias": True, "moe_router_topk_scaling_factor": 1.7,
         "moe_router_dtype": "fp32"},
    ),
    "DeepseekV2ForCausalLM": (
        "deepseek_v2",
        {**LATENT, "q_lora_rank": None, "topk_method": "group_limited_greedy", "n_group": 5,
         "topk_group": 4, "norm_topk_prob": False},
        {**LATENT_FIELDS, "q_lora_rank": None, "moe_router_pre_softmax": True,
         "moe_router_num_groups": 5, "moe_router_group_topk": 4},
    ),
    "DeepseekV3ForCausalLM": (
        "deepseek_v3",
        {**LATENT, "q_lora_rank": 23, "n_group": 5, "topk_group": 2},
        {**LATENT_FIELDS, "q_lora_rank": 23, "moe_router_score_function": "sigmoid",
         "moe_router_enable_expert_bias": True, "moe_router_num_groups": 5,
         "moe_router_group_topk": 2},
    ),
    "GptOssForCausalLM": (
        "gpt_oss",
        {**WITHOUT_BASE, "num_local_experts": 10, "num_experts_per_tok": 4, "sliding_window": 29,
         "swiglu_limit": 5.5, "layer_types": EVERY_OTHER,
         "rope_parameters": LAYERED["full_attention"]},
        {**RMS_NORM, **EXPERT_FIELDS, "moe_ffn_hidden_size": 200, "swiglu": False,
         "activation": "quick_geglu", "activation_func_clamp_value": 5.5, "glu_linear_offset": 1.0,
         "add_bias_linear": True, "add_qkv_bias": True, "softmax_type": "learnable",
         "window_size": [28, 0], "window_attn_skip_freq": 2,
         "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ),
    "Llama4ForCausalLM": (
        "llama4_text",
        {**LLAMA, "intermediate_size_mlp": 230, "num_local_experts": 10, "moe_layers": [1, 4],
         "no_rope_layers": [1, 1, 0, 1, 1, 0], "attention_chunk_size": 70, "floor_scale": 90},
        {**RMS_NORM, "swiglu": True, "ffn_hidden_size": 230, "rotary_interleaved": True,
         "qk_l2_norm": True, "no_rope_freq": [0, 0, 1, 0, 0, 1], "full_attention_length": 70,
         "num_experts": 10, "moe_layer_freq": [0, 1, 0, 0, 1, 0], "moe_ffn_hidden_size": 200,
         "moe_shared_expert_intermediate_size": 200, "moe_router_topk": 1,
         "moe_router_score_function": "sigmoid", "moe_apply_probs_on_input": True},
    ),
    "Llama4ForConditionalGeneration": (
        "llama4", {"text_config": {**LLAMA, "attention_chunk_size": 70}},
        {**RMS_NORM, "swiglu": True, "ffn_hidden_size": 16384, "rotary_interleaved": True,
         "qk_l2_norm": True, "no_rope_freq": [0, 0, 0, 1, 0, 0], "full_attention_length": 70,
         "num_experts": 16, "moe_layer_freq": [1] * 6, "moe_ffn_hidden_size": 200,
         "moe_shared_expert_intermediate_size": 200, "moe_router_topk": 1,
         "moe_router_score_function": "sigmoid", "moe_apply_probs_on_input": True},
    ),
    "MixtralForCausalLM": (
        "mixtral",
        {**LLAMA, "num_local_experts": 10, "num_experts_per_tok": 4, "sliding_window": 37},
        {**RMS_NORM, **EXPERT_FIELDS, "moe_ffn_hidden_size": 200, "window_size": [36, 0]},
    ),
    "GPTNeoXForCausalLM": (
        "gpt_neox",
        {**SIZES, "hidden_act": "gelu_fast", "layer_norm_eps": 3e-4, "rotary_pct": 0.5,
         "rotary_emb_base": 4321, "use_parallel_residual": False, "tie_word_embeddings": True},
        {**FIELDS, "normalization": "LayerNorm", "norm_epsilon": 3e-4, "swiglu": False,
         "activation": "gelu_tanh", "add_bias_linear": True, "add_qkv_bias": True,
         "parallel_residual": False, "untie_embeddings_and_output_weights": False,
         "rotary_percent": 0.5},
    ),
    "GPT2LMHeadModel": (
        "gpt2",
        {"n_layer": 6, "n_embd": 96, "n_head": 6, "n_inner": 200, "n_positions": 640,
         "vocab_size": 1013, "layer_norm_epsilon": 3e-4, "tie_word_embeddings": False},
        {"num_layers": 6, "hidden_size": 96, "num_attention_heads": 6, "ffn_hidden_size": 200,
         "max_position_embeddings": 640, "position_embedding_type": "learned_absolute",
         "normalization": "LayerNorm", "norm_epsilon": 3e-4, "swiglu": False,
         "activation": "gelu_tanh", "add_bias_linear": True, "add_qkv_bias": True,
         "untie_embeddings_and_output_weights": True, "vocab_size": 1013},
    ),
}  # fmt: skip


@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_value_of_config_json_arrives(tmp_path: Path, architecture: str) -> None:
    kind, values, fields = CASES[architecture]
    config = {"architectures": [architecture], "model_type": kind, **values}
    (tmp_path / "config.json").write_text(json.dumps(config))
    family, found = read_family(tmp_path)
    assert architecture in family.architectures
    assert found == fields


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"sliding_attention": LAYERED["full_attention"]}, "sliding_attention without scaling"),
        (
            {"chunked_attention": LAYERED["sliding_attention"]},
            "options of full_attention and sliding_attention",
        ),
    ],
)
def test_rope_of_windows_is_plain(tmp_path: Path, changed: dict[str, Any], words: str) -> None:
    config = {"architectures": ["Olmo3ForCausalLM"], **CASES["Olmo3ForCausalLM"][1]}
    config |= {"model_type": "olmo3", "rope_parameters": {**LAYERED, **changed}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=words):
        read_family(tmp_path)


def test_sizes_that_are_left_out_follow_from_the_others(tmp_path: Path) -> None:
    gpt2 = CASES["GPT2LMHeadModel"][1]
    for architecture, kind, values, name, size in (
        ("GPT2LMHeadModel", "gpt2", {**gpt2, "n_inner": None}, "ffn_hidden_size", 4 * 96),
        ("LlamaForCausalLM", "llama", {**LLAMA, "head_dim": None}, "kv_channels", 16),
    ):
        config = {"architectures": [architecture], "model_type": kind, **values}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert read_family(tmp_path)[1][name] == size


def test_gpt_oss_is_read_where_transformers_has_no_option_for_its_alpha(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import GptOssConfig

    whole = GptOssConfig.to_dict
    without = lambda config: {k: v for k, v in whole(config).items() if k != "swiglu_alpha"}  # noqa: E731
    monkeypatch.setattr(GptOssConfig, "to_dict", without)
    config = {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss"}
    (tmp_path / "config.json").write_text(json.dumps({**config, **CASES["GptOssForCausalLM"][1]}))
    assert read_family(tmp_path)[1]["activation"] == "quick_geglu"


WHOLE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300,
    "intermediate_size": 96, "max_position_embeddings": 128,
    "rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0,
                        "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                        "original_max_position_embeddings": 64},
}  # fmt: skip


@pytest.mark.parametrize("value", ["1e6", "x", 0, -1, [], {}, [None], True, 10**30, 1e400])
@pytest.mark.parametrize(
    "key",
    ["architectures", "hidden_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps",
     "num_key_value_heads", "vocab_size", "intermediate_size", "max_position_embeddings",
     "tie_word_embeddings", "rope_parameters", "rope_theta", "factor",
     "original_max_position_embeddings", "hidden_act"],
)  # fmt: skip
def test_values_of_another_type_are_refused_in_one_line(
    tmp_path: Path, key: str, value: object
) -> None:
    config = json.loads(json.dumps(WHOLE))
    (config["rope_parameters"] if key in config["rope_parameters"] else config)[key] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    try:
        read_family(tmp_path)
    except UserError as error:
        assert str(error).startswith(f"{tmp_path / 'config.json'}: ")
        assert ("\n" not in str(error) and key in str(error)) or "transformers" in str(error)
    else:  # what transformers takes for another: true for tie_word_embeddings, 0 for false
        assert (key, value) in [("tie_word_embeddings", True), ("rope_parameters", {})]


@pytest.mark.parametrize(
    ("architecture", "key"),
    [("Qwen3ForCausalLM", "num_hidden_layers"), ("Qwen3ForCausalLM", "num_labels"),
     ("GPT2LMHeadModel", "n_layer")],
)  # fmt: skip
def test_what_would_be_a_list_without_end_is_refused(
    tmp_path: Path, architecture: str, key: str
) -> None:
    kind, values = CASES[architecture][:2]
    config = {"architectures": [architecture], "model_type": kind, **values, key: 10_001}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"{key}: 10001 is not supported .10000 at most"):
        read_family(tmp_path)


@pytest.mark.parametrize(
    ("default", "value", "words"),
    [(1.0, 1.0, None), (1.0, 2.0, "2.0"), (True, False, "False"), (None, 0, "0")],
)
def test_an_option_that_a_later_transformers_has_is_refused_where_it_is_set(
    default: object, value: object, words: str | None
) -> None:
    config = HfConfig(
        {"hidden_size": 8, "use_cache": False, "logit_gain": value},
        {"hidden_size": 4, "use_cache": True, "logit_gain": default}, "config.json",
    )  # fmt: skip
    assert config.take("hidden_size") == 8
    if words is None:
        config.refuse_rest()
        return
    said = rf"config.json: logit_gain: {words} is not supported \(only {default} is\)"
    with pytest.raises(UserError, match=said):
        config.refuse_rest()


def llama4(folder: Path, **values: Any) -> Path:
    config = {"architectures": ["Llama4ForCausalLM"], **CASES["Llama4ForCausalLM"][1], **values}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama4_text", **config}))
    return folder


@pytest.mark.parametrize(
    ("values", "length"),
    [
        ({"floor_scale": 71}, 70),
        ({"floor_scale": 70}, 69),  # the 70th token has another scale
        ({"floor_scale": 70, "attn_temperature_tuning": False}, 70),
        ({"floor_scale": 9, "no_rope_layers": [1] * 6}, 70),
        ({"layer_types": ["full_attention"] * 6}, 89),
        ({"layer_types": ["full_attention"] * 6, "attn_temperature_tuning": False}, None),
    ],
)
def test_how_far_llama_4_attends_to_all_tokens_at_one_scale(
    tmp_path: Path, values: dict[str, Any], length: int | None
) -> None:
    assert read_family(llama4(tmp_path, **values))[1]["full_attention_length"] == length


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rope_parameters": {**LINEAR_ROPE, "rope_type": "yarn"}}, "a whole head, by default or"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "a whole head"),
        ({"layer_types": ["sliding_attention"] * 6}, "supported: chunked_attention and full"),
        ({"attention_chunk_size": None}, "attention_chunk_size: None .*a whole number"),
        ({"num_experts_per_tok": 2}, "num_experts_per_tok: 2 is not supported"),
    ],
)  # fmt: skip
def test_what_llama_4_might_have_is_refused(
    tmp_path: Path, values: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        read_family(llama4(tmp_path, **values))


@pytest.mark.parametrize(
    ("key", "value"), [("num_hidden_layers", 10_001), ("attention_bias", True)]
)
def test_the_text_beside_images_is_checked_as_it_is_alone(
    tmp_path: Path, key: str, value: object
) -> None:
    config = {"architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4"}
    (tmp_path / "config.json").write_text(json.dumps({**config, "text_config": {key: value}}))
    with pytest.raises(UserError, match=f"{key}: {value} is not supported"):
        read_family(tmp_path)


def test_a_sequence_that_llama_4_attends_to_in_chunks_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron_scalebio.cli import main

    words = ["plan", "--gpus", "1", "--sources", "a=a", "b=b", "--validation", "c=c", "--hf"]
    assert main([*words, str(llama4(tmp_path)), "--seq-length", "71"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "full_attention_length: 70 is below data.seq_length 71" in line
    assert "attention_chunk_size" in line


@pytest.mark.parametrize(
    ("version", "chosen", "words"),
    [
        (2, None, "topk_group: None is not supported"),
        (3, None, "topk_group: None is not supported"),
        # A token chooses four experts; version 2 judges a group by its best one, 3 by its best two.
        (2, 2, "by their best 4 // 2 experts, this model by 1"),
        (3, 4, "by their best 4 // 4 experts, this model by 2"),
    ],
)
def test_groups_of_experts_that_would_be_chosen_otherwise_are_refused(
    tmp_path: Path, version: int, chosen: int | None, words: str
) -> None:
    architecture = f"DeepseekV{version}ForCausalLM"
    kind, values = CASES[architecture][:2]
    changes = {"n_group": 5, "topk_group": chosen, "topk_method": "group_limited_greedy"}
    config = {"architectures": [architecture], "model_type": kind, **values, **changes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as refused:
        read_family(tmp_path)
    assert words in str(refused.value)
