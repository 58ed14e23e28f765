"""Latent attention (DeepSeek): queries, keys and values from narrow vectors, which are normalized.

Megatron-Core's, whose norms are where the layer's spec has them, and whose gradients are whole
under tensor parallelism without Transformer Engine, too.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel import (
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.multi_latent_attention import MLASelfAttention

_NORM_EPSILON = 1e-6  # whatever that of the other norms is
_PARTS = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")


class LatentAttention(MLASelfAttention):
    def __init__(self, *words: Any, **keywords: Any) -> None:
        super().__init__(*words, **keywords)
        for part in self.children():
            if hasattr(part, "eps"):
                part.eps = _NORM_EPSILON

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        """Megatron-Core would normalize what queries are made from where it is not narrow, too."""
        return {name: getattr(submodules, name) for name in _PARTS}

    def _qkv_down_projection(self, hidden_SBH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The narrow vectors, of this rank's part of the sequence.

        Of the keys' channels with rope, each TP rank's gradient is that of its heads. From parts of
        the sequence they are summed, from parts of the vector they would not be.
        """
        q_SBQ, kv_SBK = super()._qkv_down_projection(hidden_SBH)
        if kv_SBK.size(-1) != self.config.kv_lora_rank + self.config.qk_pos_emb_head_dim:
            whole_SBK = gather_from_tensor_model_parallel_region(kv_SBK)
            kv_SBK = scatter_to_sequence_parallel_region(whole_SBK)
        return q_SBQ, kv_SBK
