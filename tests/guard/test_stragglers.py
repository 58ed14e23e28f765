"""Which rank is slowest, against whom, and when it is worth a line."""

from __future__ import annotations

import socket
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_scalebio.guard import stragglers
from megatron_scalebio.guard.stragglers import Slowest, Stragglers, slowest
from tests.distributed.harness import next_layout, run_distributed

HOSTS = ["n0", "n0", "n1", "n1"]


def test_peers_are_the_ranks_of_a_stage() -> None:
    """The second stage does twice the work; rank 1 is the one that is late."""
    times_RP = [[0.1, 1.0], [0.1, 1.4], [0.1, 2.0], [0.1, 2.1]]
    found = slowest(times_RP, HOSTS, [0, 0, 1, 1])
    assert found is not None and (found.rank, found.host, found.part) == (1, "n0", "forward")
    assert found.ratio == pytest.approx(1.5 / 1.1)
    assert (found.seconds, found.peers_s) == (1.4, 1.0)


def test_what_a_gpu_measures_is_in_milliseconds() -> None:
    timer, event = stragglers.ForwardTimer(), SimpleNamespace(elapsed_time=lambda end: end)
    timer._seconds, timer._events = 0.5, [(event, 250.0), (event, 1500.0)]  # type: ignore[list-item]
    assert timer.take() == pytest.approx(2.25)
    assert timer.take() == 0.0


def test_a_rank_alone_on_its_stage_has_no_peers() -> None:
    """The last stage has the output layer to do besides: that is no fault of its rank."""
    assert slowest([[0.1, 1.0], [0.0, 9.0]], HOSTS, [0, 1]) is None
    assert slowest([[0.1, 1.0]], HOSTS, [0]) is None
    found = slowest([[0.1, 1.0], [0.1, 1.2], [0.0, 9.0]], HOSTS, [0, 0, 1])
    assert found is not None and found.rank == 1


def test_a_rank_is_compared_with_the_median_of_the_others() -> None:
    found = slowest([[0.0, 1.0], [0.0, 2.0], [0.0, 9.0], [24.0, 6.0]], HOSTS, [3] * 4)
    assert found == Slowest(3, "n1", 15.0, "data", 24.0, 0.0)
    assert str(found) == (
        "rank 3 (n1) takes 15.0 times as long as its peers: data 2.4e+04 ms a step against 0 ms"
    )


def test_equal_ranks_are_one_times_as_slow() -> None:
    found = slowest([[0.0, 0.0], [0.0, 0.0]], HOSTS, [0, 0])
    assert found is not None and found.ratio == 1.0


def lines() -> Stragglers:
    watch = Stragglers.__new__(Stragglers)
    watch._suspect = None
    return watch


def late(rank: int = 3, ratio: float = 2.0, seconds: float = 0.4) -> Slowest:
    return Slowest(rank, "n1", ratio, "forward", seconds, 0.2)


def test_a_line_is_for_who_is_slow_twice_and_costs_the_run_time() -> None:
    watch, slow = lines(), late()
    assert watch._line(slow, 1.0) == ""
    assert watch._line(slow, 1.0) == str(slow)
    assert watch._line(late(rank=2), 1.0) == "", "another rank"
    assert watch._line(slow, 10.0) == "" and watch._line(slow, 1.0) == "", "a fiftieth of the step"
    assert watch._line(late(ratio=1.2), 1.0) == "" and watch._line(slow, 1.0) == ""
    assert watch._line(None, 1.0) == "" and watch._line(slow, 1.0) == ""


@pytest.mark.parametrize(
    ("found", "worth"),
    [(late(ratio=1.5), True), (late(ratio=1.49), False),
     (late(seconds=0.31), True), (late(seconds=0.29), False)],
)  # fmt: skip
def test_a_line_is_worth_half_as_long_again_and_a_tenth_of_the_step(
    found: Slowest, worth: bool
) -> None:
    watch = lines()
    assert watch._line(found, 1.0) == ""
    assert (watch._line(found, 1.0) != "") == worth


def test_times_are_means_over_the_steps_since_the_last_look(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watch = lines()
    watch._interval, watch._data_s, watch._whole_s, watch._steps = 2, 0.0, 0.0, 0
    watch._hosts_R, watch._stages_R = ["n0", "n1"], [4, 4]
    sent: list[Any] = []

    def gather(out: torch.Tensor, own: torch.Tensor) -> None:
        sent.append(own.tolist())
        out.copy_(torch.cat([own, torch.tensor([[0.1, 0.1]])]))

    monkeypatch.setattr(stragglers.dist, "all_gather_into_tensor", gather)
    monkeypatch.setattr(stragglers.runtime, "device", lambda: torch.device("cpu"))
    stragglers.FORWARD.take()
    for step, data_s in ((1, 0.3), (2, 0.5), (3, 0.6), (4, 1.0)):
        stragglers.FORWARD._seconds += 0.2
        found, line = watch.after_step(step, {"data": data_s, "update": 9.0}, 2.5)
        assert (found is None) == (step % 2 == 1) and bool(line) == (step == 4)
    assert sent == [[pytest.approx([0.4, 0.2])], [pytest.approx([0.8, 0.2])]]
    assert found is not None and found.ratio == pytest.approx(1.0 / 0.2)
    assert (found.part, found.seconds) == ("data", pytest.approx(0.8))
    assert "data 800 ms a step against 100 ms" in line


@pytest.mark.distributed
def test_ranks_know_their_stages() -> None:
    run_distributed(of_two_stages, 2)


def of_two_stages() -> None:
    """One rank a stage: the second is slow and yet nobody's peer. Then both on one."""
    from megatron_scalebio import runtime
    from megatron_scalebio.config import Config, ParallelConfig

    for stages in (2, 1):
        runtime.start(Config(parallel=ParallelConfig(pipeline_model_parallel_size=stages)))
        watch = Stragglers(1)
        data_s = [0.5, 3.0][runtime.rank()]
        for step in (1, 2):
            found, line = watch.after_step(step, {"data": data_s}, 3.0)
        if stages == 2:
            assert (found, line) == (None, "")
        else:
            assert found == Slowest(1, socket.gethostname(), 6.0, "data", 3.0, 0.5)
            assert line == str(found)
        next_layout()
