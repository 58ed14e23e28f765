"""The router of a mixture of experts: Megatron-Core's, right under padding.

Megatron-Core takes the mean of its z-loss over each rank's tokens, then the mean over the ranks
that share a sequence. These do not have equally many tokens where sequences end in padding. And its
count of the experts' load fails there (0.19.2).
"""

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter


class Router(TopKRouter):
    """Its z-loss is coeff · mean of logsumexp(logits)² over a micro-batch's tokens."""

    def apply_z_loss(
        self, logits_TE: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        coefficient = self.config.moe_z_loss_coeff
        if not coefficient or not self.training or not torch.is_grad_enabled():
            return logits_TE
        square_T = torch.logsumexp(logits_TE, dim=-1).square()
        tokens = torch.tensor(float(len(square_T)), device=square_T.device)
        if padding_mask is not None:
            square_T = square_T * ~padding_mask
            tokens = (~padding_mask).sum().float()
        if self.tp_cp_group.size() > 1:
            dist.all_reduce(tokens, group=self.tp_cp_group)
        return MoEAuxLossAutoScaler.apply(
            logits_TE, coefficient * square_T.sum() / tokens.clamp_min(1)
        )

    def _apply_expert_bias(
        self, routing_map_TE: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> None:
        padding_T1 = None if padding_mask is None else padding_mask[:, None]
        super()._apply_expert_bias(routing_map_TE, padding_T1)
