"""The arguments of a run under Megatron-LM's names, which its loaders look for in a checkpoint."""

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_scalebio.config import Config, ModelConfig
from megatron_scalebio.config.checks import by_name
from megatron_scalebio.config.experts import options_of_experts
from megatron_scalebio.config.latent import OPTIONS as LATENT_OPTIONS
from megatron_scalebio.model.provider import padded_vocab_size
from megatron_scalebio.model.settings import (
    MODEL_OPTIONS,
    default_ffn_hidden_size,
    fuses_activation,
    latent_settings,
    uses_transformer_engine,
)

# What models here do not have, by the values that say so. Megatron-Bridge looks for each of them.
_WITHOUT: dict[str, Any] = {
    "config_logger_dir": "",
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "experimental_attention_variant": None,
    "fp16": False,
    "fp16_lm_cross_entropy": False,
    "heterogeneous_layers_config_path": None,
    "hybrid_override_pattern": None,
    "init_method_xavier_uniform": False,
    "init_model_with_meta_device": False,
    "is_hybrid_model": False,
    "moe_use_legacy_grouped_gemm": False,
    "mtp_num_layers": None,
    "no_persist_layer_norm": True,
    "spec": None,
    "squared_relu": False,
    "use_legacy_models": False,
}
# Options that go on under their own names. Megatron-Bridge asks for the epsilon by an old name of
# Megatron-LM's, and both loaders so for the norms' `1p`.
_MODEL_OPTIONS = (
    "rotary_base", "rotary_percent", "norm_epsilon", "swiglu", "multi_latent_attention",
    "apply_layernorm_1p", "untie_embeddings_and_output_weights", "make_vocab_size_divisible_by",
)  # fmt: skip
_PARALLEL_OPTIONS = (
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size",
    "num_layers_per_virtual_pipeline_stage", "fp8_recipe", "fp8_param_gather", "bf16",
    "use_distributed_optimizer",
)  # fmt: skip


def megatron_args(
    config: Config, vocab_size: int, tokenizer: Mapping[str, Any] | None = None
) -> argparse.Namespace:
    """The arguments that Megatron-LM, Megatron-Bridge and converters look for in a checkpoint.

    Args:
        vocab_size: of the model, without padding.
        tokenizer: its `type` under Megatron-LM's name and its `model`, where the data tell them.
    """
    model, parallel = config.model, config.parallel
    args = argparse.Namespace(
        **_WITHOUT,
        **_tokenizer(tokenizer),
        **by_name(model, *MODEL_OPTIONS, *_MODEL_OPTIONS, *LATENT_OPTIONS),
        **by_name(parallel, *_PARALLEL_OPTIONS),
        ffn_hidden_size=model.ffn_hidden_size or default_ffn_hidden_size(config),
        group_query_attention=model.num_query_groups is not None,
        num_query_groups=model.num_query_groups or model.num_attention_heads,
        kv_channels=model.head_channels,
        seq_length=config.data.seq_length,
        max_position_embeddings=model.max_position_embeddings or config.data.seq_length,
        **_positions(model),
        layernorm_epsilon=model.norm_epsilon,
        quick_geglu=model.activation == "quick_geglu" and not model.swiglu,
        layernorm_zero_centered_gamma=model.apply_layernorm_1p,
        window_size=None if model.window_size is None else tuple(model.window_size),
        padded_vocab_size=padded_vocab_size(config, vocab_size),
        **_experts(config),
        overlap_p2p_comm=parallel.num_layers_per_virtual_pipeline_stage is not None,
        cp_comm_type=["p2p"],
        transformer_impl="transformer_engine" if uses_transformer_engine(config) else "local",
        fp8=parallel.fp8_format,
        fp4=parallel.fp4_format,
        bias_swiglu_fusion=fuses_activation(model),
        bias_gelu_fusion=model.activation == "gelu_tanh",  # which that fusion is, too
        params_dtype=torch.bfloat16 if parallel.bf16 else torch.float32,
        **by_name(config.train, "micro_batch_size", "global_batch_size", "seed"),
        dist_ckpt_format="torch_dist",
        use_dist_ckpt=True,
    )
    vars(args).update(latent_settings(model))  # has its rope under names of its own
    return args


def _tokenizer(tokenizer: Mapping[str, Any] | None) -> dict[str, str]:
    if tokenizer is None:
        return {}
    model = Path(tokenizer["model"])
    return {
        "tokenizer_type": tokenizer["type"],
        "tokenizer_model": str(model.absolute() if model.exists() else model),
    }


def _experts(config: Config) -> dict[str, Any]:
    model, parallel = config.model, config.parallel
    return {
        **options_of_experts(model),
        "num_experts": model.num_experts,
        "moe_layer_freq": model.moe_layer_freq or 1,
        "moe_grouped_gemm": model.num_experts is not None and uses_transformer_engine(config),
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.expert_tp,
    }


def _positions(model: ModelConfig) -> dict[str, Any]:
    """The position code and how it is stretched; longrope and dynamic Megatron does not have."""
    scaling = model.rope_scaling
    kind = scaling.rope_type if scaling else None
    values = {
        "position_embedding_type": model.position_embedding_type,
        "no_rope_freq": model.no_rope_freq,
        "use_rope_scaling": kind == "llama3",
        "rope_scaling_factor": scaling.factor if scaling and kind == "llama3" else 1.0,
        "rotary_seq_len_interpolation_factor": (
            scaling.factor if scaling and kind == "linear" else None
        ),
    }
    if not scaling or kind != "yarn" or model.multi_latent_attention:
        return values
    strength = 0.1 * math.log(scaling.factor) if scaling.factor > 1 else 0.0
    return {
        **values,
        "position_embedding_type": "yarn",
        "yarn_rotary_scaling_factor": scaling.factor,
        "yarn_original_max_position_embeddings": scaling.original_max_position_embeddings,
        "yarn_beta_fast": scaling.beta_fast,
        "yarn_beta_slow": scaling.beta_slow,
        "yarn_correction_range_round_to_int": scaling.truncate,
        # Megatron's m is (0.1 ln factor · mscale + 1) / (0.1 ln factor · mscale_all_dim + 1).
        "yarn_mscale": (scaling.scale_of_cos_and_sin - 1) / strength if strength else 1.0,
        "yarn_mscale_all_dim": 0.0,
    }
