"""The parts of a flush by themselves: passes, the loss of one, their sums over ranks.

With toys in this process; the whole, on Megatron's models in ranks, is in tests/distributed.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_scalebio.core import flush as module
from megatron_scalebio.core.batch import MicroBatch
from megatron_scalebio.core.flush import (
    Pass,
    flush,
    forward_step,
    loss_func,
    passes_of,
)
from megatron_scalebio.core.scalebio import ScaleBiO
from megatron_scalebio.mixture.objective import Role

U, W, VALID = Role.TRAIN_U, Role.TRAIN_W, Role.VALID_W


def tensor(values: list) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def batch(groups: list[int], mask: list[list[int]], tokens: int = 0) -> MicroBatch:
    rows, columns = len(mask), len(mask[0])
    ids = torch.arange(rows * columns).view(rows, columns)
    mask_BS = torch.tensor(mask, dtype=torch.float32)
    return MicroBatch(ids, ids + 100, mask_BS, ids + 200, torch.tensor(groups), tokens)


class Group:
    """A process group, as its ranks are asked for."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = lambda: rank, lambda: size


def groups(**given: Group) -> Any:
    return SimpleNamespace(**{name: Group() for name in ("tp", "pp", "cp", "dp")} | given)


TRAIN = [batch([0, 2], [[1, 1], [1, 0]]), batch([1], [[1, 1, 1]])]
VALIDATION = [batch([1], [[1, 0, 1, 1]]), batch([0], [[1]])]


def passes(
    probs: list[float], shares: list[float], alpha: float, shared: bool, replays: bool = False
) -> list[Pass]:
    """Those of a step of ScaleBiO."""
    bio: Any = SimpleNamespace(
        options=SimpleNamespace(loss_mean="sample"), groups=groups(),
        model_config=SimpleNamespace(moe_enable_routing_replay=replays),
    )  # fmt: skip
    return ScaleBiO.passes(bio, TRAIN, VALIDATION, tensor(probs), tensor(shares), alpha, shared)


def test_passes_are_u_and_w_in_turn_then_validation_with_their_weights() -> None:
    probs, shares, alpha = [0.6, 0.3, 0.1], [0.8, 0.2], 4.0
    planned = passes(probs, shares, alpha, shared=False)
    assert [p.role for p in planned] == [U, W, U, W, VALID, VALID]
    first, second = TRAIN
    want = [first, first, second, second, *VALIDATION]
    assert all(p.batch is held for p, held in zip(planned, want, strict=True))
    # u descends L2(u), w (α L2(w) + L1(w)) / (1 + α).
    of_role = {
        U: probs,
        W: [p * alpha / (1 + alpha) for p in probs],
        VALID: [share / (1 + alpha) for share in shares],
    }
    for p in planned:
        mean_B = 1 / p.batch.mask_BS.sum(1).double()  # each group has one sequence
        torch.testing.assert_close(p.coefficient_B, mean_B, rtol=1e-12, atol=0)
        weight_B = tensor([of_role[p.role][group] for group in p.batch.group_B])
        torch.testing.assert_close(p.weight_B, weight_B * mean_B, rtol=1e-12, atol=0)


def test_w_goes_first_where_u_follows_its_routing() -> None:
    planned = passes([0.6, 0.3, 0.1], [1.0, 1.0], 4.0, shared=False, replays=True)
    assert [p.role for p in planned] == [W, U, W, U, VALID, VALID]


def test_where_u_is_w_its_passes_alone_are_made() -> None:
    planned = passes([0.6, 0.3, 0.1], [1.0, 1.0], 4.0, shared=True)
    assert [p.role for p in planned] == [U, U, VALID, VALID]
    assert [id(p.batch) for p in planned] == [id(b) for b in TRAIN + VALIDATION]
    assert planned[0].weight_B.tolist() == [0.6 / 2, 0.1]


