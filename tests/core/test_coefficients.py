"""Coefficients of a global batch: each source's losses are divided once, by what all ranks hold."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_scalebio.core import batch as core_batch
from megatron_scalebio.core.batch import MicroBatch, gpt_losses, mean_coefficients


class Solo:
    """A process group of one rank, or of more."""

    def __init__(self, ranks: int = 1) -> None:
        self.size = lambda: ranks


ALONE: Any = SimpleNamespace(cp=Solo(), dp=Solo())
GENERATOR = np.random.default_rng(3)
# Micro-batches of a global batch of 24 sequences of three groups of four; one has no target.
MASKS = [torch.from_numpy(GENERATOR.random((4, 9)) < 0.5).float() for _ in range(6)]
MASKS[2][1] = 0.0
GROUPS = [torch.from_numpy(GENERATOR.integers(0, 3, 4)) for _ in range(6)]
VALUES = [torch.from_numpy(GENERATOR.random((4, 9))) for _ in range(6)]


def batch(mask_BS: torch.Tensor, group_B: torch.Tensor) -> MicroBatch:
    ids_BS = torch.arange(mask_BS.numel()).view(mask_BS.shape)
    return MicroBatch(ids_BS, ids_BS + 100, mask_BS, ids_BS + 200, group_B)


BATCHES = [batch(mask, group) for mask, group in zip(MASKS, GROUPS, strict=True)]


def means(coefficients: list[torch.Tensor]) -> torch.Tensor:
    total_S = torch.zeros(4, dtype=torch.float64)
    for mask_BS, group_B, value_BS, each_B in zip(MASKS, GROUPS, VALUES, coefficients, strict=True):
        total_S.index_add_(0, group_B, each_B * (mask_BS * value_BS).sum(1))
    return total_S


@pytest.mark.parametrize("mean", ["sample", "token"])
def test_losses_are_the_mean_that_was_asked_for(mean: str) -> None:
    """Against a loop over sequences."""
    got_S = means(mean_coefficients(BATCHES, 4, mean, ALONE))
    for group in range(3):
        of_sequences, tokens = [], []
        for mask_BS, group_B, value_BS in zip(MASKS, GROUPS, VALUES, strict=True):
            for line in range(4):
                values = value_BS[line][mask_BS[line] > 0]
                if group_B[line] == group and len(values):
                    of_sequences.append(float(values.mean()))
                    tokens += values.tolist()
        want = np.mean(of_sequences) if mean == "sample" else np.mean(tokens)
        assert float(got_S[group]) == pytest.approx(want, rel=1e-12)
    assert float(got_S[3]) == 0.0


@pytest.mark.parametrize("mean", ["sample", "token"])
def test_a_sequence_without_a_target_counts_nowhere(mean: str) -> None:
    coefficients = mean_coefficients(BATCHES, 4, mean, ALONE)
    assert float(coefficients[2][1]) == 0.0
    assert all(torch.isfinite(each_B).all() for each_B in coefficients)
    kept = [batch(mask[mask.sum(1) > 0], group[mask.sum(1) > 0])
            for mask, group in zip(MASKS, GROUPS, strict=True)]  # fmt: skip
    without = torch.cat(mean_coefficients(kept, 4, mean, ALONE))
    flat = torch.cat(coefficients)
    assert flat[torch.cat(MASKS).sum(1) > 0].equal(without)


@pytest.mark.parametrize("mean", ["sample", "token"])
def test_counts_are_those_of_all_ranks(monkeypatch: pytest.MonkeyPatch, mean: str) -> None:
    """Two data-parallel ranks of three micro-batches, each of two context-parallel halves."""
    whole = mean_coefficients(BATCHES, 4, mean, ALONE)
    halves = [slice(0, 5), slice(5, 9)]
    groups: Any = SimpleNamespace(cp="cp", dp=Solo(2))
    targets = torch.cat(MASKS).sum(1, dtype=torch.float64)
    counts = targets if mean == "token" else (targets > 0).double()

    def summed(values: torch.Tensor, group: Any) -> torch.Tensor:
        """What the ranks of a group would add up to, from what this rank gives."""
        if group == "cp":
            assert values.equal(torch.cat([b.mask_BS for b in mine]).sum(1, dtype=torch.float64))
            return torch.cat([MASKS[n] for n in numbers]).sum(1, dtype=torch.float64)
        every = torch.zeros(4, dtype=torch.float64).index_add_(0, torch.cat(GROUPS), counts)
        rows = slice(4 * numbers[0], 4 * numbers[-1] + 4)
        ours = torch.cat(GROUPS)[rows], counts[rows]
        *of_groups, passes = values
        assert torch.stack(of_groups).equal(torch.zeros(4).double().index_add_(0, *ours))
        return torch.cat([every, 2 * passes[None]])

    monkeypatch.setattr(core_batch, "summed", summed)
    for numbers in ([0, 1, 2], [3, 4, 5]):
        for half in halves:
            mine = [batch(MASKS[n][:, half], GROUPS[n]) for n in numbers]
            got = mean_coefficients(mine, 4, mean, groups)
            assert all(a.equal(whole[n]) for a, n in zip(got, numbers, strict=True))


@pytest.mark.parametrize("wrong", [-1, 3])
def test_a_group_that_there_is_not_is_refused(wrong: int) -> None:
    with pytest.raises(ValueError, match=rf"group_B holds .*{wrong}.*, the groups are 0 to 2"):
        mean_coefficients([batch(MASKS[0], torch.tensor([0, 1, wrong, 2]))], 3, "sample", ALONE)


def test_ranks_with_unequal_numbers_of_micro_batches_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before they would wait for each other for ever."""
    groups: Any = SimpleNamespace(cp=Solo(), dp=Solo(2))
    more = torch.tensor([0, 0, 0, 0, 4.0]).double()  # of the other rank
    monkeypatch.setattr(
        core_batch, "summed", lambda values, group: values + (more if group is groups.dp else 0)
    )
    with pytest.raises(ValueError, match="6 micro-batches here, 10 on 2 data-parallel ranks"):
        mean_coefficients(BATCHES, 4, "sample", groups)


def test_no_micro_batches_have_no_coefficients() -> None:
    assert mean_coefficients([], 2, "sample", ALONE) == []


def test_a_gpt_model_is_called_with_all_of_a_batch() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, **inputs: Any) -> Any:
            return inputs

    held = BATCHES[0]
    inputs: Any = gpt_losses(Model(), held)
    assert inputs.pop("attention_mask") is None
    assert set(inputs) == {"input_ids", "labels", "position_ids"}
    assert inputs["input_ids"].equal(held.tokens_BS) and inputs["labels"].equal(held.labels_BS)
    assert inputs["position_ids"].equal(held.positions_BS)


def test_a_batch_reaches_a_gpu_from_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its strides: positions are often one row, expanded. Without a GPU, torch pins none:
    memory is copied as it lies, as pinning does."""

    def pinned(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype).copy_(tensor)

    monkeypatch.setattr(torch.Tensor, "pin_memory", pinned)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *rest, **options: tensor)
    ids_BS = torch.arange(12).view(3, 4)
    one = MicroBatch(ids_BS, ids_BS, ids_BS, torch.arange(4).expand(3, -1), torch.zeros(3))
    sent = one.inputs(torch.device("cuda"))["position_ids"]
    assert sent is not None and sent.tolist() == [[0, 1, 2, 3]] * 3
