"""Tiny random Hugging Face models of every family, in folders as users have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from megatron_scalebio.cli import main

transformers.utils.logging.disable_progress_bar()

_SMALL = {
    "hidden_size": 24, "intermediate_size": 44, "num_hidden_layers": 3, "vocab_size": 97,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
_ROPE3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
# tests/model/test_parity.py has shorter original lengths; here sequences of 64 are within it.
_LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 80,
    "short_factor": [1.0, 1.1, 1.2], "long_factor": [1.0, 2.0, 4.0],
}  # fmt: skip
_YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "beta_fast": 16, "truncate": False,
         "original_max_position_embeddings": 64}  # fmt: skip
_GPT2 = {"n_embd": 24, "n_head": 4, "n_layer": 3, "n_positions": 40, "vocab_size": 97}
_LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 18, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6,
    "v_head_dim": 7, "moe_intermediate_size": 14, "n_shared_experts": 2,
}  # fmt: skip
_LLAMA4 = {
    **_SMALL, "head_dim": 10, "intermediate_size": 14, "intermediate_size_mlp": 44,
    "num_local_experts": 3, "interleave_moe_layer_step": 2, "no_rope_layer_interval": 3,
    "attention_chunk_size": 40, "pad_token_id": None,
}  # fmt: skip
_IMAGES = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
    "vision_output_dim": 24, "image_size": 28, "projector_input_dim": 24,
    "projector_output_dim": 24,
}  # fmt: skip
_NEOX = {k: v for k, v in _SMALL.items() if k != "num_key_value_heads"} | {"hidden_size": 32}

# name → (class, configuration). Heads and layers of most allow TP 2; the odd ones are named so.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", _GPT2),
    "gpt2-untied": ("GPT2", {**_GPT2, "tie_word_embeddings": False}),
    "gpt2-odd": ("GPT2", {**_GPT2, "n_embd": 15, "n_head": 3, "n_inner": 22}),
    "neox": ("GPTNeoX", _NEOX),
    "neox-serial-tied": (
        "GPTNeoX", {**_NEOX, "use_parallel_residual": False, "tie_word_embeddings": True},
    ),
    "llama": ("Llama", {**_SMALL, "tie_word_embeddings": False}),
    "llama-tied-rope3": (
        "Llama", {**_SMALL, "tie_word_embeddings": True, "rope_parameters": _ROPE3},
    ),
    "llama-longrope": (
        "Llama", {**_SMALL, "max_position_embeddings": 160, "rope_parameters": _LONGROPE},
    ),
    "llama-odd-9-3": (
        "Llama",
        {**_SMALL, "hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3},
    ),
    "llama-odd-mqa": ("Llama", {**_SMALL, "num_key_value_heads": 1, "head_dim": 10}),
    "mistral": ("Mistral", {**_SMALL, "sliding_window": 8}),
    "qwen2": ("Qwen2", {**_SMALL, "tie_word_embeddings": False}),
    "qwen2-tied": ("Qwen2", {**_SMALL, "tie_word_embeddings": True}),
    "qwen2-yarn": ("Qwen2", {**_SMALL, "rope_parameters": _YARN}),
    "smollm3": ("SmolLM3", {**_SMALL, "no_rope_layer_interval": 2, "pad_token_id": None}),
    "phi3": (
        "Phi3",
        {**_SMALL, "sliding_window": 8, "pad_token_id": None,
         "rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.7}},
    ),
    "qwen3": ("Qwen3", {**_SMALL, "head_dim": 10}),
    "qwen3-moe": (
        "Qwen3Moe",
        {**_SMALL, "head_dim": 10, "num_experts": 3, "moe_intermediate_size": 14,
         "num_experts_per_tok": 2},
    ),
    "qwen3-moe-some-layers": (
        "Qwen3Moe",
        {**_SMALL, "head_dim": 10, "num_experts": 3, "moe_intermediate_size": 14,
         "num_experts_per_tok": 2, "decoder_sparse_step": 2},
    ),
    "glm4-moe": (
        "Glm4Moe",
        {**_SMALL, "head_dim": 12, "n_routed_experts": 3, "moe_intermediate_size": 14,
         "num_experts_per_tok": 2, "use_qk_norm": True},
    ),
    "deepseek2": (
        "DeepseekV2",
        {**_SMALL, **_LATENT, "q_lora_rank": None, "n_routed_experts": 3, "num_experts_per_tok": 2},
    ),
    "deepseek3": (
        "DeepseekV3",
        {**_SMALL, **_LATENT, "q_lora_rank": 14, "n_routed_experts": 4, "num_experts_per_tok": 2,
         "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    ),
    "llama4": ("Llama4Text", _LLAMA4),
    "llama4-images": ("Llama4", {"text_config": _LLAMA4, "vision_config": _IMAGES}),
    "mixtral": ("Mixtral", {**_SMALL, "num_local_experts": 3}),
    "gpt-oss": (
        "GptOss",
        {**_SMALL, "head_dim": 10, "num_local_experts": 3, "num_experts_per_tok": 2,
         "sliding_window": 8},
    ),
    "olmo2": ("Olmo2", _SMALL),
    "olmo3": ("Olmo3", {**_SMALL, "num_hidden_layers": 4, "sliding_window": 8}),
    "gemma3": (
        "Gemma3Text",
        {**_SMALL, "head_dim": 10, "query_pre_attn_scalar": 12, "sliding_window": 8,
         "num_hidden_layers": 6},
    ),
    "gemma2": (
        "Gemma2",
        {**_SMALL, "head_dim": 10, "query_pre_attn_scalar": 12, "sliding_window": 8},
    ),
}  # fmt: skip


def make(
    folder: Path, name: str, dtype: torch.dtype = torch.float32, shards: str = "5GB", **keys: Any
) -> Path:
    """Saves a model with values that a rounding would change, a tokenizer and a chat template."""
    family, options = MODELS[name]
    torch.manual_seed(7)
    config = getattr(transformers, f"{family}Config")(**{**options, **keys})
    suffix = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    suffix = "ForConditionalGeneration" if "vision_config" in options else suffix
    model = getattr(transformers, family.removesuffix("Text") + suffix)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.to(dtype).save_pretrained(folder, max_shard_size=shards)
    return dress(folder)


def dress(folder: Path) -> Path:
    """Adds what lies beside the weights."""
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}\n")
    (folder / "additional_chat_templates").mkdir(exist_ok=True)
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    return folder


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, byte by byte."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def convert(*argv: object) -> int:
    """`megatron-scalebio convert …` in this process."""
    return main(["convert", *(str(word) for word in argv)])
