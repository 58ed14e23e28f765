"""Which source serves which validation set, from a run whose steps look at the sets in turn.

A step's hypergradient tells what the validation sets together want of each source. Until u is reset
(a window), the weights of the sets swing towards one of them: balanced, so that over all windows
the goal is what it was. Through d = w − u the hypergradient is linear in what w has been shown,

    g_i(t) ≈ − Σ_v K_iv f_v(t),     f_v: sum of q_v over the steps since u was w

and K [S × V] is its least-squares fit over the run: how far source i, more than the mixture's
average, lowers the loss of set v. Where u keeps a part of its departure at a reset, so does f.
Intervals are the jackknife's over blocks of steps. What K can say (docs/numbers.md) was compared
with trainings that leave one source out: docs/experiments.md.
"""

import math
from statistics import NormalDist
from typing import Any

import numpy as np
import torch

from megatron_scalebio.config import Config
from megatron_scalebio.core.scalebio import StepReport
from megatron_scalebio.engine.state import Data
from megatron_scalebio.errors import UserError
from megatron_scalebio.logs.interactions import Interaction
from megatron_scalebio.mixture.confidence import TrajectoryBlocks

SWING = 0.5  # of the way to one set, in a window, where sets weigh alike
MOST_PAIRS = 100_000  # of source and set; 32 blocks of them are kept
_BLOCKS, _FEWEST_BLOCKS = 32, 8
FEWEST_WINDOWS = 30  # make so many blocks
_KEPT = 0.9  # last share of the steps that the fit is of: the mixture moves fast before


class Interactions:
    """The sums that K is fitted from.

    Args:
        sources, sets: how many (S, V).
        window: steps between resets of u.
    """

    def __init__(self, sources: int, sets: int, window: int, seed: int) -> None:
        self._sources, self._sets, self._window, self._seed = sources, sets, window, seed
        self.shown_V = torch.zeros(sets, dtype=torch.float64)  # f
        self.sums = TrajectoryBlocks(sets * (sets + sources), _BLOCKS)  # f fᵀ and g fᵀ

    def swing(self, step: int, share_V: torch.Tensor) -> torch.Tensor:
        """What is added to the weights q of the sets in a step, [V], adding up to 0.

        q goes a part of the way to one set, so that no weight leaves [0, 1]; a part in proportion
        to the set's weight, so that the windows of all sets add up to nothing. A set without
        weight has no swing, and nothing is learned of it.
        """
        turn, place = divmod(step // self._window, self._sets)
        order = np.random.default_rng((self._seed, 3, turn)).permutation(self._sets)
        shown = order[place]
        part = share_V[shown] * min(SWING * self._sets, 1 / float(share_V.max()))
        swing_V = -part * share_V
        swing_V[shown] += part
        return swing_V

    def begin_step(self, step: int, memory: float) -> None:
        """A reset of u takes from what w has been shown as much as from its departure."""
        if step % self._window == 0:
            self.shown_V *= 1.0 - 1.0 / memory

    def append(self, report: StepReport, hypergradient_S: torch.Tensor) -> None:
        """A step that was applied."""
        of_sets = self.shown_V[:, None] * self.shown_V
        of_pairs = hypergradient_S[:, None] * self.shown_V
        self.sums.append(torch.cat([of_sets.flatten(), of_pairs.flatten()]))
        self.shown_V += report.shares_V

    def found(self, data: Data, confidence: float) -> Interaction | None:
        """K with its intervals; None where there are too few steps for one."""
        blocks_B, V = self.sums.tail(_KEPT), self._sets
        # What one window has seen is one piece of evidence: no block is shorter than two of them.
        width = math.ceil(2 * self._window / self.sums.block_length)
        groups = len(blocks_B) // width
        if groups < _FEWEST_BLOCKS:
            return None
        blocks_B = blocks_B[-groups * width :].view(groups, width, -1).sum(1)

        def fitted(sums: torch.Tensor) -> torch.Tensor:
            of_sets, of_pairs = sums[: V * V].view(V, V), sums[V * V :].view(-1, V)
            return -of_pairs @ torch.linalg.pinv(of_sets, hermitian=True)

        whole = blocks_B.sum(0)
        without_BSV = torch.stack([fitted(whole - each) for each in blocks_B])
        spread_SV = without_BSV.var(0, correction=0).mul(groups - 1).sqrt()
        z = NormalDist().inv_cdf(0.5 + confidence / 2)
        half_SV = (z + (z**3 + z) / (4 * (groups - 1))) * spread_SV  # Student's t, nearly
        serves_SV = fitted(whole)
        return Interaction(
            np.array([source.name for source in data.sources]),
            np.array([source.name for source in data.validation]),
            serves_SV.numpy(),
            (serves_SV - half_SV).numpy(),
            (serves_SV + half_SV).numpy(),
            confidence,
        )

    def state_dict(self) -> dict[str, Any]:
        return {"shown": self.shown_V.clone(), "sums": self.sums.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shown_V.copy_(state["shown"])
        self.sums.load_state_dict(state["sums"])


def interactions_of(config: Config, data: Data) -> Interactions | None:
    """What the run is to fit; None if it is not asked for that.

    Raises:
        UserError: if there are too many pairs.
    """
    if not config.bilevel.interactions:
        return None
    sources, sets = len(data.sources), len(data.validation)
    if sources * sets > MOST_PAIRS:
        raise UserError(
            f"bilevel.interactions: True with {sources:,} sources and {sets} validation sets "
            f"means more than {MOST_PAIRS:,} pairs (drop it, or give fewer sets)"
        )
    window = steps_between_resets(config)
    assert window is not None
    return Interactions(sources, sets, window, config.train.seed)


def steps_between_resets(config: Config) -> int | None:
    """Of u to w; None: it is never reset."""
    lisa, interval = config.lisa, config.bilevel.resync_interval
    return lisa.lisa_interval if lisa.lisa_layers and interval is not None else interval
