"""The masks of attention over a window, or with soft-capped scores."""

from __future__ import annotations

import gc
import random

import torch

from megatron_scalebio.model.attention import _visible_SS

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
