"""u's tokens go to the experts that w chose: Megatron-Core's `moe_enable_routing_replay`.

Its own actions replay what all routers of a process recorded. Here each router of u follows its
like in w, for the micro-batch that both take, in the forward pass and where the backward pass
computes that again. The weights of the chosen experts are u's own.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.transformer.moe.router_replay import RouterReplayAction

Chosen = Sequence[torch.Tensor]  # by each router of a model, (tokens, top-k)


class Choices:
    """What w's routers chose for its last micro-batch."""

    def __init__(self) -> None:
        self._batch: Any = None
        self._chosen: Chosen | None = None

    def keep(self, batch: Any, routers: Sequence[Any]) -> None:
        """After w's forward pass."""
        replays = [router.router_replay for router in routers]
        if None not in replays:
            self._batch = batch
            self._chosen = [replay.recorded_topk_idx for replay in replays]

    def of(self, batch: Any) -> Chosen | None:
        """For u's passes; None if w has not just seen the batch: u chooses by itself."""
        return self._chosen if batch is self._batch else None


def follow(routers: Sequence[Any], chosen: Chosen | None) -> None:
    """Before a forward or a backward pass: where tokens go; None: where the router sends them."""
    for number, router in enumerate(routers):
        replay = router.router_replay
        if replay is not None:
            replay.target_topk_idx = None if chosen is None else chosen[number]
            replay.router_replay_action = (
                RouterReplayAction.RECORD if chosen is None else RouterReplayAction.REPLAY_FORWARD
            )
