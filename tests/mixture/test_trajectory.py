"""The trajectory of a mixture, kept as block means."""

from __future__ import annotations

import pytest
import torch

from megatron_scalebio.mixture.confidence import (
    TrajectoryBlocks,
)


def filled(trajectory_TS: torch.Tensor, capacity: int = 512) -> TrajectoryBlocks:
    blocks = TrajectoryBlocks(trajectory_TS.shape[1], capacity)
    for probs_S in trajectory_TS:
        blocks.append(probs_S)
    return blocks


@pytest.mark.parametrize("steps", [1, 7, 8, 9, 63, 64, 100, 1000])
def test_merged_blocks_are_means_of_their_steps(steps: int) -> None:
    generator = torch.Generator().manual_seed(6)
    trajectory = torch.rand(steps, 3, dtype=torch.float64, generator=generator).softmax(-1)
    blocks = filled(trajectory, capacity=8)
    assert blocks.steps == steps
    assert blocks.num_blocks < blocks.capacity
    length = blocks.block_length
    expected = trajectory[: blocks.num_blocks * length].view(-1, length, 3).mean(1)
    torch.testing.assert_close(blocks.tail(1.0), expected, rtol=1e-14, atol=0)


def test_tail_is_the_end_of_the_run() -> None:
    trajectory = torch.arange(100.0)[:, None]
    assert torch.equal(filled(trajectory).tail(0.5), trajectory[50:].double())
    assert torch.equal(filled(trajectory).tail(0.001), trajectory[-1:].double())
    assert len(TrajectoryBlocks(2).tail()) == 0
    with pytest.raises(ValueError, match="fraction"):
        filled(trajectory).tail(0.0)


def test_tail_of_merged_blocks_is_the_blocks_that_lie_wholly_in_it() -> None:
    trajectory = torch.rand(
        1000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5)
    )
    blocks = filled(trajectory, capacity=8)
    assert (blocks.num_blocks, blocks.block_length, blocks.steps) == (7, 128, 1000)
    means = [trajectory[128 * k : 128 * (k + 1)].mean(0) for k in range(7)]
    for fraction, kept in ((0.5, 3), (0.43, 3), (0.42, 2), (1.0, 7), (1 / 7, 1), (0.01, 1)):
        torch.testing.assert_close(blocks.tail(fraction), torch.stack(means[7 - kept :]))
    assert torch.equal(blocks.tail(), blocks.tail(0.5))
    # 0.29 · 100 is 28.999999999999996.
    assert len(filled(trajectory[:100]).tail(0.29)) == 29
    for fraction in (-0.1, 0.0, 1.001):
        with pytest.raises(ValueError, match="fraction"):
            blocks.tail(fraction)


def test_blocks_hold_single_steps_until_there_are_512() -> None:
    blocks = TrajectoryBlocks(2)
    for probs_S in torch.rand(511, 2):
        blocks.append(probs_S)
    assert (blocks.num_blocks, blocks.block_length) == (511, 1)
    blocks.append(torch.rand(2, requires_grad=True))
    assert (blocks.num_blocks, blocks.block_length) == (256, 2)
    assert not blocks.tail().requires_grad


@pytest.mark.parametrize(("sources", "capacity"), [(0, 8), (2, 0), (2, 1), (2, 3), (2, 9)])
def test_blocks_need_a_source_and_pairs(sources: int, capacity: int) -> None:
    TrajectoryBlocks(1, 2)
    with pytest.raises(ValueError, match="even"):
        TrajectoryBlocks(sources, capacity)


@pytest.mark.parametrize("cut", [0, 1, 8, 13, 200])
def test_resumed_trajectory_is_identical(cut: int) -> None:
    trajectory = torch.rand(203, 4).softmax(-1)
    resumed = TrajectoryBlocks(4, capacity=8)
    resumed.load_state_dict(filled(trajectory[:cut], capacity=8).state_dict())
    for probs_S in trajectory[cut:]:
        resumed.append(probs_S)
    expected = filled(trajectory, capacity=8).state_dict()
    for key, value in resumed.state_dict().items():
        same = torch.equal(value, expected[key]) if torch.is_tensor(value) else None
        assert same if same is not None else value == expected[key], key


def test_state_is_a_copy_and_of_these_sources() -> None:
    trajectory = torch.rand(21, 2, dtype=torch.float64)
    blocks = filled(trajectory, capacity=4)
    assert blocks.block_length == 8
    state = blocks.state_dict()
    loaded = TrajectoryBlocks(2, capacity=4)
    loaded.load_state_dict(state)
    for _ in range(20):
        blocks.append(torch.rand(2))
        loaded.append(torch.rand(2))
    assert (state["num_blocks"], state["block_length"], state["open_steps"]) == (2, 8, 5)
    sums = trajectory[:16].view(2, 8, 2).sum(1)
    torch.testing.assert_close(state["block_sums"], torch.cat([sums, torch.zeros_like(sums)]))
    torch.testing.assert_close(state["open_sum"], trajectory[16:].sum(0))
    for other in (TrajectoryBlocks(3, capacity=4), TrajectoryBlocks(2, capacity=8)):
        with pytest.raises(ValueError, match="sources"):
            other.load_state_dict(state)


def test_a_trajectory_begins_without_steps() -> None:
    path = TrajectoryBlocks(2)
    assert path.steps == 0 and path.state_dict()["open_steps"] == 0
