"""A step's time by hand: arithmetic, bubble and traffic."""

from __future__ import annotations

import pytest

from megatron_scalebio.plan.cost import step_cost
from megatron_scalebio.plan.layout import Layout
from tests.plan.test_numbers import GPU, config, stage


def test_time_of_a_step_by_hand() -> None:
    """Slowest stage's arithmetic and traffic, bubble, gradients, optimizers: `plan.cost`."""
    layout = Layout.of(config(parallel={"bf16": True}), 24, GPU)
    idle = {"TP": 0, "CP": 0, "EP": 0, "PP": 0}
    stages = [stage(0, flops_per_pass=5e12, sent_per_pass_bytes=idle), stage(1)]
    cost = step_cost(config(parallel={"bf16": True}), layout, stages, 0.5)
    passes = 14
    # The second stage: 4e12 at 50 TFLOP/s, 8 GB at 400 GB/s in a node, CP's 2 GB likewise.
    assert cost.compute_s == pytest.approx(passes * 0.08)
    assert cost.tensor_parallel_s == pytest.approx(passes * 0.02)
    assert cost.context_parallel_s == pytest.approx(passes * 0.005)
    assert cost.bubble_s == pytest.approx(0.08 + 0.02 + 0.005), "one more pass of two stages"
    # TP × CP × DP of 12 ranks are on two nodes.
    assert cost.data_parallel_s == pytest.approx(7e9 / 40e9)
    traffic = 4 * 300e6 + 2 * (50e6 + 100e6)
    assert cost.optimizer_s == pytest.approx(traffic / 2e12)
    assert cost.flops == pytest.approx(9e12 * passes * 12)  # both stages, 12 ranks of each
    assert cost.tokens == passes * 2 * 2 * 48
    assert (cost.bubble, cost.steps, cost.mfu) == (pytest.approx(1 / 15), 70, 0.5)
    step = passes * 0.105 + 0.105 + 0.175 + traffic / 2e12
    assert cost.step_s == pytest.approx(step) and cost.run_s == pytest.approx(70 * step)
    assert cost.tokens_per_s == pytest.approx(passes * 192 / step)
    fp32 = step_cost(config(), layout, stages, 0.5)
    # Five times the arithmetic makes the first stage the slowest.
    assert fp32.compute_s == pytest.approx(passes * 0.5) and fp32.tensor_parallel_s == 0


def test_links_between_nodes_are_slower() -> None:
    one = [stage(0)]
    for tp, cp, dp, seconds in (
        (8, 1, 1, (0.02, 0.005, 0.0175)),
        (8, 2, 1, (0.02, 0.05, 0.175)),
        (4, 2, 1, (0.02, 0.005, 0.0175)),
        (4, 2, 2, (0.02, 0.005, 0.175)),
        (16, 1, 1, (0.2, 0.05, 0.175)),
    ):  # fmt: skip
        layout = Layout(tp, 1, 1, dp, 4, 2, GPU, cp)
        cost = step_cost(config(), layout, one, 1.0)
        found = (
            cost.tensor_parallel_s / 10, cost.context_parallel_s / 10, cost.data_parallel_s,
        )  # fmt: skip
        assert found == pytest.approx(seconds)
        assert cost.bubble_s == 0


@pytest.mark.parametrize(
    ("ep", "expert_tp", "seconds"), [(4, 2, 0.005), (8, 2, 0.05), (4, 4, 0.05), (8, None, 0.05)]
)
def test_tokens_travel_as_far_as_their_experts_are_dealt(
    ep: int, expert_tp: int | None, seconds: float
) -> None:
    """2 GB a pass to ranks of one node of eight, or of several."""
    experts = {"num_experts": 8, "moe_router_topk": 2, "moe_ffn_hidden_size": 24}
    of_run = config(model=experts)  # TP 2
    of_run.parallel.expert_tensor_parallel_size = expert_tp
    layout = Layout(2, 1, 1, 16, 4, 2, GPU, ep=ep)
    sent = {"TP": 0, "CP": 0, "EP": 2_000_000_000, "PP": 0}
    cost = step_cost(of_run, layout, [stage(0, sent_per_pass_bytes=sent)], 1.0)
    assert cost.expert_parallel_s / layout.passes == pytest.approx(seconds)
