"""Rope's frequencies under every `rope_scaling`.

Channel pair i of D / 2 turns by θ_i = base^(−2i / D) radians a token. Under

    linear     θ_i / factor
    llama3     θ_i / factor for long periods, θ_i for short ones, blended between
    yarn       k_i θ_i + (1 − k_i) θ_i / factor      k_i falls from 1 to 0 between two channels
    longrope   θ_i / short_i up to the original length, θ_i / long_i above it
    dynamic    θ_i: other frequencies only beyond max_position_embeddings, which is refused

yarn and longrope also multiply cos and sin of queries and keys by m, in the layers that they scale.

longrope's choice is by the run's `seq_length`. transformers takes the length of the batch at hand,
padding included: then a sequence's loss would depend on its neighbours in the micro-batch, and on
what lengths are padded to, which differs between layouts.
"""

import math
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.utils import is_layer_window_attention

from megatron_scalebio.compat.megatron import scale_cos_and_sin, scaled_as_llama3
from megatron_scalebio.config.model import ModelConfig
from megatron_scalebio.config.rope import RopeScaling


def turn_windows_apart(gpt: Any, model: ModelConfig) -> None:
    """Gives the layers of a chunk that have a window the rope of `window_rotary_base`, unscaled."""
    rope = RotaryEmbedding(
        model.head_channels, model.rotary_percent, rotary_base=model.window_rotary_base,
        rotary_interleaved=model.rotary_interleaved,
        use_cpu_initialization=gpt.config.use_cpu_initialization,
    )  # fmt: skip

    def turn(layer: Any, args: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        group = parallel_state.get_context_parallel_group()
        length = len(keywords["rotary_pos_emb"]) * group.size()
        return args, {**keywords, "rotary_pos_emb": rope(length, cp_group=group)}

    size, every = gpt.config.window_size, gpt.config.window_attn_skip_freq
    for layer in gpt.decoder.layers:
        if is_layer_window_attention(size, every, layer.layer_number):
            layer.register_forward_pre_hook(turn, with_kwargs=True)
            scale_cos_and_sin(layer.self_attention, 1.0)


def scale_rope(gpt: Any, model: ModelConfig, seq_length: int) -> None:
    """Scales a chunk's rope: its frequencies, and what all its layers multiply cos and sin by."""
    assert model.rope_scaling is not None
    scale_frequencies(gpt.rotary_pos_emb, model, seq_length)
    for layer in gpt.decoder.layers:
        scale_cos_and_sin(layer.self_attention, model.rope_scaling.scale_of_cos_and_sin)


def scale_frequencies(rope: RotaryEmbedding, model: ModelConfig, seq_length: int) -> None:
    """Gives Megatron's rotary module the scaled frequencies.

    Args:
        seq_length: of the run, in tokens.
    """
    scaling = model.rope_scaling
    assert scaling is not None
    base, device = model.rotary_base, rope.inv_freq.device
    if scaling.rope_type == "linear":
        rope.inv_freq = rope.inv_freq / scaling.factor
    elif scaling.rope_type == "llama3":
        rope.inv_freq = scaled_as_llama3(
            rope,
            factor=scaling.factor,
            low_freq_factor=scaling.low_freq_factor,
            high_freq_factor=scaling.high_freq_factor,
            original_max_position_embeddings=scaling.original_max_position_embeddings,
        )
    elif scaling.rope_type == "yarn":
        rope.inv_freq = _yarn(scaling, base, 2 * len(rope.inv_freq), device)
    elif scaling.rope_type == "longrope":
        is_long = seq_length > scaling.original_max_position_embeddings
        divisors = scaling.long_factor if is_long else scaling.short_factor
        divisor = torch.tensor(divisors, dtype=torch.float32, device=device)
        rope.inv_freq = 1 / (divisor * _periods(base, 2 * len(rope.inv_freq), device))


def _periods(base: int, dim: int, device: torch.device) -> torch.Tensor:
    """1 / θ_i, in tokens a radian."""
    return base ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)


def _yarn(scaling: RopeScaling, base: int, dim: int, device: torch.device) -> torch.Tensor:
    original = scaling.original_max_position_embeddings

    def pair_that_turns(times: float) -> float:
        """Where θ · original = 2π · times, as a fractional channel pair."""
        return dim * math.log(original / (2 * math.pi * times)) / (2 * math.log(base))

    first, last = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    width = last - first or 0.001
    pair = torch.arange(dim // 2, dtype=torch.float32, device=device)
    kept = 1 - ((pair - first) / width).clamp(0, 1)
    periods = _periods(base, dim, device)
    return kept * (1 / periods) + (1 - kept) * (1 / (scaling.factor * periods))
