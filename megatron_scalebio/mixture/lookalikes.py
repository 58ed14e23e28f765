"""Sources that a run can't tell from each other: near-duplicates, of which only the sum is known.

What the validation loss loses when weight goes from source i to source j and back grows with
E[(g_i − g_j)²], g the hypergradient without its noise: both are quadratic forms of the difference
of the sources' gradients. The noise of a step's examples is new in each step, what the models feel
lasts for several; so the square is a mean of products of steps,

    D_ij = mean over t of Δ_t · (Δ_{t−1} + … + Δ_{t−4}) / 4,      Δ = g_i − g_j

with a standard error from means of blocks of steps. Two sources look alike if D_ij is no more than
noise, and at most a fifth of the median pair's however unlucky the noise was; where that is noise
itself, nothing can be said. Steps before about the last half count no more: there, all sources may
move alike.
"""

from typing import Any

import torch

LAGS = 4
BLOCK = 20  # steps; what lasts longer than that would make the standard error too small
LEAST_BLOCKS = 5
MOST_SOURCES = 256  # a step costs S² operations; with more, none are looked for
SIGNIFICANT = 3.0  # standard errors: of a difference between two sources
SURE = 2.0  # and to either side of a D, for what is said to be small or large
ALIKE = 0.2  # of the median pair's D
MOST_APART = 30.0  # λ of real twins wanders apart: 12 times was seen in 500 steps


class Lookalikes:
    """Pairs of S sources whose hypergradients are one, as seen in the last half of the steps."""

    def __init__(self, num_sources: int) -> None:
        self.size = num_sources if 3 <= num_sources <= MOST_SOURCES else 0
        S = self.size
        self._recent_LS = torch.zeros(LAGS, S, dtype=torch.float64)
        self._open_SS = torch.zeros(S, S, dtype=torch.float64)
        # Sums of blocks' means and of their squares: since the last power of two, and before it.
        self._sums_22SS = torch.zeros(2, 2, S, S, dtype=torch.float64)
        self._blocks_2 = torch.zeros(2, dtype=torch.int64)
        self._steps = 0

    def append(self, hypergradient_S: torch.Tensor) -> None:
        if not self.size:
            return
        g_S = hypergradient_S.detach().to("cpu", torch.float64)
        if self._steps >= LAGS:
            earlier_S = self._recent_LS.mean(0)
            self._open_SS += (g_S[:, None] - g_S) * (earlier_S[:, None] - earlier_S)
        self._recent_LS[self._steps % LAGS] = g_S
        self._steps += 1
        blocks, rest = divmod(self._steps - LAGS, BLOCK)
        if blocks < 1 or rest:
            return
        mean_SS = self._open_SS / BLOCK
        self._sums_22SS[0] += torch.stack([mean_SS, mean_SS.square()])
        self._blocks_2[0] += 1
        self._open_SS.zero_()
        if blocks & (blocks - 1) == 0:
            self._sums_22SS[1], self._blocks_2[1] = self._sums_22SS[0], self._blocks_2[0]
            self._sums_22SS[0].zero_()
            self._blocks_2[0] = 0

    def groups(self, gained_S: torch.Tensor) -> list[list[int]]:
        """Sources that look alike, directly or by others between them; each group ascending.

        Args:
            gained_S: each one's weight over its initial one. What has come to differ thirtyfold
                has been told apart on the way.
        """
        count = int(self._blocks_2.sum())
        if not self.size or count < LEAST_BLOCKS:
            return []
        mean_SS, square_SS = self._sums_22SS.sum(0) / count
        error_SS = ((square_SS - mean_SS.square()).clamp_min(0) / count).sqrt()
        first, second = torch.triu_indices(self.size, self.size, 1)
        usual, place = mean_SS[first, second].median(0)
        if usual <= SURE * error_SS[first, second][place]:
            return []  # there is no measure
        alike_SS = (mean_SS <= SIGNIFICANT * error_SS) & (mean_SS + SURE * error_SS < ALIKE * usual)
        alike_SS &= gained_S[:, None] < MOST_APART * gained_S
        alike_SS &= alike_SS.T.clone()
        return joined(alike_SS)

    def state_dict(self) -> dict[str, Any]:
        return {
            "recent": self._recent_LS.clone(),
            "open": self._open_SS.clone(),
            "sums": self._sums_22SS.clone(),
            "blocks": self._blocks_2.clone(),
            "steps": self._steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for mine, theirs in (
            (self._recent_LS, state["recent"]), (self._open_SS, state["open"]),
            (self._sums_22SS, state["sums"]), (self._blocks_2, state["blocks"]),
        ):  # fmt: skip
            mine.copy_(theirs)
        self._steps = int(state["steps"])


def joined(alike_SS: torch.Tensor) -> list[list[int]]:
    """Groups of what is alike, directly or by others between them; each ascending."""
    alike_SS = alike_SS | torch.eye(len(alike_SS), dtype=torch.bool)
    for _ in range(len(alike_SS).bit_length()):  # by one, two, four … others
        alike_SS = (alike_SS.double() @ alike_SS.double()) > 0
    groups = {tuple(row.nonzero().flatten().tolist()) for row in alike_SS}
    return sorted(list(group) for group in groups if len(group) > 1)
