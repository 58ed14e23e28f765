"""Groups of sources, level by level: the mixture as p(group) · p(source | group).

    g = ḡ + (ḡ_G − ḡ) + (g_i − ḡ_G)          ḡ, ḡ_G: mean of g under p, over all and over a group

Each part steps in units of its own usual size. A group's part is a mean over its sources: where
each of them is seen seldom it has far less noise than theirs, and need not wait for them.
"""

from collections.abc import Sequence

import torch


class Levels:
    """The groups that S sources belong to.

    Args:
        groups: for each level, coarse to fine, the number of each source's group, from 0; the
            sources themselves are the last level, and not named.
    """

    def __init__(self, groups: Sequence[Sequence[int]]) -> None:
        self._groups = [torch.tensor(level) for level in groups]

    def __len__(self) -> int:
        """Levels, the sources' own included."""
        return len(self._groups) + 1

    def parts(self, values_S: torch.Tensor, probs_S: torch.Tensor) -> list[torch.Tensor]:
        """What each level adds to the mean of values under p, [S] each; in sum, values less it."""
        above_S = (probs_S * values_S).sum().expand_as(values_S)
        parts = []
        for level, group_S in enumerate(self._groups):
            mass_G = self.sums(probs_S[None], level)[0]
            mean_G = self.sums((probs_S * values_S)[None], level)[0] / mass_G
            parts.append(mean_G[group_S] - above_S)
            above_S = mean_G[group_S]
        return [*parts, values_S - above_S]

    def sums(self, blocks_BS: torch.Tensor, level: int) -> torch.Tensor:
        """Sums over the sources of each group: [B, S] → [B, G]."""
        group_S = self._groups[level]
        sums_BG = blocks_BS.new_zeros(len(blocks_BS), int(group_S.max()) + 1)
        return sums_BG.index_add_(1, group_S, blocks_BS)
