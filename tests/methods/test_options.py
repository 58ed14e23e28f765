"""Options of the methods: what they are where nobody sets them, and what comes of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_scalebio.config.baseline import BaselineConfig
from megatron_scalebio.engine.loop import _refuse_skips
from megatron_scalebio.errors import UserError
from megatron_scalebio.methods import doge, doremi, fastmix, less, olmix, rho_loss, swarm


def config(train_iters: int = 100, **baseline: Any) -> Any:
    train = SimpleNamespace(
        train_iters=train_iters, global_batch_size=8, seed=1234, skip_limit=5, output="run"
    )
    return SimpleNamespace(train=train, baseline=BaselineConfig(**baseline))


def test_defaults_are_the_published_values() -> None:
    """LESS: 5 % kept after 4 epochs on 5 %, 8,192 numbers; RHO-LOSS: one in ten, while training."""
    options = BaselineConfig()
    assert (options.method, options.domain_lr) == ("scalebio", None)
    assert (options.reference_iters, options.proxies, options.proxy_iters) == (None, None, None)
    assert (options.select_fraction, options.less_warmup_fraction) == (0.05, 0.05)
    assert (options.less_checkpoints, options.less_dimensions) == (4, 8192)
    assert (options.rho_online, options.rho_batch_share) == (True, 0.1)
    # DoReMi's η and c; DoGE's 5e-4 / 0.05 over 10,000 steps; passes of a bilevel step
    assert (doremi.DOMAIN_LR, doremi.SMOOTHING) == (1.0, 1e-3)
    assert pytest.approx(5e-4 / 0.05 * 10_000) == doge.PUBLISHED_REACH
    # FastMix's rate of 0.01 at every 20th of 32 micro-batches of 1,001 steps
    assert pytest.approx(0.01 * 1001 * 32 / 20, rel=1e-2) == fastmix.PUBLISHED_REACH
    assert fastmix.BETAS == (0.9, 0.95)
    assert olmix.PUBLISHED_PULL == 0.1
    assert (rho_loss.REFERENCE_EPOCHS, swarm.PASSES_OF_A_BILEVEL_STEP) == (3, 3)


def test_a_finished_swarm_is_for_methods_that_take_one() -> None:
    assert BaselineConfig(method="regmix", swarm="folder").swarm == "folder"
    with pytest.raises(UserError, match=r"swarm: 'folder' is not for the method doge"):
        BaselineConfig(method="doge", swarm="folder")
    for count in ("proxies", "proxy_iters"):
        with pytest.raises(UserError, match=r"swarm: 'folder' is trained already"):
            BaselineConfig(method="olmix", swarm="folder", **{count: 30})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("train_iters", "options", "rate"),
    [(4, {}, 0.1), (160, {}, 0.1), (320, {}, 0.05), (320, {"domain_lr": 0.3}, 0.3)],
)
def test_fastmix_moves_its_logits_as_adam_does(
    train_iters: int, options: dict, rate: float
) -> None:
    """The first move that is applied goes by the rate, however small a gradient above 1e-8 is."""
    start_S = torch.tensor([0.5, 0.3, 0.2]).double().log()
    state: Any = SimpleNamespace(
        config=config(train_iters, **options), moments_2S=torch.zeros(2, 3).double(),
        moves=0, step=7, log_weight_S=start_S,
    )  # fmt: skip
    gradient_S = torch.tensor([1e-3, -1e-6, 1e-8]).double()
    moved_S, moments_2S = fastmix.FastmixState.moved(state, gradient_S)
    wanted_S = start_S - rate * torch.tensor([1.0, -1.0, 0.5]).double()
    torch.testing.assert_close(moved_S, wanted_S.log_softmax(0), rtol=0, atol=0.02 * rate)
    torch.testing.assert_close(
        moments_2S, torch.stack([0.1 * gradient_S, 0.05 * gradient_S.square()])
    )


def test_less_is_refused_with_experts() -> None:
    asked: Any = SimpleNamespace(
        lisa=SimpleNamespace(lisa_layers=None), model=SimpleNamespace(num_experts=4)
    )
    with pytest.raises(UserError, match=r"model\.num_experts: less needs"):
        less.find(asked, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["select_fraction", "less_warmup_fraction", "rho_batch_share"])
def test_shares_are_above_zero_and_at_most_one(name: str) -> None:
    assert getattr(BaselineConfig(**{name: 1.0}), name) == 1.0
    for value in (0.0, 1.01):
        with pytest.raises(UserError, match=rf"{name}: {value} is outside"):
            BaselineConfig(**{name: value})
    for count in ("reference_iters", "proxies", "proxy_iters", "domain_lr", "less_checkpoints",
                  "less_dimensions"):  # fmt: skip
        with pytest.raises(UserError, match=f"{count}: 0 must be above 0"):
            BaselineConfig(**{count: 0})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("train_iters", "options", "sources", "proxies", "steps"),
    [
        (100, {}, 4, 15, 20),
        (103, {}, 4, 15, 20),  # 309 steps, of 20
        (100, {"proxy_iters": 7}, 4, 42, 7),
        (100, {"proxies": 6}, 4, 6, 20),
        (100, {}, 20, 21, 20),  # one more than sources, whatever it costs
        (3, {}, 4, 9, 1),
    ],
)
def test_regmix_spends_as_many_steps_as_scalebio(
    train_iters: int, options: dict, sources: int, proxies: int, steps: int
) -> None:
    assert swarm.budget(config(train_iters, **options), sources) == (proxies, steps)


def test_less_warms_up_on_whole_batches() -> None:
    rows, steps = less.warmup_plan(config(less_warmup_fraction=0.3), 151)
    assert len(set(rows.tolist())) == 45 and rows.max() < 151, "of 45.3"
    assert steps == 6, "batches of 8"
    rows, steps = less.warmup_plan(config(less_warmup_fraction=0.001), 151)
    assert (len(rows), steps) == (1, 1)


@pytest.mark.parametrize(
    ("in_a_row", "train_iters", "ends"),
    [(4, 100, False), (5, 100, True), (2, 3, False), (3, 3, True)],
)
def test_a_training_that_applies_no_step_is_ended(
    in_a_row: int, train_iters: int, ends: bool
) -> None:
    state = SimpleNamespace(
        config=config(train_iters), step=7,
        training=SimpleNamespace(skipped_in_a_row=in_a_row),
    )  # fmt: skip
    record = {"skipped": "w: loss of source 'x' is nan"}
    if not ends:
        _refuse_skips(state, record)  # type: ignore[arg-type]
        return
    with pytest.raises(UserError, match=rf"step 7: {in_a_row} steps in a row .*source 'x' is nan"):
        _refuse_skips(state, record)  # type: ignore[arg-type]
