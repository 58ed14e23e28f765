"""Steps of ScaleBiO against the same in float64, by autograd; and steps that are not applied."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import pytest
import torch

from megatron_scalebio.mixture.goals import Goals
from megatron_scalebio.mixture.mixture import Mixture
from tests.core.regression import (
    ADAM,
    BIAS_RATE,
    CLASSES,
    SETS,
    Rows,
    alone,
    batches,
    bilevel,
    rows,
    unwrapped,
    weights_of,
)
from tests.distributed.harness import run_distributed

pytestmark = pytest.mark.distributed
ALPHA, INTERVAL, GROWTH = 3.0, 3, 0.25
INITIAL, SHARES = [2.0, 1.0, 1.0], [0.6, 0.2, 0.0]
LATE = 44 * INTERVAL  # four resets after u's memory began to grow: it is 1 + 4 · 0.25


def means(weights: list[torch.Tensor], given: list[Rows], groups: int) -> torch.Tensor:
    """Mean loss of each group, NaN of those that are not there."""
    x, y, group = (torch.cat([getattr(b, k) for b in given]) for k in ("x_BF", "y_B", "group_B"))
    logits = x.double() @ sum(weights).T  # type: ignore[union-attr]
    loss = torch.nn.functional.cross_entropy(logits, y, reduction="none")
    return torch.stack([loss[group == number].mean() for number in range(groups)])


def whole(weights: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
    """Σ weight · loss of the groups that are there."""
    there = ~losses.isnan()
    return (weights[there] * losses[there]).sum()


class Naive:
    """λ and q step as the core's own classes do, which have tests of their own."""

    def __init__(self, start: list[torch.Tensor]) -> None:
        self.at = 0
        self.weights = {
            name: [each.double().clone().requires_grad_() for each in start] for name in "wu"
        }
        options = {"betas": (0.8, 0.9), "eps": ADAM["adam_eps"], "lr": 0.0}
        self.adam = {
            name: torch.optim.AdamW(held, weight_decay=ADAM["weight_decay"], **options)
            for name, held in self.weights.items()
        }
        self.mixture, self.goals = Mixture(INITIAL, "eg"), Goals(SHARES)
        self.bias = torch.zeros(CLASSES)

    def reset(self) -> float:
        """u's memory."""
        memory = 1.0 + GROWTH * max(0.0, self.at / INTERVAL - 40)
        if self.at and self.at % INTERVAL == 0:
            for p_w, p_u in zip(self.weights["w"], self.weights["u"], strict=True):
                p_u.data.lerp_(p_w.data, 1 / memory)
                for key, value in self.adam["u"].state[p_u].items():
                    value.lerp_(self.adam["w"].state[p_w][key], 1 / memory)
        return memory

    def step(self, train: list[Rows], validation: list[Rows], **given: Any) -> dict[str, Any]:
        """What a report should say."""
        memory = self.reset()
        lr_w, lr_lambda = given["lr"], given.get("lr_lambda", 0.1)
        lr_u, alpha = given.get("lr_u", lr_w), given.get("alpha", ALPHA * memory**0.5)
        p, q = self.mixture.probs_S, self.goals.shares_V
        of_p, of_q = (
            torch.tensor(given.get(name, [1.0] * 3)).double()
            for name in ("inclusion", "validation_inclusion")
        )
        w, u = (means(self.weights[name], train, 3) for name in "wu")
        v = means(self.weights["w"], validation, 3)
        objective = {
            "u": whole(p / of_p, u),
            "w": (alpha * whole(p / of_p, w) + whole(q / of_q, v)) / (1 + alpha),
        }
        norms = {}
        for name, lr in (("w", lr_w), ("u", lr_u)):
            self.adam[name].zero_grad()
            objective[name].backward()
            norms[name] = math.hypot(*(float(p.grad.norm()) for p in self.weights[name]))
            self.adam[name].param_groups[0]["lr"] = lr
            self.adam[name].step()
        u, w, v = u.detach(), w.detach(), v.detach()
        excess = w - u
        there = ~excess.isnan()
        centred = torch.where(there, excess - whole(p, excess) / p[there].sum(), 0.0)
        norm_lambda = self.mixture.step(alpha * centred / of_p, lr_lambda, memory)
        self.goals.step(v)
        load = torch.cat([batch.y_B for batch in train]).bincount(minlength=CLASSES).float()
        self.bias += BIAS_RATE * (load.mean() - load).sign()
        self.at += 1
        # Where some are absent the others stand for them.
        of_train, of_valid = whole(p / of_p, torch.where(there, 1.0, math.nan)), whole(q / of_q, v)
        loss_w, loss_u = whole(p / of_p, w) / of_train, whole(p / of_p, u) / of_train
        loss_v = of_valid / whole(q / of_q, torch.where(v.isnan(), v, 1.0))
        tokens = 7 * sum(len(b.y_B) for b in train) * (1 if torch.equal(u, w) else 2)
        tokens += 7 * sum(len(b.y_B) for b in validation)
        return {
            "step": self.at, "weights_S": p, "shares_V": q, "u_S": u, "w_S": w, "validation_V": v,
            "tokens": tokens, "culprit": "", "train_loss_w": loss_w, "train_loss_u": loss_u,
            "validation_loss": loss_v, "grad_norms": norms, "grad_norm_lambda": norm_lambda,
            "alpha": alpha, "lr_w": lr_w, "lr_u": lr_u, "lr_lambda": lr_lambda, "skipped": None,
        }  # fmt: skip


