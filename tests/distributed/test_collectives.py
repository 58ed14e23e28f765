"""What ranks tell each other."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.harness import run_distributed

pytestmark = pytest.mark.distributed


def take_from_first() -> None:
    from megatron_scalebio.compat import adapt
    from megatron_scalebio.core.collectives import of_first_rank

    adapt()
    torch.distributed.init_process_group("gloo")
    own = torch.tensor([torch.distributed.get_rank() + 0.1, 7.0], dtype=torch.float64)
    assert of_first_rank(own).tolist() == [0.1, 7.0]


def test_all_ranks_take_the_first_ones_numbers() -> None:
    run_distributed(take_from_first, 2)
