"""How `convert --verify` measures: by each token's vector, in parts of its largest value."""

from __future__ import annotations

import pytest
import torch

from megatron_scalebio.convert.verify import TOLERANCE, _difference


def test_a_small_token_counts_as_much_as_a_large_one() -> None:
    theirs_BSH = torch.tensor([[[100.0, 1.0, 0.0], [0.5, -2.0, 1.0]], [[3.0, 0.0, 4.0]] * 2])
    ours_BSH = theirs_BSH.clone()
    ours_BSH[0, 0, 1] += 1.0
    assert _difference(ours_BSH, theirs_BSH) == pytest.approx(0.01)
    ours_BSH[0, 1, 0] -= 0.1
    assert _difference(ours_BSH, theirs_BSH) == pytest.approx(0.05)
    ours_BSH[1, 1, 2] -= 0.8
    assert _difference(ours_BSH, theirs_BSH) == pytest.approx(0.2)
    assert TOLERANCE == 1e-3, "rounding is a thousandth of it"
