from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_scalebio.sample.plan import allocate, draw_rows, shuffled


def counts(shares: list[float], caps: list[int], total: int) -> list[int]:
    return allocate(np.array(shares), np.array(caps), total).tolist()


@pytest.mark.parametrize(
    ("shares", "caps", "total", "expected"),
    [
        ([0.5, 0.3, 0.2], [99, 99, 99], 10, [5, 3, 2]),
        ([1, 1, 1], [9, 9, 9], 10, [4, 3, 3]),
        ([0.8, 0.1, 0.1], [4, 99, 99], 10, [4, 3, 3]),
        ([0.6, 0.3, 0.1], [2, 4, 99], 10, [2, 4, 4]),  # the second overflows by the first's surplus
        ([0.5, 0.5, 0], [3, 3, 99], 10, [3, 3, 0]),  # nothing for a weight of 0
        ([0.5, 0.5], [0, 99], 10, [0, 10]),
        ([0.5, 0.5], [0, 0], 10, [0, 0]),
    ],
)
def test_allocate(shares: list[float], caps: list[int], total: int, expected: list[int]) -> None:
    assert counts(shares, caps, total) == expected


@settings(deadline=None)  # on a busy machine one call may take any time
@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 50)), min_size=1, max_size=8),
    st.integers(1, 120),
)
def test_allocate_never_gives_more_than_asked_or_than_there_is(
    sources: list[tuple[float, int]], total: int
) -> None:
    shares, caps = zip(*sources, strict=True)
    found = np.array(counts(list(shares), list(caps), total))
    assert (found <= caps).all() and (found >= 0).all()
    room = sum(cap for share, cap in sources if share > 0)
    assert found.sum() == min(total, room)


def test_draws_are_nested_even_and_of_usable_rows() -> None:
    usable = np.ones(100, bool)
    usable[::3] = False
    small, large = (draw_rows("math", usable, count, 7) for count in (20, 50))
    assert set(small) < set(large) and len(set(large)) == 50 and usable[large].all()
    assert (np.diff(large) > 0).all()
    twice = draw_rows("math", usable, 2 * 66 + 10, 7)
    assert sorted(np.bincount(twice, minlength=100)[usable]) == [2] * 56 + [3] * 10
    counts = np.bincount(draw_rows("math", usable, 66 + 20, 7), minlength=100)
    assert set(np.flatnonzero(counts == 2)) != set(small), "the second epoch has its own order"
    assert draw_rows("math", usable, 0, 7).tolist() == []
    assert draw_rows("math", usable, 20, 8).tolist() != small.tolist()
    assert draw_rows("code", usable, 20, 7).tolist() != small.tolist()
    assert sorted(shuffled(np.arange(1000), 1000, "x", 1)) == list(range(1000))