def test_loss_of_a_pass_is_the_weighted_sum_of_its_targets() -> None:
    """Σ_b weight b · Σ_t mask · loss: by a loop, in double precision."""
    mask = [[1, 0, 1, 1], [0, 1, 0, 0], [1, 1, 1, 0]]
    groups, coefficients, weights = [2, 0, 2], [0.5, 0.25, 2.0], [0.7, 0.2, 0.1]
    loss_BS = torch.tensor([[1.5, 9.0, 2.0, 0.25], [7.0, 4.0, 8.0, 9.0], [3.0, 1.0, 2.5, 6.0]])
    loss_BS[0, 1] = math.nan  # padding may hold anything
    loss_BS[1, 3] = math.inf
    loss_BS.requires_grad_()
    this = Pass(W, batch(groups, mask), tensor(coefficients), tensor(weights))
    objective, tokens, record = loss_func(this, loss_BS)
    sums = [3.75, 4.0, 6.5]
    parts = [x * c for x, c in zip(sums, coefficients, strict=True)]
    want = sum(x * weight for x, weight in zip(sums, weights, strict=True))
    assert objective.dtype == torch.float32
    assert float(objective.detach()) == pytest.approx(want, rel=1e-6)
    assert int(tokens) == 0 and tokens.dtype == torch.int
    assert set(record) == {"role", "group_B", "part_B", "counts_B"} and record["role"] is W
    assert record["counts_B"].tolist() == [True, True, True]
    assert record["group_B"].tolist() == groups
    assert record["part_B"].tolist() == parts and record["part_B"].dtype == torch.float64
    assert not record["part_B"].requires_grad
    objective.backward()
    wanted = [[x * m for m in line] for x, line in zip(weights, mask, strict=True)]
    assert loss_BS.grad is not None
    torch.testing.assert_close(loss_BS.grad, torch.tensor(wanted))


def test_losses_are_summed_in_double_precision() -> None:
    """The hypergradient is a small difference of sums over thousands of tokens."""
    values = torch.linspace(0.1, 11.0, 4096)[None]
    this = Pass(U, batch([0], [[1] * 4096]), tensor([1.0]), tensor([1.0]))
    _, _, record = loss_func(this, values)
    assert float(record["part_B"]) == math.fsum(values[0].tolist())
    _, _, half = loss_func(this, values.bfloat16())
    assert float(half["part_B"]) == math.fsum(values.bfloat16()[0].tolist())


