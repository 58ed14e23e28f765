"""The arguments of a run under Megatron-LM's names, which its loaders look for in `common.pt`."""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch

from megatron_scalebio.config import Config, ModelConfig
from megatron_scalebio.model.provider import padded_vocab_size


def megatron_args(config: Config, vocab_size: int) -> argparse.Namespace:
    """The arguments that Megatron-LM and its converters look for in `common.pt`."""
    model, parallel = config.model, config.parallel
    return argparse.Namespace(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        group_query_attention=model.num_query_groups is not None,
        num_query_groups=model.num_query_groups or model.num_attention_heads,
        kv_channels=model.kv_channels or model.hidden_size // model.num_attention_heads,
        seq_length=config.data.seq_length,
        max_position_embeddings=model.max_position_embeddings or config.data.seq_length,
        rotary_base=model.rotary_base,
        rotary_percent=model.rotary_percent,
        **_positions(model),
        normalization=model.normalization,
        norm_epsilon=model.norm_epsilon,
        swiglu=model.swiglu,
        add_bias_linear=model.add_bias_linear,
        add_qkv_bias=model.add_qkv_bias,
        qk_layernorm=model.qk_layernorm,
        apply_layernorm_1p=model.apply_layernorm_1p,
        window_size=model.window_size and (model.window_size - 1, 0),
        window_attn_skip_freq=model.window_attn_skip_freq,
        untie_embeddings_and_output_weights=model.untie_embeddings_and_output_weights,
        padded_vocab_size=padded_vocab_size(config, vocab_size),
        make_vocab_size_divisible_by=model.make_vocab_size_divisible_by,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        bf16=parallel.bf16,
        params_dtype=torch.bfloat16 if parallel.bf16 else torch.float32,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        micro_batch_size=config.train.micro_batch_size,
        global_batch_size=config.train.global_batch_size,
        seed=config.train.seed,
        dist_ckpt_format="torch_dist",
        use_dist_ckpt=True,
    )


def _positions(model: ModelConfig) -> dict[str, Any]:
    """The position code and how it is stretched; longrope and dynamic Megatron does not have."""
    scaling = model.rope_scaling
    kind = scaling.rope_type if scaling else None
    values = {
        "position_embedding_type": model.position_embedding_type,
        "use_rope_scaling": kind == "llama3",
        "rope_scaling_factor": scaling.factor if scaling and kind == "llama3" else 1.0,
        "rotary_seq_len_interpolation_factor": (
            scaling.factor if scaling and kind == "linear" else None
        ),
    }
    if not scaling or kind != "yarn":
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
