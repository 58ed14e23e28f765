"""RMSNorm and LayerNorm for the local layer spec, under sequence parallelism too.

Megatron-Core's WrappedTorchNorm refuses sequence parallelism because torch's norms do not mark
their weights: each TP rank sees a part of the sequence, so their gradients must be summed over TP,
which finalize_model_grads does for weights that carry the mark. It also refuses weights centred on
zero (Gemma).
"""

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig


class LocalNorm:
    """Builds the norm that `config.normalization` names, marked for sequence parallelism."""

    def __new__(  # type: ignore[misc]
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: object
    ) -> torch.nn.Module:
        norm = _KINDS[config.normalization, config.layernorm_zero_centered_gamma](
            hidden_size, eps=eps, dtype=config.params_dtype
        )
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm


def plain_norm(
    config: TransformerConfig, hidden_size: int, eps: float, **unused: object
) -> torch.nn.Module:
    """RMSNorm without a weight. Megatron-Core's L2Norm is the same, and has torch compile it."""
    return torch.nn.RMSNorm(hidden_size, eps=eps, elementwise_affine=False)


class WholeNorm(torch.nn.Module):
    """RMSNorm of queries or keys over all heads together, those of other TP ranks too.

    Each rank holds the whole weight and uses its heads' part; Megatron sums its gradients over TP.

    Args:
        heads: attribute of the configuration with the number of heads.
    """

    def __init__(
        self, heads: str, config: TransformerConfig, hidden_size: int, eps: float = 1e-5,
        **unused: object,
    ) -> None:  # fmt: skip
        super().__init__()
        self.eps, width = eps, getattr(config, heads) * hidden_size
        self.weight = torch.nn.Parameter(torch.ones(width, dtype=config.params_dtype))

    def forward(self, x_SBND: torch.Tensor) -> torch.Tensor:
        group = parallel_state.get_tensor_model_parallel_group()
        flat = x_SBND.flatten(2).float()
        square_SB1 = flat.square().sum(dim=-1, keepdim=True)
        if group.size() > 1:  # summed over ranks, in the backward pass, too
            square_SB1 = copy_to_tensor_model_parallel_region(
                reduce_from_tensor_model_parallel_region(square_SB1, group=group), group=group
            )
        weight = self.weight.chunk(group.size())[group.rank()].float()
        normalized = flat * torch.rsqrt(square_SB1 / len(self.weight) + self.eps) * weight
        return normalized.to(x_SBND.dtype).view_as(x_SBND)


class _ZeroCentredRMSNorm(torch.nn.RMSNorm):
    """x / rms(x) · (1 + weight), in float32 up to the last rounding, as Gemma defines it."""

    def reset_parameters(self) -> None:
        torch.nn.init.zeros_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), self.normalized_shape, 1 + self.weight.float(), self.eps).to(
            x.dtype
        )


class _ZeroCentredLayerNorm(torch.nn.LayerNorm):
    """(x − mean) / deviation · (1 + weight) + bias."""

    def reset_parameters(self) -> None:
        torch.nn.init.zeros_(self.weight)
        torch.nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.normalized_shape, 1 + self.weight, self.bias, self.eps)


_KINDS = {
    ("RMSNorm", False): torch.nn.RMSNorm,
    ("RMSNorm", True): _ZeroCentredRMSNorm,
    ("LayerNorm", False): torch.nn.LayerNorm,
    ("LayerNorm", True): _ZeroCentredLayerNorm,
}
