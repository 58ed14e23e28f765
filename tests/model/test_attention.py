"""The masks of attention over a window, or with soft-capped scores."""

from __future__ import annotations

import gc
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_scalebio.model import attention
from megatron_scalebio.model.attention import SdpaAttention, _visible_SS

CPU = torch.device("cpu")


def layer_with(window: int | None, softcap: float | None = None) -> SdpaAttention:
    layer = SdpaAttention.__new__(SdpaAttention)
    torch.nn.Module.__init__(layer)
    layer.window, layer.softcap, layer.dropout = window, softcap, 0.0
    layer.softmax_offset = layer.softmax_scale = None
    return layer


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


@pytest.mark.parametrize("window", [1, 3, 5, 9])
def test_blocks_see_what_the_whole_matrix_shows(
    monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    """Explicit scores and the fused kernel's, of a whole sequence and of its last positions."""
    monkeypatch.setattr(attention, "_LEAST_BLOCK", 4)
    for queries, keys in ((1, 14), (5, 14), (14, 14), (3, 3)):
        torch.manual_seed(0)
        query = torch.randn(queries, 2, 6, 4, requires_grad=True)
        key, value = (torch.randn(keys, 2, 2, 4, requires_grad=True) for _ in range(2))
        seen = torch.ones(queries, keys, dtype=torch.bool)
        seen = seen.tril(keys - queries).triu(keys - queries + 1 - window)
        wide = (x.permute(1, 2, 0, 3).repeat_interleave(3, dim=1) for x in (key, value))
        right = F.scaled_dot_product_attention(query.permute(1, 2, 0, 3), *wide, attn_mask=seen)
        right = right.permute(2, 0, 1, 3).flatten(2)
        of_right = torch.autograd.grad(right.square().sum(), (query, key, value))
        for softcap in (None, 1e6):  # so high that it caps nothing, and scores are made explicit
            layer = layer_with(window, softcap)
            got = layer._attend(query, key, value)
            torch.testing.assert_close(got, right)
            of_got = torch.autograd.grad(got.square().sum(), (query, key, value))
            # Explicit scores go through tanh, whose float32 moves gradients by 1e-5.
            torch.testing.assert_close(of_got, of_right, rtol=1e-4, atol=5e-5)


def test_no_block_is_shown_more_than_the_window_before_it() -> None:
    for start, (q, k) in zip(range(0, 5000, 1000), attention.blocks(5000, 6000, 1000), strict=True):
        assert (q, k) == (slice(start, start + 1000), slice(start + 1, start + 2000))


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
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, 8, 4) for heads in (6, 2, 2))
    got = layer_with(window)._fused(query, key, value, 0.0)
    assert asked == [(True, False) if window else (False, True)]
    key, value = (x.repeat_interleave(3, dim=1) for x in (key, value))
    seen = torch.ones(8, 8, dtype=torch.bool).tril().triu(-7 if window is None else 1 - window)
    torch.testing.assert_close(got, sdpa(query, key, value, attn_mask=seen))
