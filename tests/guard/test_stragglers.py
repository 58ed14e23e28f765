"""Which rank is slowest, against whom, and when it is worth a line."""

from __future__ import annotations

import pytest

from megatron_scalebio.guard.stragglers import Slowest, Stragglers, slowest

HOSTS = ["n0", "n0", "n1", "n1"]


def test_peers_are_the_ranks_of_a_stage() -> None:
    """The second stage does twice the work; rank 1 is the one that is late."""
    times_RP = [[0.1, 1.0], [0.1, 1.4], [0.1, 2.0], [0.1, 2.1]]
    found = slowest(times_RP, HOSTS, [0, 0, 1, 1])
    assert found is not None and (found.rank, found.host, found.part) == (1, "n0", "forward")
    assert found.ratio == pytest.approx(1.5 / 1.1) and found.peers_s == 1.0


def test_with_a_rank_a_stage_all_are_peers() -> None:
    found = slowest([[0.1, 1.0], [0.9, 1.0], [0.1, 1.0]], HOSTS, [0, 1, 2])
    assert found is not None and (found.rank, found.part) == (1, "data")
    assert "rank 1 (n0) takes 1.7 times as long as its peers: data 900 ms a step against 100" in (
        str(found)
    )
    assert slowest([[0.1, 1.0]], HOSTS, [0]) is None


def test_a_line_is_for_who_is_slow_twice_and_costs_the_run_time() -> None:
    lines = Stragglers.__new__(Stragglers)
    lines._suspect = None
    slow = Slowest(3, "n1", 2.0, "forward", 0.4, 0.2)
    assert lines._line(slow, 1.0) == ""
    assert lines._line(slow, 1.0) == str(slow)
    assert lines._line(Slowest(2, "n1", 2.0, "forward", 0.4, 0.2), 1.0) == "", "another rank"
    assert lines._line(slow, 10.0) == "" and lines._line(slow, 1.0) == "", "a fiftieth of the step"
    assert lines._line(Slowest(3, "n1", 1.2, "forward", 0.4, 0.2), 1.0) == ""
