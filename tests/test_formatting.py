from __future__ import annotations

import pytest

from megatron_scalebio.formatting import duration, pace, percent, quantity


@pytest.mark.parametrize(
    ("share", "words"),
    [
        (0.0, "0%"), (0.00004, "<0.01%"), (0.0031, "0.31%"), (0.0314, "3.1%"), (0.5, "50.0%"),
        (None, "–"),
    ],
)  # fmt: skip
def test_shares_in_words(share: float | None, words: str) -> None:
    assert percent(share) == words


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (7, "7"), (1_500, "1.5 k"), (14_745_600, "14.7 M"), (2.5e9, "2.5 B"), (3e12, "3 T"),
        (None, "–"),
    ],
)  # fmt: skip
def test_counts_in_words(count: float | None, words: str) -> None:
    assert quantity(count) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.25, "0.25 s"), (119, "119 s"), (150, "2 min"), (3725, "1 h 02 min"),
        (90_000, "25 h 00 min"), (None, "–"),
    ],
)  # fmt: skip
def test_times_in_words(seconds: float | None, words: str) -> None:
    assert duration(seconds) == words


def test_the_time_of_a_step_is_in_the_unit_that_it_needs() -> None:
    assert [pace(s) for s in (0.0123, 0.5, 0.9994, 0.9996, 1.08, 75.2)] == [
        "12.3 ms/step", "500 ms/step", "999 ms/step", "1 s/step", "1.08 s/step", "75.2 s/step",
    ]  # fmt: skip
