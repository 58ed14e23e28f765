"""The arguments in `common.pt` describe the model that was trained, to those who read them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch.nn.functional as F

from megatron_scalebio.config import Config
from megatron_scalebio.config.model import ModelConfig
from tests.distributed.harness import run_distributed

MODELS: dict[str, dict[str, Any]] = {
    "gpt": {"activation": "gelu_tanh", "add_bias_linear": True},
    "llama": {"swiglu": True, "normalization": "RMSNorm", "num_query_groups": 2, "kv_channels": 24},
    "qwen": {
        "swiglu": True,
        "normalization": "RMSNorm",
        "norm_epsilon": 1e-6,
        "add_qkv_bias": True,
    },
    "window": {
        "window_size": [8, 0],
        "qk_layernorm": True,
        "untie_embeddings_and_output_weights": True,
    },
}
# Of the run, not of the model; or of how a device computes it.
ELSEWHERE = {
    "params_dtype", "bf16", "batch_p2p_comm", "overlap_p2p_comm", "bias_activation_fusion",
    "cp_comm_type", "num_query_groups", "fp8_param", "transformer_impl",
}  # fmt: skip


@pytest.mark.distributed
@pytest.mark.parametrize("name", MODELS)
def test_a_configuration_built_from_them_is_the_models(name: str) -> None:
    run_distributed(rebuild, 1, name)


def rebuild(name: str) -> None:
    """As Megatron-Bridge builds one: by name, and some by rules of its own."""
    from megatron.core.transformer import TransformerConfig

    from megatron_scalebio.checkpoint.megatron_args import megatron_args
    from megatron_scalebio.compat import cpu
    from megatron_scalebio.model.provider import transformer_config

    small = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "ffn_hidden_size": 96}
    cpu.adapt()
    config = Config(model=ModelConfig(**{**small, **MODELS[name]}))
    args, ours = megatron_args(config, 100), transformer_config(config)
    told = {f.name for f in dataclasses.fields(TransformerConfig) if hasattr(args, f.name)}
    assert {"num_layers", "kv_channels", "layernorm_epsilon", "normalization"} <= told
    for field in sorted(told - ELSEWHERE):
        assert getattr(args, field) == getattr(ours, field), field
    assert args.norm_epsilon == ours.layernorm_epsilon
    assert args.apply_layernorm_1p == ours.layernorm_zero_centered_gamma
    assert args.swiglu == (ours.gated_linear_unit and ours.activation_func is F.silu)
    assert args.bias_gelu_fusion == (MODELS[name].get("activation") == "gelu_tanh")
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    assert groups == ours.num_query_groups


def test_the_tokenizer_is_found_from_anywhere(tmp_path: Path, monkeypatch: Any) -> None:
    from megatron_scalebio.checkpoint.megatron_args import megatron_args

    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    for model, where in (("model", str(tmp_path / "model")), ("org/on-a-hub", "org/on-a-hub")):
        args = megatron_args(Config(), 100, {"type": "HuggingFaceTokenizer", "model": model})
        assert (args.tokenizer_type, args.tokenizer_model) == ("HuggingFaceTokenizer", where)
    assert not hasattr(megatron_args(Config(), 100), "tokenizer_type")
