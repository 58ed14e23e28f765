"""How pytest-xdist deals the tests to its workers."""

from __future__ import annotations

from pathlib import Path

import pytest

# Files that share something costly or unique: a SLURM cluster, an unpacked real model.
TOGETHER = {
    "slurm": ("slurm",),
    "smollm2": ("test_smollm2.py", "test_benchmarks.py", "test_round_trip.py"),
}


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests of a file go to one worker: most files run one scenario and look at it often."""
    for item in items:
        item.add_marker(pytest.mark.xdist_group(_group(item.path)))


def _group(path: Path) -> str:
    for group, parts in TOGETHER.items():
        if set(parts) & set(path.parts):
            return group
    return str(path)