def test_a_forward_step_takes_the_next_pass_to_the_model_of_its_role() -> None:
    calls, seen = [], []

    def twin(*given: Any) -> torch.Tensor:
        calls.append(given)
        return given[1].labels_BS.float()

    @contextmanager
    def observe(part: str) -> Any:
        seen.append((part, len(calls)))
        yield
        seen.append((part, len(calls)))

    planned = [
        Pass(role, held, *[torch.ones(len(held.group_B)).double()] * 2, 0.5 * role, last=last)
        for role in (U, W, VALID) for held in TRAIN for last in (False, True)
    ]  # fmt: skip
    iterator = iter(planned)
    for this in planned:
        output, loss = forward_step(iterator, twin, observe)  # type: ignore[arg-type]
        assert calls[-1] == (this.role is U, this.batch, this.last, 0.5 * this.role)
        for got, want in zip(loss(output)[:2], loss_func(this, output)[:2], strict=True):
            assert torch.equal(got, want)
    plain = Pass(U, TRAIN[0], *[torch.ones(2).double()] * 2)
    forward_step(iter([plain]), twin)  # type: ignore[arg-type]
    assert calls.pop() == (True, TRAIN[0], False, 0.0)
    assert seen == [("forward", n // 2 + n % 2) for n in range(2 * len(planned))], "around each"


class ToyTwin:
    """Notes that its reduction is held back, and what the schedule finds in its configuration."""

    def __init__(self) -> None:
        self.held = 0
        self.config = SimpleNamespace(
            finalize_model_grads_func="theirs", no_sync_func="their own",
            grad_sync_func="another", param_sync_func=None,
        )  # fmt: skip

    def hold_reduction(self) -> None:
        self.held += 1


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "device", lambda: torch.device("cpu"))


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("chunks", [1, 2])
def test_a_flush_hands_all_passes_to_every_chunk(
    monkeypatch: pytest.MonkeyPatch, chunks: int
) -> None:
    given: dict[str, Any] = {}
    twins: list[Any] = [ToyTwin() for _ in range(chunks)]
    config = twins[0].config
    before = dict(vars(config))

    def schedule(**arguments: Any) -> str:
        given.update(arguments, found=dict(vars(config)), held=[twin.held for twin in twins])
        return "records"

    monkeypatch.setattr(module, "get_forward_backward_func", lambda: schedule)
    of_step = passes([1.0] * 3, [1.0] * 2, 1.0, shared=False)
    planned = [of_step[number] for number in (2, 0, 1, 3, 4, 5)]
    context = groups(cp=Group(size=4))
    said = flush(twins, planned, context, module.unobserved, forward_only=True)
    assert said == "records"  # type: ignore[comparison-overlap]
    iterators = given.pop("data_iterator")
    if chunks == 1:
        iterators = [iterators]
    assert len(iterators) == chunks
    for iterator in iterators:
        got = list(iterator)
        assert [(p.role, p.batch, p.weight_B.tolist(), p.coefficient_B.tolist()) for p in got] == [
            (p.role, p.batch, p.weight_B.tolist(), p.coefficient_B.tolist()) for p in planned
        ], "each chunk has its own"
        for p in got:  # sent to the device before a kernel is queued
            assert p.target_BS is not None and torch.equal(p.target_BS, p.batch.mask_BS > 0)
        # The last pass of u is its second, that of w the second on validation.
        assert [p.last for p in got] == [False, True, False, False, False, True]
    step = given.pop("forward_step_func")
    assert step.func is forward_step and step.keywords == {"observe": module.unobserved}
    assert given.pop("held") == [1] * chunks, "no gradient is reduced before its time"
    found = given.pop("found")
    assert found == {
        "finalize_model_grads_func": module.finalize_twin_grads, "no_sync_func": None,
        "grad_sync_func": None, "param_sync_func": None,
    }  # fmt: skip
    assert vars(config) == before, "the caller's own are put back"
    # Validation's four columns are the longest, a quarter of the sequence under CP.
    assert given == {
        "model": twins, "num_microbatches": 6, "seq_length": 16, "micro_batch_size": 1,
        "forward_only": True,
    }  # fmt: skip


@pytest.mark.usefixtures("here")
def test_the_callers_hooks_are_put_back_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def schedule(**arguments: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(module, "get_forward_backward_func", lambda: schedule)
    twin: Any = ToyTwin()
    with pytest.raises(RuntimeError, match="out of memory"):
        flush([twin], passes([1.0] * 3, [1.0] * 2, 1.0, shared=False), groups())
    assert twin.config.finalize_model_grads_func == "theirs"


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("stages", "variable"), [(1, False), (2, True), (2, False)])
def test_unequal_shapes_need_a_pipeline_that_can_tell(
    monkeypatch: pytest.MonkeyPatch, stages: int, variable: bool
) -> None:
    monkeypatch.setattr(module, "get_forward_backward_func", lambda: lambda **given: "records")
    twin: Any = ToyTwin()
    twin.config.variable_seq_lengths = variable
    planned = passes([1.0] * 3, [1.0] * 2, 1.0, shared=False)
    where = groups(pp=Group(0, stages))
    if stages == 2 and not variable:
        with pytest.raises(ValueError, match=r"shapes \[\(1, 1\), .*variable_seq_lengths"):
            flush([twin], planned, where)
    else:
        assert flush([twin], planned, where) == "records"  # type: ignore[comparison-overlap]
    first, other = planned[0], planned[2]
    if stages == 2 and not variable:
        with pytest.raises(ValueError, match=r"shapes \[\(1, 3\), \(2, 2\)\]"):
            flush([twin], [first, other], where)
    assert flush([twin], [first, first], where) == "records"  # type: ignore[comparison-overlap]


def test_what_losses_take_is_on_the_device_before_the_schedule_begins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "device", lambda: torch.device("meta"))
    monkeypatch.setattr(
        module, "get_forward_backward_func", lambda: lambda **given: list(given["data_iterator"])
    )
    twin: Any = ToyTwin()
    sent: Any = flush([twin], passes([1.0] * 3, [1.0] * 2, 1.0, shared=False), groups())
    assert len(sent) == 6
    for this in sent:
        tensors = (this.coefficient_B, this.weight_B, this.target_BS)
        assert [tensor.device.type for tensor in tensors] == ["meta"] * 3


def test_labels_count_where_the_device_was_told_that_they_do() -> None:
    told = torch.tensor([[False, True]])
    this = Pass(U, batch([0], [[1, 1]]), tensor([1.0]), tensor([1.0]), target_BS=told)
    assert float(loss_func(this, torch.tensor([[3.0, 5.0]]))[0]) == 5.0


def test_a_pass_counts_what_its_role_counts() -> None:
    planned = passes_of({U: 1.0, W: 0.25}, TRAIN, tensor([0.5, 0.25, 0.25]), "token", groups())
    assert [p.role for p in planned] == [U, W, U, W]
    assert planned[0].coefficient_B.tolist() == [0.5, 1.0] == planned[1].coefficient_B.tolist()
    assert planned[0].weight_B.tolist() == [0.25, 0.25]
    assert planned[1].weight_B.tolist() == [0.0625, 0.0625]


def test_losses_of_routers_are_means_over_training_micro_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of all data-parallel ranks; validation has none of them."""
    ones = [torch.ones(len(each.group_B)) for each in TRAIN]
    monkeypatch.setattr(module, "mean_coefficients", lambda *given: ones)
    scales, of_four = {U: 1.0, W: 0.25, VALID: 0.75}, groups(dp=Group(0, 4))
    planned = passes_of(scales, TRAIN, tensor([0.5, 0.25, 0.25]), "token", of_four)
    assert [each.router_scale for each in planned] == [1 / 8, 1 / 32, 0.0] * 2
