"""The mixtures that a search went through, as stages of a training: where they differ, and when."""

import torch

from megatron_scalebio.mixture.confidence import TrajectoryBlocks

PIECES = 8  # of the run, of which neighbours that are alike make one stage


def stages_of(
    path: TrajectoryBlocks, tolerance: float, scale: float = 1.0, before: int = 0
) -> list[tuple[int, list[float]]]:
    """The step at which each stage begins, and its mean mixture; of a run without steps: none.

    Args:
        tolerance: share of a training that two neighbouring stages draw from other sources; where
            it is no more, they are one.
        scale: steps of the training for each of the search.
        before: steps of the search before its path begins; they belong to the first stage.
    """
    blocks_BS = path.tail(1.0)
    if not len(blocks_BS):
        return []
    stages: list[list[torch.Tensor]] = []
    for piece_BS in blocks_BS.tensor_split(min(PIECES, len(blocks_BS))):
        if stages:
            apart = (torch.cat(stages[-1]).mean(0) - piece_BS.mean(0)).abs().sum() / 2
            if apart <= tolerance:
                stages[-1].append(piece_BS)
                continue
        stages.append([piece_BS])
    found: dict[int, list[float]] = {}  # a stage of less than a step is none
    step = 0
    for stage in stages:
        whole_BS = torch.cat(stage)
        found[round(scale * (step + before)) if found else 0] = whole_BS.mean(0).tolist()
        step += len(whole_BS) * path.block_length
    return list(found.items())
