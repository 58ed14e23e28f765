from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from synthetic_run import write_run


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Writes a synthetic run folder; takes `write_run`'s arguments."""

    def make(*args: Any, **options: Any) -> Path:
        return write_run(tmp_path / "run", *args, **options)

    return make
