"""The load of experts where there are no tokens to route: each expert gets its equal share.

Routers are trained towards it. Where they are not there yet, an expert that gets twice its share
takes twice the activations.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from megatron_scalebio.compat import require
from megatron_scalebio.plan.fake_rank import replaced

_SIZES = "_maybe_dtoh_and_synchronize"


@contextmanager
def balanced_experts() -> Iterator[None]:
    """Token dispatchers send, and experts get, equal numbers of tokens within."""
    require(MoEAlltoAllTokenDispatcher, _SIZES)
    destroy_moe_metrics_tracker()  # which has room for the layers of one model
    with replaced(MoEAlltoAllTokenDispatcher, _SIZES, _equal_sizes):
        yield


def _equal_sizes(dispatcher: Any, point: str, tokens_per_expert: Any = None) -> torch.Tensor:
    """Stands for the sizes that routing gives: those to send, and this rank's experts' loads."""
    sent, experts = dispatcher.num_out_tokens, dispatcher.num_local_experts
    ep, tp = dispatcher.ep_size, dispatcher.tp_size
    if ep > 1 or tp > 1:
        dispatcher.input_splits = dispatcher.output_splits = _parts(sent, ep)
        dispatcher.output_splits_tp = torch.tensor([sent] * tp, device="cpu")
    loads = torch.tensor(_parts(sent * tp, ep * tp * experts), device="cpu").view(-1, experts)
    if experts > 1:
        dispatcher.num_global_tokens_per_local_expert = loads
    return loads.sum(0)


def _parts(total: int, number: int) -> list[int]:
    """As equal as whole numbers are."""
    return [total // number + (place < total % number) for place in range(number)]