def told(report: Any) -> dict[str, Any]:
    fields = {key: getattr(report, key) for key in asdict(report)}
    losses = fields.pop("losses")
    return {**fields, **{key: getattr(losses, key) for key in asdict(losses) if key != "parts"}}


def agree(got: Any, want: Any, at: object) -> None:
    close: dict[str, Any] = {"rtol": 1e-4, "atol": 2e-6, "equal_nan": True}
    if isinstance(want, dict):
        assert got.keys() == want.keys(), at
        for key in want:
            agree(got[key], want[key], (at, key))
    elif isinstance(want, torch.Tensor | float):
        got, want = (torch.as_tensor(x).double() for x in (got, want))
        torch.testing.assert_close(got, want, **close, msg=lambda m: f"{at}: {m}")
    else:
        assert got == want, (at, got, want)


STEPS: dict[int, dict[str, Any]] = {
    0: {"lr": 0.05},  # u is w, and so it is in steps 3 and 6
    1: {"lr": 0.04, "lr_u": 0.02, "lr_lambda": 0.3, "alpha": 1.0,
        "inclusion": [1.0, 0.5, 0.75], "validation_inclusion": [0.9, 1.0, 0.5]},
    2: {"lr": 0.0, "lr_lambda": 0.0},
    3: {"lr": 0.03, "lr_u": 0.0},
    4: {"lr": 0.03, "inclusion": [0.8, 0.4, 0.6]},
    5: {"lr": 0.02},
    6: {"lr": 0.02, "alpha": 1.5},
    7: {"lr": 0.02},
    LATE: {"lr": 0.02},
    LATE + 1: {"lr": 0.02},
}  # fmt: skip


def step_by_step() -> None:
    entered: list[str] = []

    class Noting:
        def __init__(self, part: str) -> None:
            entered.append(part)

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    bio = bilevel(
        {"alpha": ALPHA, "memory_growth": GROWTH}, initial_weights=INITIAL,
        validation=dict(zip(SETS, SHARES, strict=True)), observe=Noting,
    )  # fmt: skip
    assert bio.goals.shares_V.tolist() == pytest.approx([0.75, 0.25, 0.0])
    naive = Naive(weights_of(bio, "w"))
    moved: list[int] = []
    kept = bio.common_state()["goals"]
    for number, given in STEPS.items():
        if number == LATE:
            bio.steps = naive.at = LATE
        train, validation = batches(number)
        if number in (1, 4):  # a source that is not in the batch
            train = [rows(50 + number, [0, 1]), rows(60 + number, [1, 1, 0])]
        if number:
            bio.period.twins[0].weights_have_moved = lambda: moved.append(bio.steps)
        entered.clear()
        want = naive.step(train, validation, **given)
        report = bio.step(train, validation, **given)
        agree(told(report), want, number)
        assert bio.u_is_w == (number in (0, 3, 6))
        passes = (1 if bio.u_is_w else 2) * len(train) + len(validation)
        assert entered == ["period", "flush", *["forward"] * passes, "update"]
        for name, weights in naive.weights.items():
            for got, held in zip(weights_of(bio, name), weights, strict=True):
                agree(got, held.detach(), (number, name))
            agree(unwrapped(bio, name).router.expert_bias, naive.bias, (number, name))
        agree(torch.as_tensor(bio.weights), naive.mixture.probs_S, number)
        agree(bio.goals.sums_2V, naive.goals.sums_2V, number)
        distance, norms = abs(want["train_loss_w"] - want["train_loss_u"]), want["grad_norms"]
        for name, value in {
            "w: training loss": want["train_loss_w"], "u: training loss": want["train_loss_u"],
            "w: validation loss": want["validation_loss"],
            "w and u: distance of their training losses": distance,
            "w: gradient norm": norms["w"], "u: gradient norm": norms["u"],
        }.items():  # fmt: skip
            agree(bio.spikes.applied[name][-1], float(value), (number, name))
    # Once by each step but the first, and by each reset but that of the first.
    assert moved == [1, 2, 3, 3, 4, 5, 6, 6, 7, LATE, LATE, LATE + 1]
    assert not kept.any(), "a state that was taken stays as it is"

    asked: list[int] = []
    bio.flush_takes = asked.append  # it takes none, so that w's passes are made, too
    bio.enter_period = lambda: bio.period
    bio.u_is_w = True
    assert bio.step(*batches(0), lr=0.1).losses.tokens == 7 * (2 * 7 + 9)
    assert asked == [2 + 3]


