"""The order of files: two workers that share them end at about the same time. And no example of
hypothesis has a time limit: the first imports, and a busy machine is slow."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

TESTS = Path(__file__).parent
# What takes a minute or more, the longest first; `pytest --durations=25` tells.
LONGEST = [
    "test_demo.py", "distributed/test_exact_step.py", "te/test_runs.py", "model/test_parity.py",
    "test_resume.py", "distributed/test_low_bits.py", "methods/test_selection.py",
    "compare/test_compare.py", "test_megatron_lm_example.py", "plan/test_accuracy.py",
    "model/test_smollm2.py", "test_resume_experts.py", "te/test_parity.py",
    "distributed/test_low_rates.py", "test_train.py", "distributed/test_library.py",
    "checkpoint/test_background.py", "methods/test_weighting.py",
]  # fmt: skip
PLACES = {TESTS / name: place for place, name in enumerate(LONGEST)}

settings.register_profile("any time", deadline=None)
settings.load_profile("any time")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    assert all(path.exists() for path in PLACES), "a file has gone"
    items.sort(key=lambda item: PLACES.get(item.path, len(PLACES)))
