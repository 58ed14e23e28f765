"""The order of files: two workers that share them end at about the same time."""

from __future__ import annotations

from pathlib import Path

import pytest

TESTS = Path(__file__).parent
# What takes a minute or more, the longest first; `pytest --durations=25` tells.
LONGEST = [
    "distributed/test_exact_step.py", "test_demo.py", "te/test_runs.py", "test_resume.py",
    "distributed/test_low_rates.py", "distributed/test_low_bits.py", "model/test_parity.py",
    "model/test_smollm2.py", "methods/test_weighting.py", "plan/test_accuracy.py",
    "methods/test_selection.py", "compare/test_compare.py", "test_megatron_lm_example.py",
    "te/test_parity.py", "test_train.py", "test_resume_experts.py", "distributed/test_library.py",
]  # fmt: skip
PLACES = {TESTS / name: place for place, name in enumerate(LONGEST)}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    assert all(path.exists() for path in PLACES), "a file has gone"
    items.sort(key=lambda item: PLACES.get(item.path, len(PLACES)))
