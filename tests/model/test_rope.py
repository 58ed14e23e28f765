"""Rope's frequencies and its scale of cos and sin are transformers' bit for bit, for every type.

Models and layouts are `test_parity`'s.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_scalebio.config import Config, ModelConfig
from megatron_scalebio.config_loader import build, load_config
from megatron_scalebio.errors import UserError

HEAD, MAX = 64, 256
PAIRS = list(range(1, HEAD // 2 + 1))
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LONGROPE = {
    "rope_type": "longrope", "original_max_position_embeddings": 128,
    "short_factor": [1 + 0.1 * pair for pair in PAIRS], "long_factor": [2.0 * p for p in PAIRS],
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}  # fmt: skip
MSCALE = {"mscale": 0.7, "mscale_all_dim": 1.2}

# name: (rope options of config.json, other keys, sequence length)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "default": ({"rope_type": "default"}, {}, 256),
    "linear, old key": ({"type": "linear", "factor": 3.0}, {}, 256),
    "llama3": (LLAMA3, {}, 256),
    "yarn": (YARN, {}, 256),
    "yarn, old key": ({**YARN, "type": "yarn", "rope_type": "yarn"}, {}, 256),
    "yarn, factor of lengths": ({**YARN, "factor": None}, {}, 256),
    "yarn, betas": ({**YARN, "beta_fast": 8, "beta_slow": 2, "truncate": False}, {}, 256),
    "yarn, null betas": ({**YARN, "beta_fast": None, "beta_slow": None}, {}, 256),
    "yarn, no ramp": ({**YARN, "beta_fast": 1, "truncate": False}, {}, 256),
    "yarn, very short": ({**YARN, "original_max_position_embeddings": 3}, {}, 256),
    "yarn, very long": ({**YARN, "original_max_position_embeddings": 2**20}, {}, 256),
    "yarn, longer than any": (
        {**YARN, "original_max_position_embeddings": 2**30, "beta_fast": 2**20}, {}, 256,
    ),
    "yarn, mscale": ({**YARN, **MSCALE}, {}, 256),
    "yarn, one mscale": ({**YARN, "mscale": 0.7}, {}, 256),
    "yarn, attention factor": ({**YARN, **MSCALE, "attention_factor": 1.3}, {}, 256),
    "yarn, factor 1": ({**YARN, "factor": 1.0}, {}, 256),
    "longrope, short": (LONGROPE, {}, 128),
    "longrope, long": (LONGROPE, {}, 129),
    "longrope, factor": ({**LONGROPE, "factor": 5.0}, {}, 256),
    "longrope, attention factor": ({**LONGROPE, "attention_factor": 1.1}, {}, 256),
    "longrope, original length beside": (LONGROPE, {"original_max_position_embeddings": 64}, 100),
    "dynamic": ({"rope_type": "dynamic", "factor": 2.5}, {}, 256),
}  # fmt: skip


def write(folder: Path, options: dict[str, Any], **keys: Any) -> Any:
    """A Qwen 2 configuration in a folder; returns transformers' own reading of it."""
    import transformers

    config = transformers.Qwen2Config(
        hidden_size=2 * HEAD, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=1,
        vocab_size=101, max_position_embeddings=MAX, architectures=["Qwen2ForCausalLM"],
        rope_theta=10000.0, rope_scaling=dict(options), **keys,
    )  # fmt: skip
    config.save_pretrained(folder)
    return transformers.AutoConfig.from_pretrained(folder)


def frequencies(config: Config, length: int) -> torch.Tensor:
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    from megatron_scalebio.model.rope import scale_frequencies

    model = config.model
    rope = RotaryEmbedding(
        HEAD, model.rotary_percent, rotary_base=model.rotary_base, use_cpu_initialization=True
    )
    if model.rope_scaling:
        scale_frequencies(rope, model, length)
    return rope.inv_freq


@pytest.mark.parametrize("name", CASES)
def test_frequencies_and_scale_are_transformers(tmp_path: Path, name: str) -> None:
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    options, keys, length = CASES[name]
    theirs = Qwen2RotaryEmbedding(write(tmp_path, options, **keys))
    theirs(torch.zeros(1), torch.arange(length)[None])  # chooses by the length
    ours = load_config(None, {"model": {"hf": str(tmp_path)}, "data": {"seq_length": length}})
    ours.validate_layout(1)
    assert torch.equal(frequencies(ours, length), theirs.inv_freq)
    scaling = ours.model.rope_scaling
    scale = scaling.scale_of_cos_and_sin if scaling else 1.0
    assert scale == pytest.approx(theirs.attention_scaling, rel=1e-15)


def test_longrope_chooses_by_the_run_and_not_by_a_batch(tmp_path: Path) -> None:
    """What a sequence's frequencies are must not depend on how far its batch is padded."""
    write(tmp_path, LONGROPE)
    model = {"hf": str(tmp_path)}
    for length, kind in ((128, "short_factor"), (256, "long_factor")):
        config = load_config(None, {"model": model, "data": {"seq_length": length}})
        periods = 10000 ** (torch.arange(0, HEAD, 2) / HEAD)
        want = 1 / (torch.tensor(LONGROPE[kind]) * periods)
        assert torch.equal(frequencies(config, config.data.seq_length), want)


def test_a_part_of_the_channels_is_turned(tmp_path: Path) -> None:
    import transformers
    from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding

    config = transformers.GPTNeoXConfig(
        hidden_size=2 * HEAD, num_attention_heads=2, num_hidden_layers=1, vocab_size=101,
        max_position_embeddings=MAX, architectures=["GPTNeoXForCausalLM"], rotary_pct=0.5,
        rope_scaling=dict(YARN),
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    theirs = GPTNeoXRotaryEmbedding(config)
    ours = load_config(None, {"model": {"hf": str(tmp_path)}})
    assert theirs.inv_freq.shape == (HEAD // 4,)
    assert torch.equal(frequencies(ours, 1024), theirs.inv_freq)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rope_type": "proportional"}, "supported: default, linear, llama3, yarn, longrope, dyn"),
        ({**YARN, "finetuned": True}, "unknown key 'finetuned'"),
        ({"rope_type": "default", "mrope_section": [16, 16]}, "unknown key 'mrope_section'"),
        ({**YARN, "long_factor": [1.0]}, "long_factor: [1.0] is not used by yarn scaling"),
        ({**YARN, "truncate": None}, "truncate: None is not of type bool"),
        ({**LONGROPE, "long_factor": [2.0]}, "long_factor: [2.0] has 1 numbers for 32 frequencies"),
    ],
)
def test_options_of_config_json_are_refused_by_name(
    tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    write(tmp_path, options)
    with pytest.raises(UserError) as refusal:
        load_config(None, {"model": {"hf": str(tmp_path)}})
    assert words in str(refusal.value), refusal.value


def test_checkpoints_describe_yarn_in_megatrons_terms() -> None:
    from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
        _yarn_get_concentration_factor,
    )

    from megatron_scalebio.checkpoint.megatron_args import megatron_args

    for options in ({}, MSCALE, {"attention_factor": 1.3}, {"factor": 1.0}):
        model = build(ModelConfig, {"rope_scaling": {**YARN, **options}}, "test")
        args = megatron_args(Config(model=model), 100)
        assert args.position_embedding_type == "yarn" and not args.use_rope_scaling
        theirs = _yarn_get_concentration_factor(
            args.yarn_rotary_scaling_factor, args.yarn_mscale, args.yarn_mscale_all_dim
        )
        assert model.rope_scaling is not None
        assert theirs == pytest.approx(model.rope_scaling.scale_of_cos_and_sin, rel=1e-12)
