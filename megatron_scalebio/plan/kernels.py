"""The kernels that the target's layers run, on the meta device: what they save and allocate.

torch picks fused kernels by device and would fall back to their definitions on meta. Here meta
tensors take the path of the target: on CUDA flash attention and fused RMSNorm, SwiGLU and
bias-dropout-add (Transformer Engine's layers save the same tensors), on CPU flash attention.
"""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from megatron_scalebio.config import Config
from megatron_scalebio.model import attention
from megatron_scalebio.model.attention import SdpaAttention
from megatron_scalebio.model.layers import ModelSettings
from megatron_scalebio.model.settings import fuses_activation, transformer_config
from megatron_scalebio.plan.fake_rank import replaced

_aten = torch.ops.aten
# Stands for torch's CausalBias, which cannot be made while a ledger looks on.
_LOWER_RIGHT = object()


def on_shapes(config: Config) -> Config:
    """The configuration that can be built without Transformer Engine: equal weights and names."""
    plain = copy.deepcopy(config)
    plain.model.transformer_impl = "local"
    plain.parallel.fp8_format = plain.parallel.fp4_format = None
    plain.model.moe_token_dispatcher_type = "alltoall"
    return plain


def settings_for(config: Config, cuda: bool) -> ModelSettings:
    """Megatron's configuration as on the target."""
    settings = transformer_config(config)
    settings.variable_seq_lengths = False  # every micro-batch at full length: the worst case
    if cuda:
        settings.deallocate_pipeline_outputs = True
        settings.bias_activation_fusion = fuses_activation(config.model)
        settings.bias_dropout_fusion = not (config.model.num_experts and settings.add_bias_linear)
    return settings


@contextmanager
def kernels_of(config: Config, cuda: bool) -> Iterator[None]:
    """Meta tensors take the target's kernels within."""
    from torch.nn.attention import bias  # where a pass looks it up; brings torch's compiler

    with ExitStack() as stack:
        if cuda and config.model.transformer_impl != "local":
            for name in ("_fused", "_explicit"):
                stack.enter_context(replaced(SdpaAttention, name, _transformer_engines))
            stack.enter_context(replaced(attention, "blocks", _one_block))
        flash = _flash_on_cuda if cuda else _flash_on_cpu
        stack.enter_context(replaced(F, "scaled_dot_product_attention", flash))
        stack.enter_context(replaced(bias, "causal_lower_right", lambda q, k: _LOWER_RIGHT))
        if cuda:
            stack.enter_context(replaced(F, "rms_norm", _fused_rms_norm))
        yield


_reference, _explicit = F.scaled_dot_product_attention, SdpaAttention._explicit


def _one_block(queries: int, keys: int, window: int | None) -> list[tuple[slice, slice]]:
    return [(slice(queries), slice(keys))]


def _transformer_engines(
    layer: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float
) -> torch.Tensor:
    """Its attention, which takes windows and a score of nothing without a matrix, but no caps."""
    offset = layer.softmax_offset
    if layer.softcap is not None or (offset is not None and query.size(2) != key.size(2)):
        return _explicit(layer, query, key, value, dropout)
    grouped = query.size(1) != key.size(1)
    return F.scaled_dot_product_attention(
        query, key, value, None, dropout, True, scale=layer.softmax_scale, enable_gqa=grouped
    )


def _flash_on_cuda(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: Any = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    if attn_mask is _LOWER_RIGHT:
        attn_mask, is_causal = None, True
    if attn_mask is not None:  # flash attention takes no mask: the definition is computed
        return _reference(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    lacking = query.size(-1) - value.size(-1)  # of latent attention
    wide = F.pad(value, (0, lacking)) if lacking else value  # which would be a copy
    return _aten._scaled_dot_product_flash_attention(
        query, key, wide, dropout_p, is_causal, False, scale=scale
    )[0][..., : value.size(-1)]


def _flash_on_cpu(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: Any = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    if attn_mask is not None:  # one of its own for every call, in the type of the scores
        attn_mask = query.new_empty((query.shape[2], key.shape[2]))
    if dropout_p:
        return _reference(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if value.size(-1) != query.size(-1):
        return _reference(query, key, value, attn_mask, 0.0, is_causal, scale=scale)
    return _aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale
    )[0]


class _RmsNorm(torch.autograd.Function):
    """Saves its input, any weight and one fp32 number a row, as the fused kernel does."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), None if weight is None else torch.empty_like(weight)


def _fused_rms_norm(
    x: torch.Tensor, shape: Any, weight: torch.Tensor | None = None, eps: float | None = None
) -> torch.Tensor:
    return _RmsNorm.apply(x, weight)