def as_it_was_made() -> None:
    from megatron_scalebio.mixture.constraints import Constraints
    from megatron_scalebio.mixture.levels import Levels

    bounds, levels, goals = Constraints([0.0] * 3, [0.9] * 3), Levels([[0, 0, 1]]), Goals([1.0])
    given = {"goals": goals, "constraints": bounds, "levels": levels, "validation": None}
    other = bilevel({"mixture_optimizer": "adamw"}, **given)
    assert other.goals is goals
    assert other.mixture.constraints is bounds and other.mixture.levels is levels
    plain = bilevel(validation=None)
    assert plain.goals.shares_V.tolist() == [1.0]
    assert plain.weights.tolist() == pytest.approx([1 / 3] * 3)
    for each, rate in ((other, 0.01), (plain, 0.1)):
        assert each.step(batches(0)[0], [rows(2, [0, 0])], lr=0.1).lr_lambda == rate
    never = bilevel({"resync_interval": None})
    for step in range(2):
        never.step(*batches(step), lr=0.1)
        assert not never.u_is_w


def refused() -> None:
    bio = bilevel({"resync_interval": 50})
    for number in range(2):
        bio.step(*batches(number), lr=0.1)
    train, validation = batches(2)
    broken = [Rows(train[0].x_BF * math.nan, *list(vars(train[0]).values())[1:]), train[1]]
    flush, agreed, calm = bio.flush, bio._agreed, bio.spikes.state_dict()

    def spoiling(*given: Any) -> Any:
        losses = flush(*given)
        bio.period.ddp["u"][0].buffers[0].grad_data[3] = math.inf
        return losses

    def usual(name: str, value: float) -> dict:
        return {"applied": {name: [value] * 40}, "last": {name: [value] * 8}}

    def refuse(sound: bool, learned: list[torch.Tensor], learn: Any) -> bool:
        places = [each.data_ptr() for each in learned]  # of what all ranks take from rank 0
        assert places == [bio.mixture.logits_S.data_ptr(), bio.goals.sums_2V.data_ptr()]
        return False

    cases: list[tuple[str, dict]] = [
        ("u: loss of source 0 is nan", {"train": broken}),
        ("u: gradient norm is inf", {"flush": spoiling}),
        ("w: validation loss is", {"spikes": usual("w: validation loss", 1e-3)}),
        ("u: gradient norm is", {"spikes": usual("u: gradient norm", 1e-4)}),
        ("rank 0 refused the step", {"agreed": refuse}),
    ]
    for number, (said, given) in enumerate(cases):
        bio.flush, bio._agreed = given.get("flush", flush), given.get("agreed", agreed)
        bio.spikes.load_state_dict(given.get("spikes", calm))
        before = [each.clone() for name in "wu" for each in weights_of(bio, name)]
        biases, p = unwrapped(bio, "w").router.expert_bias.clone(), bio.weights.copy()
        report = bio.step(given.get("train", train), validation, lr=0.1)
        assert report.skipped and report.skipped.startswith(said), (said, report.skipped)
        after = [each for name in "wu" for each in weights_of(bio, name)]
        assert all(map(torch.equal, before, after)), said
        assert torch.equal(unwrapped(bio, "w").router.expert_bias, biases)
        assert bio.weights.tolist() == p.tolist() and math.isnan(report.grad_norm_lambda)
        assert (report.step, bio.skipped_in_a_row) == (3 + number, 1 + number)
    bio.flush, bio._agreed = flush, agreed
    bio.spikes.load_state_dict(calm)
    before = weights_of(bio, "w")[0].clone()
    train, validation = batches(3)  # of other classes than those that were refused
    loads = torch.cat([batch.y_B for batch in train]).bincount(minlength=CLASSES).float()
    biases = unwrapped(bio, "w").router.expert_bias.clone()
    assert bio.step(train, validation, lr=0.1).skipped is None
    assert bio.skipped_in_a_row == 0 and not torch.equal(before, weights_of(bio, "w")[0])
    # By the load of this step: those that were refused count no more.
    wanted = biases + BIAS_RATE * (loads.mean() - loads).sign()
    torch.testing.assert_close(unwrapped(bio, "w").router.expert_bias, wanted)


def on_rank() -> None:
    alone()
    step_by_step()
    as_it_was_made()
    refused()


def test_steps_are_those_of_the_formulas_and_what_is_refused_moves_nothing() -> None:
    run_distributed(on_rank, 1)
