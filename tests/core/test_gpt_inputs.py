"""What a GPT model is called with beside ids: packed sequences, padding for routers, labels."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_scalebio.compat.gpt_inputs import labelled_losses
from megatron_scalebio.core import batch as core_batch
from megatron_scalebio.core.batch import MicroBatch, gpt_losses, mean_coefficients, sequence_sums

IDS_BS = torch.arange(12).view(1, 12)
MASK_BS = torch.tensor([[0, 1, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0.0]])
# Sequences of 3 and 4 tokens, and padding.
PACKED = MicroBatch(
    IDS_BS, IDS_BS + 100, MASK_BS, IDS_BS + 200, torch.tensor([0, 0]),
    lengths_B=torch.tensor([3, 4]),
)  # fmt: skip
PADDING_BS = torch.arange(8).view(2, 4) % 4 >= torch.tensor([[3], [2]])


class Model(torch.nn.Module):
    """Stands in for a GPTModel, and gives back what it is called with."""

    def __init__(self, experts: int | None = 4, **parts: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        split = parts.pop("sequence_parallel", False)
        self.config = SimpleNamespace(num_moe_experts=experts, sequence_parallel=split)
        ranks = SimpleNamespace(size=lambda: 2, rank=lambda: 1)
        self.pg_collection = SimpleNamespace(tp=ranks)
        self.pre_process, self.post_process = parts.get("first", True), parts.get("last", False)

    def forward(self, **inputs: Any) -> Any:
        return inputs


@pytest.fixture(autouse=True)
def without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_batch, "device", lambda: torch.device("cpu"))


def padded(mask_BS: torch.Tensor, padding_BS: torch.Tensor | None = None) -> MicroBatch:
    ids_BS = torch.arange(8).view(2, 4)
    groups = torch.zeros(2, dtype=torch.int64)
    return MicroBatch(ids_BS, ids_BS, mask_BS, ids_BS, groups, padding_BS=padding_BS)


def test_sums_are_of_each_sequence() -> None:
    values_BS = torch.tensor([[1, 2, 4, 8, 16, 32, 64, 128, 256, 0, 0, 0.0]])
    assert sequence_sums(values_BS, PACKED).equal(torch.tensor([7.0, 120.0]).double())
    assert sequence_sums(values_BS, object()).equal(torch.tensor([511.0]).double())
    # Sums of many floats keep what their own type would round off.
    ones_BS = torch.cat([torch.full((1, 7), 2.0**24), torch.ones(1, 5)], dim=1)
    for batch in (object(), MicroBatch(*[ones_BS] * 5, lengths_B=torch.tensor([12]))):
        assert float(sequence_sums(ones_BS, batch)) == 7 * 2**24 + 5


@pytest.mark.parametrize(
    ("mean", "groups", "want"),
    [("sample", [0, 0], [1 / 4, 1 / 2]), ("token", [0, 0], [1 / 3, 1 / 3]),
     ("sample", [1, 0], [1 / 2, 1]), ("token", [1, 0], [1 / 2, 1])],
)  # fmt: skip
def test_packed_sequences_have_coefficients_each(
    mean: str, groups: list[int], want: list[float]
) -> None:
    ranks = SimpleNamespace(size=lambda: 1)
    alone: Any = SimpleNamespace(cp=ranks, dp=ranks)
    batch = replace(PACKED, group_B=torch.tensor(groups))
    [coefficient_B] = mean_coefficients([batch], 2, mean, alone)
    assert coefficient_B.tolist() == want


def test_only_what_a_step_needs_has_to_be_told() -> None:
    """A batch of one's own has no padding; of the default, neither tokens nor places are told."""
    batch = padded(torch.ones(2, 4))
    own = SimpleNamespace(mask_BS=batch.mask_BS, inputs=lambda device: {"asked": device})
    assert gpt_losses(Model(), own) == {"asked": torch.device("cpu")}
    assert batch.tokens == 0 and batch.member_B.tolist() == []
    assert batch.member_B.dtype == torch.int64


def test_a_packed_row_says_where_its_sequences_end() -> None:
    params = gpt_losses(Model(), PACKED)["packed_seq_params"]
    for ends in (params.cu_seqlens_q, params.cu_seqlens_kv):
        # With the padding there are three.
        assert ends.tolist() == [0, 3, 7, 12] and ends.dtype == torch.int32
    assert params.qkv_format == "thd" and params.max_seqlen_q == params.max_seqlen_kv == 5
    assert "packed_seq_params" not in gpt_losses(Model(), padded(torch.ones(2, 4)))


def test_routers_are_told_of_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, copied = padded(torch.ones(2, 4), PADDING_BS), []
    monkeypatch.setattr(core_batch, "sent", lambda tensor, device: copied.append(tensor) or tensor)
    assert gpt_losses(Model(), batch)["padding_mask"].equal(PADDING_BS)
    assert any(each is PADDING_BS for each in copied), "without a wait for what is queued"
    assert "padding_mask" not in gpt_losses(Model(experts=None), batch)
    assert "padding_mask" not in gpt_losses(Model(), padded(torch.ones(2, 4)))


@pytest.mark.parametrize(
    ("split", "first", "part"),
    [(True, False, slice(2, 4)), (True, True, slice(0, 4)), (False, False, slice(0, 4))],
)
def test_later_stages_are_told_of_the_padding_of_their_part(
    split: bool, first: bool, part: slice
) -> None:
    model = Model(sequence_parallel=split, first=first)
    got = gpt_losses(model, padded(torch.ones(2, 4), PADDING_BS))["padding_mask"]
    assert got.equal(PADDING_BS[:, part])


def test_the_last_stage_makes_logits_where_labels_count() -> None:
    some_BS = torch.tensor([[0, 1, 0, 0], [0, 0, 0, 1.0]])
    inputs = gpt_losses(Model(last=True), padded(some_BS))
    assert inputs["output_processor"] is labelled_losses
    assert inputs["output_processor_context"].tolist() == [2, 7]  # of [S, B], flattened
    for model, mask_BS in ((Model(last=True), torch.ones(2, 4)), (Model(), some_BS)):
        assert not {"output_processor", "output_processor_context"} & set(
            gpt_losses(model, padded(mask_BS))
        )
