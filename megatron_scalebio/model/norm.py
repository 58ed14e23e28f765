"""RMSNorm and LayerNorm for the local layer spec, under sequence parallelism too.

Megatron-Core's WrappedTorchNorm refuses sequence parallelism because torch's norms do not mark
their weights: each TP rank sees a part of the sequence, so their gradients must be summed over TP,
which finalize_model_grads does for weights that carry the mark.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class LocalNorm:
    """Builds the norm that `config.normalization` names, marked for sequence parallelism."""

    def __new__(  # type: ignore[misc]
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: object
    ) -> torch.nn.Module:
        kinds = {"RMSNorm": torch.nn.RMSNorm, "LayerNorm": torch.nn.LayerNorm}
        norm = kinds[config.normalization](hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm
