"""The masks of attention over a window, or with soft-capped scores."""

from __future__ import annotations

import gc
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_scalebio.model import attention
from megatron_scalebio.model.attention import SdpaAttention, _visible_SS

CPU = torch.device("cpu")


def test_a_mask_shows_the_past_or_a_window_of_it_whatever_was_asked_before() -> None:
    generator = random.Random(0)
    for _ in range(300):
        keys = generator.randint(1, 24)
        queries, window = generator.randint(1, keys), generator.choice([None, 1, 5, 40])
        mask = _visible_SS(queries, keys, window, CPU)
        place = [keys - queries + row for row in range(queries)]  # of each query
        assert mask.tolist() == [
            [(window is None or p - window < key) and key <= p for key in range(keys)]
            for p in place
        ]


def test_micro_batches_of_many_lengths_leave_one_mask_of_each_kind() -> None:
    def kept_bytes() -> int:
        gc.collect()
        storages = (
            item.untyped_storage()
            for item in gc.get_objects()
            if type(item) is torch.Tensor and item.dtype is torch.bool
        )
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    before = kept_bytes()
    for keys in (*range(900, 1000, 8), *range(999, 900, -8)):
        _visible_SS(keys, keys, None, CPU)
        _visible_SS(keys // 2, keys, 77, CPU)  # as under context parallelism
    assert kept_bytes() - before <= 1000 * 1000 + 500 * 1000


def test_a_mask_too_large_to_keep_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_MOST_KEPT", 30 * 30)
    monkeypatch.setattr(attention, "_largest_SS", {})
    assert _visible_SS(31, 31, 3, CPU).sum() == 31 * 3 - 3
    assert not attention._largest_SS
    assert _visible_SS(30, 30, 3, CPU).sum() == 30 * 3 - 3
    assert len(attention._largest_SS) == 1


@pytest.mark.parametrize("window", [None, 3])
def test_no_kernel_is_given_a_matrix_and_groups(
    monkeypatch: pytest.MonkeyPatch, window: int | None
) -> None:
    """Only torch's own path takes both, and builds all scores of the sequence."""
    asked: list[tuple[bool, bool]] = []
    sdpa = F.scaled_dot_product_attention

    def fused(*words: Any, **options: Any) -> torch.Tensor:
        asked.append((options["attn_mask"] is not None, options["enable_gqa"]))
        return sdpa(*words, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", fused)
    layer: Any = SimpleNamespace(window=window, softmax_scale=None)
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, 8, 4) for heads in (6, 2, 2))
    got = SdpaAttention._fused(layer, query, key, value, 0.0)
    assert asked == [(True, False) if window else (False, True)]
    key, value = (x.repeat_interleave(3, dim=1) for x in (key, value))
    seen = torch.ones(8, 8, dtype=torch.bool).tril().triu(-7 if window is None else 1 - window)
    torch.testing.assert_close(got, sdpa(query, key, value, attn_mask=seen))
