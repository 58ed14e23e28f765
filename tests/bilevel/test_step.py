"""The parts of a step by themselves: passes, the loss of one, their sums over ranks, clipping.

With toys in this process; the whole, on Megatron's models in ranks, is in tests/distributed.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_scalebio import runtime
from megatron_scalebio.bilevel import step
from megatron_scalebio.bilevel.objective import Role
from megatron_scalebio.bilevel.step import (
    Pass,
    flush,
    forward_step,
    loss_func,
    plan_passes,
    prepare_gradients,
    reduce_losses,
)
from megatron_scalebio.data.batch import MicroBatch
from megatron_scalebio.data.blend import Picks
from megatron_scalebio.progress import HERE

U, W, VALID = Role.TRAIN_U, Role.TRAIN_W, Role.VALID_W


def tensor(values: list) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def batch(
    groups: list[int], coefficients: list[float], mask: list[list[int]], tokens: int = 0
) -> MicroBatch:
    rows, columns = len(mask), len(mask[0])
    ids = torch.arange(rows * columns).view(rows, columns)
    return MicroBatch(
        ids, ids + 100, torch.tensor(mask, dtype=torch.float32), ids + 200, torch.tensor(groups),
        torch.arange(rows), tensor(coefficients), tokens,
    )  # fmt: skip


TRAIN = [batch([0, 2], [0.5, 0.25], [[1, 1], [1, 0]]), batch([1], [2.0], [[1, 1, 1]])]
VALIDATION = [batch([1], [0.125], [[1, 0, 1, 1]]), batch([0], [3.0], [[1]])]


def test_passes_are_u_and_w_in_turn_then_validation_with_their_weights() -> None:
    probs, shares, alpha = [0.6, 0.3, 0.1], [0.8, 0.2], 4.0
    passes = plan_passes(TRAIN, VALIDATION, tensor(probs), tensor(shares), alpha)
    assert [p.role for p in passes] == [U, W, U, W, VALID, VALID]
    first, second = TRAIN
    want = [first, first, second, second, *VALIDATION]
    assert all(p.batch is held for p, held in zip(passes, want, strict=True))
    # u descends L2(u), w (α L2(w) + L1(w)) / (1 + α).
    of_role = {
        U: probs,
        W: [p * alpha / (1 + alpha) for p in probs],
        VALID: [share / (1 + alpha) for share in shares],
    }
    for p in passes:
        assert p.weight_G.tolist() == pytest.approx(of_role[p.role], rel=1e-12)


def test_where_u_is_w_its_passes_alone_are_made() -> None:
    passes = plan_passes(TRAIN, VALIDATION, tensor([0.6, 0.3, 0.1]), tensor([1.0, 1.0]), 4.0, True)
    assert [p.role for p in passes] == [U, U, VALID, VALID]
    assert [id(p.batch) for p in passes] == [id(b) for b in TRAIN + VALIDATION]
    assert passes[0].weight_G.tolist() == [0.6, 0.3, 0.1]


def test_loss_of_a_pass_is_the_weighted_sum_of_its_targets() -> None:
    """Σ_b weight(group b) · coefficient b · Σ_t mask · loss: by a loop, in double precision."""
    mask = [[1, 0, 1, 1], [0, 1, 0, 0], [1, 1, 1, 0]]
    groups, coefficients, weights = [2, 0, 2], [0.5, 0.25, 2.0], [0.7, 0.2, 0.1]
    loss_BS = torch.tensor([[1.5, 9.0, 2.0, 0.25], [7.0, 4.0, 8.0, 9.0], [3.0, 1.0, 2.5, 6.0]])
    loss_BS[0, 1] = math.nan  # padding may hold anything
    loss_BS[1, 3] = math.inf
    loss_BS.requires_grad_()
    this = Pass(W, batch(groups, coefficients, mask), tensor(weights))
    objective, tokens, record = loss_func(this, loss_BS)
    sums = [3.75, 4.0, 6.5]
    parts = [x * c for x, c in zip(sums, coefficients, strict=True)]
    want = sum(x * weights[g] for x, g in zip(parts, groups, strict=True))
    assert objective.dtype == torch.float32
    assert float(objective.detach()) == pytest.approx(want, rel=1e-6)
    assert int(tokens) == 0 and tokens.dtype == torch.int
    assert set(record) == {"role", "group_B", "part_B"} and record["role"] is W
    assert record["group_B"].tolist() == groups
    assert record["part_B"].tolist() == parts and record["part_B"].dtype == torch.float64
    assert not record["part_B"].requires_grad
    objective.backward()
    row = [c * weights[g] for c, g in zip(coefficients, groups, strict=True)]
    wanted = [[x * m for m in line] for x, line in zip(row, mask, strict=True)]
    assert loss_BS.grad is not None
    torch.testing.assert_close(loss_BS.grad, torch.tensor(wanted))


def test_losses_are_summed_in_double_precision() -> None:
    """The hypergradient is a small difference of sums over thousands of tokens."""
    values = torch.linspace(0.1, 11.0, 4096)[None]
    this = Pass(U, batch([0], [1.0], [[1] * 4096]), tensor([1.0]))
    _, _, record = loss_func(this, values)
    assert float(record["part_B"]) == math.fsum(values[0].tolist())
    _, _, half = loss_func(this, values.bfloat16())
    assert float(half["part_B"]) == math.fsum(values.bfloat16()[0].tolist())


def test_a_forward_step_takes_the_next_pass_to_the_model_of_its_role(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runtime, "device", lambda: torch.device("cpu"))
    calls = []

    def twin(on_u: bool, **inputs: Any) -> torch.Tensor:
        calls.append((on_u, inputs))
        return inputs["labels"].float()

    weight_G = tensor([1.0, 2.0, 3.0])
    planned = [Pass(role, held, weight_G) for role in (U, W, VALID) for held in TRAIN]
    passes, marks = iter(planned), HERE.marks
    for number, this in enumerate(planned, start=1):
        output, loss = forward_step(passes, twin)  # type: ignore[arg-type]
        on_u, inputs = calls[-1]
        assert on_u == (this.role is U)
        assert inputs["attention_mask"] is None
        assert inputs["input_ids"].equal(this.batch.tokens_BS)
        assert inputs["labels"].equal(this.batch.labels_BS)
        assert inputs["position_ids"].equal(this.batch.positions_BS)
        for got, want in zip(loss(output)[:2], loss_func(this, output)[:2], strict=True):
            assert torch.equal(got, want)
        assert HERE.marks == marks + number, "the watchdog sees every pass"


@pytest.mark.parametrize("chunks", [1, 2])
def test_a_flush_hands_all_passes_to_every_chunk(
    monkeypatch: pytest.MonkeyPatch, chunks: int
) -> None:
    given: dict[str, Any] = {}

    def schedule(**arguments: Any) -> str:
        given.update(arguments)
        return "records"

    monkeypatch.setattr(step, "get_forward_backward_func", lambda: schedule)
    monkeypatch.setattr(runtime, "cp_size", lambda: 4)
    twins: list[Any] = [object()] * chunks
    passes = plan_passes(TRAIN, VALIDATION, tensor([1.0] * 3), tensor([1.0] * 2), 1.0)
    assert flush(twins, passes, 7, forward_only=True) == "records"
    iterators = given.pop("data_iterator")
    if chunks == 1:
        iterators = [iterators]
    assert len(iterators) == chunks
    for iterator in iterators:
        assert [id(p) for p in iterator] == [id(p) for p in passes], "each chunk has its own"
    # Validation's four columns are the longest, a quarter of the sequence under CP.
    assert given == {
        "forward_step_func": forward_step, "model": twins, "num_microbatches": 6,
        "seq_length": 16, "micro_batch_size": 7, "forward_only": True,
    }  # fmt: skip


class OtherRank:
    """Stands for all_reduce with one more rank, whose sums are given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, theirs: list[float], reports: bool) -> None:
        self.theirs, self.ours = theirs, None
        monkeypatch.setattr(runtime, "device", lambda: torch.device("cpu"))
        monkeypatch.setattr(runtime, "reports_losses", lambda: reports)
        monkeypatch.setattr(step.dist, "all_reduce", self.all_reduce)

    def all_reduce(self, flat: torch.Tensor) -> None:
        assert self.ours is None, "one reduction"
        self.ours = flat.tolist()
        flat += tensor(self.theirs)


