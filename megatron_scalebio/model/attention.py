"""Causal core attention by torch's scaled_dot_product_attention.

Megatron-Core's local DotProductAttention builds the sequence² score matrix; this one does not. It
serves the CPU, and CUDA without Transformer Engine. Sequences are padded on the right, so the
causal mask alone keeps padding out of every real position.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig


class SdpaAttention(MegatronModule):
    """softmax(q kᵀ / √d) v over the past, for grouped queries too.

    Legend: S sequence, B batch, N query heads of this rank, G key/value heads, D head size.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        assert attn_mask_type is AttnMaskType.causal
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query_SBND: torch.Tensor,
        key_SBGD: torch.Tensor,
        value_SBGD: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **unused: Any,
    ) -> torch.Tensor:
        """Returns the context, S × B × (N·D)."""
        assert attention_mask is None, "the causal mask is implied"
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query_SBND, key_SBGD, value_SBGD))
        with (
            tensor_parallel.get_cuda_rng_tracker().fork()
            if self._drops()
            else contextlib.nullcontext()
        ):
            context_BNSD = torch.nn.functional.scaled_dot_product_attention(
                query,
                key,
                value,
                dropout_p=self.dropout if self._drops() else 0.0,
                is_causal=True,
                scale=self.softmax_scale,
                enable_gqa=query.size(1) != key.size(1),
            )
        return context_BNSD.permute(2, 0, 1, 3).flatten(2)

    def _drops(self) -> bool:
        return self.training and self.dropout > 0
