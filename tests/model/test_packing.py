"""Sequences packed in one row: the losses and gradients that they have side by side."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed.harness import next_layout, run_distributed

pytestmark = pytest.mark.distributed
SEQ, VOCAB, LENGTHS = 32, 61, (9, 32, 1, 20, 16, 2)
SMALL = {
    "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2,
    "ffn_hidden_size": 48, "init_method_std": 0.2, "vocab_size": VOCAB,
}  # fmt: skip
WINDOWS = {"window_size": [4, 0], "window_attn_skip_freq": 2}
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "learned positions": {"position_embedding_type": "learned_absolute"},
    "windows": WINDOWS,
    "windows turned apart": {**WINDOWS, "rotary_base": 10**6, "window_rotary_base": 10**4},
    "windows, neighbours turned": {**WINDOWS, "rotary_interleaved": True},
    "windows, neighbours turned by the same base apart": {
        **WINDOWS, "rotary_interleaved": True, "window_rotary_base": 10**4,
    },
    "soft-capped windows": {
        **WINDOWS, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
        "post_norms": True, "softmax_scale": 0.3,
    },
    "parallel residual, partial rope": {"parallel_residual": True, "rotary_percent": 0.5},
    "a score of nothing, no rope": {"softmax_type": "learnable", "no_rope_freq": [1, 0]},
    "rope of neighbours, norms without weights": {
        "rotary_interleaved": True, "qk_l2_norm": True, "no_rope_freq": [0, 1],
    },
    "norms of queries and keys": {"qk_layernorm": True, "qk_layernorm_whole": True},
    "llama3's rope": {
        "rope_scaling": {
            "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8,
        }
    },
}  # fmt: skip


class Sequences:
    """A source of the lengths above."""

    def __init__(self) -> None:
        draw = np.random.default_rng(3)
        self.rows = [draw.integers(0, VOCAB, n + 1).astype(np.uint16) for n in LENGTHS]
        self.masks = [draw.random(n + 1) < 0.7 for n in LENGTHS]
        for mask in self.masks:
            mask[-1] = True

    def length(self, index: int) -> int:
        return LENGTHS[index]

    def example(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.rows[index], self.masks[index]


def on_one_rank(folder: str) -> None:
    from megatron_scalebio import runtime
    from megatron_scalebio.config_loader import load_config
    from megatron_scalebio.core.batch import gpt_losses, sequence_sums
    from megatron_scalebio.data.batch import BatchLayout, micro_batches
    from megatron_scalebio.mixture.sampler import Picks
    from megatron_scalebio.model.init import initialize_weights
    from megatron_scalebio.model.provider import build_model
    from megatron_scalebio.model.settings import transformer_config

    side_by_side = BatchLayout(6, 0, 1, 8, SEQ)
    picks = Picks(np.zeros(6, dtype=np.int64), np.arange(6), np.ones(1))
    found: dict[str, list] = {}
    for name, model in MODELS.items():
        config = load_config(None, {"data": {"seq_length": SEQ}, "model": {**SMALL, **model}})
        runtime.start(config)
        chunks = build_model(config, transformer_config(config), VOCAB)
        initialize_weights(chunks, 1, 0.2, 2)
        for layout in (side_by_side, replace(side_by_side, packed=True)):
            (batch,) = micro_batches([Sequences()], picks, layout)
            losses = gpt_losses(chunks[0], batch)
            sums = sequence_sums(torch.where(batch.mask_BS > 0, losses, 0.0), batch)
            chunks[0].zero_grad()
            (sums[batch.member_B.argsort()] * torch.arange(1, 7)).sum().backward()
            gradients = {k: p.grad for k, p in chunks[0].named_parameters() if p.grad is not None}
            place = batch.member_B.argsort()
            found.setdefault(name, []).append(
                (len(batch.tokens_BS), sums.detach()[place], gradients)
            )
        next_layout()
    torch.save(found, Path(folder) / "found.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list]:
    folder = tmp_path_factory.mktemp("packing")
    run_distributed(on_one_rank, 1, str(folder))
    return torch.load(folder / "found.pt", weights_only=True)


@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_are_those_of_sequences_side_by_side(
    found: dict[str, list], name: str
) -> None:
    (rows, sums, gradients), (packed_rows, packed_sums, packed_gradients) = found[name]
    assert (rows, packed_rows) == (6, 1)
    torch.testing.assert_close(packed_sums, sums, rtol=1e-6, atol=0)
    assert gradients.keys() == packed_gradients.keys() and len(gradients) > 10
    for key, gradient in gradients.items():
        distance = (packed_gradients[key] - gradient).norm() / gradient.norm().clamp_min(1e-9)
        assert distance <= 1e-6, (key, float(distance))


def test_a_base_of_windows_that_is_that_of_other_layers_changes_nothing(
    found: dict[str, list],
) -> None:
    one, apart = (
        found[f"windows, neighbours turned{how}"] for how in ("", " by the same base apart")
    )
    torch.testing.assert_close(apart[0][1], one[0][1], rtol=0, atol=0)