def record(role: Role, groups: list[int], parts: list[float]) -> dict[str, Any]:
    return {"role": role, "group_B": torch.tensor(groups), "part_B": tensor(parts)}


RECORDS = [
    record(U, [0, 2, 0], [1.0, 2.0, 4.0]), record(W, [0, 2], [8.0, 16.0]),
    record(U, [1], [32.0]), record(W, [2, 2], [64.0, 128.0]),
    record(VALID, [1, 0], [256.0, 512.0]), record(VALID, [1], [1024.0]),
]  # fmt: skip


def picks(counts_S: list[int], inclusion_S: list[float] | None = None) -> Picks:
    """A global batch of so many examples of each source."""
    group_B = np.repeat(np.arange(len(counts_S)), counts_S)
    return Picks(group_B, group_B, np.array(inclusion_S or [1.0] * len(counts_S)))


PASSES = [Pass(U, batch([0], [1.0], [[1]], tokens=n), tensor([1.0])) for n in (5, 70, 2**24)]


def test_losses_are_the_sums_of_all_ranks_without_the_inclusion(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ranks = OtherRank(monkeypatch, [0.5, 0.25, 0.0, 0.125, 0.0, 2.0, 3.0, 5.0, 10.0], True)
    train, valid = picks([3, 0, 1], [1.0, 0.5, 0.25]), picks([1, 2], [0.5, 1.0])
    losses = reduce_losses(RECORDS, PASSES, train, valid)
    assert ranks.ours == [5.0, 32.0, 2.0, 8.0, 0.0, 208.0, 512.0, 1280.0, 75.0 + 2**24]
    assert losses.u_S.tolist() == pytest.approx([5.5, math.nan, 0.5], nan_ok=True)
    assert losses.w_S.tolist() == pytest.approx([8.125, math.nan, 52.5], nan_ok=True)
    assert losses.validation_V.tolist() == [257.5, 1285.0]
    assert losses.inclusion_S.tolist() == [1.0, 0.5, 0.25]
    assert losses.inclusion_V.tolist() == [0.5, 1.0]
    assert losses.tokens == 85 + 2**24 and isinstance(losses.tokens, int)
    assert losses.culprit == ""


def test_a_source_of_one_example_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    OtherRank(monkeypatch, [0.0] * 9, True)
    losses = reduce_losses(RECORDS, PASSES, picks([2, 1, 1]), picks([1, 0]))
    assert losses.u_S.tolist() == [5.0, 32.0, 2.0]
    assert losses.validation_V.tolist() == pytest.approx([512.0, math.nan], nan_ok=True)


def test_ranks_that_hold_no_losses_add_none(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = [float(n) for n in range(1, 10)]
    ranks = OtherRank(monkeypatch, theirs, False)
    losses = reduce_losses([], PASSES, picks([1, 1, 1]), picks([1, 1]))
    assert ranks.ours == [0.0] * 9
    assert losses.u_S.tolist() == [1.0, 2.0, 3.0] and losses.w_S.tolist() == [4.0, 5.0, 6.0]
    assert losses.validation_V.tolist() == [7.0, 8.0] and losses.tokens == 9


@pytest.mark.parametrize(
    ("place", "value", "culprit"),
    [
        (1, math.nan, "u: loss of source 1 is nan"),
        (5, math.inf, "w: loss of source 2 is inf"),
        (6, -math.inf, "w: loss of validation set 0 is -inf"),
    ],
)
def test_what_is_not_finite_is_named(
    monkeypatch: pytest.MonkeyPatch, place: int, value: float, culprit: str
) -> None:
    theirs = [1.0] * 9
    theirs[place] = value
    if place == 1:
        theirs[2] = theirs[4] = math.nan  # the first is named
    OtherRank(monkeypatch, theirs, True)
    # Source 1 has no example, by what this rank knows: a bad sum is still told.
    losses = reduce_losses(RECORDS, PASSES, picks([1, 0, 1]), picks([1, 1]))
    assert losses.culprit == culprit


class ToyOptimizer:
    """Megatron's chain of optimizers: two with parameters, one without any, one a stub."""

    def __init__(self, norm: float) -> None:
        self.norm, self.prepared = norm, False
        first, last = self.clipped = [[torch.nn.Parameter(torch.zeros(2))] for _ in range(2)]
        self.chained_optimizers = [
            SimpleNamespace(is_stub_optimizer=stub, get_parameters=lambda held=held: held)
            for stub, held in ((False, first), (False, []), (True, None), (False, last))
        ]

    def prepare_grads(self) -> None:
        self.prepared = True

    def get_grad_norm(self) -> torch.Tensor:
        assert self.prepared
        return torch.tensor(self.norm)


@pytest.mark.parametrize(
    ("norm", "most", "clips"),
    [(8.0, 2.0, True), (8.0, 0.25, True), (8.0, 0.0, False), (math.inf, 2.0, False)],
)
def test_gradients_are_clipped_by_the_norm_of_all(
    monkeypatch: pytest.MonkeyPatch, norm: float, most: float, clips: bool
) -> None:
    calls: list[tuple] = []
    monkeypatch.setattr(step, "clip_grad_by_total_norm_fp32", lambda *given: calls.append(given))
    optimizer: Any = ToyOptimizer(norm)
    got = prepare_gradients(optimizer, most)
    assert got == norm and isinstance(got, float)
    assert optimizer.prepared
    assert calls == ([(held, most, norm) for held in optimizer.clipped] if clips else [])
