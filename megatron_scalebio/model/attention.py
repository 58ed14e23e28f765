"""Causal core attention by torch's scaled_dot_product_attention.

Megatron-Core's local DotProductAttention builds the sequence² score matrix; this one does not,
except where scores are soft-capped (Gemma 2) or a head may attend to nothing (gpt-oss). Over a
sliding window it goes in blocks, which see no more than the window before them. It serves
the CPU, and CUDA without Transformer Engine, alone or under context parallelism. Sequences are
padded on the right, so the causal mask alone keeps padding out of every real position. In a packed
row each sequence attends by itself.

Legend: S sequence, B batch, N query heads of this rank, G key/value heads, D head size.
"""

import contextlib
import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    is_layer_window_attention,
    make_sharded_tensors_for_checkpoint,
)

from megatron_scalebio.model.context_parallel import chunk_spans, whole_sequences


class SdpaAttention(MegatronModule):
    """softmax(q kᵀ · scale) v over the past, or over a sliding window of it."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        assert attn_mask_type is AttnMaskType.causal
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softcap: float | None = getattr(config, "attn_logit_softcapping", None)
        if config.softmax_type == "learnable":  # each head's score of nothing
            heads = config.num_attention_heads // config.tensor_model_parallel_size
            offset_N = torch.nn.Parameter(torch.zeros(heads, dtype=config.params_dtype))
            self.register_parameter("softmax_offset", offset_N)
        else:
            self.softmax_offset = None
        self.window: int | None = None  # tokens that a position sees, itself included
        if is_layer_window_attention(
            config.window_size, config.window_attn_skip_freq, max(1, layer_number)
        ):
            assert config.window_size is not None
            self.window = config.window_size[0] + 1

    def forward(
        self,
        query_SBND: torch.Tensor,
        key_SBGD: torch.Tensor,
        value_SBGD: torch.Tensor,
        attention_mask: torch.Tensor | None,
        packed_seq_params: PackedSeqParams | None = None,
        **unused: Any,
    ) -> torch.Tensor:
        """Returns the context, S × B × (N·D); of a packed row, whose tensors have no B, B is 1."""
        assert attention_mask is None, "the causal mask is implied"
        if packed_seq_params is not None:
            whole = (x.unsqueeze(1) for x in (query_SBND, key_SBGD, value_SBGD))
            ends = packed_seq_params.cu_seqlens_q.tolist()
            lengths = [end - start for start, end in pairwise(ends)]
            return torch.cat(list(map(self._attend, *(x.split(lengths) for x in whole))))
        group = parallel_state.get_context_parallel_group()
        if group.size() == 1:
            return self._attend(query_SBND, key_SBGD, value_SBGD)
        key_SBGD, value_SBGD = whole_sequences(key_SBGD, value_SBGD, group)
        spans = chunk_spans(len(query_SBND), group)
        return torch.cat(
            [self._attend(query_SBND[q], key_SBGD[k], value_SBGD[k]) for q, k in spans]
        )

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True), prefix, {"softmax_offset": 0}, sharded_offsets,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_cp_group=metadata["dp_cp_group"],
        )  # fmt: skip

    def _attend(
        self, query_SBND: torch.Tensor, key_SBGD: torch.Tensor, value_SBGD: torch.Tensor
    ) -> torch.Tensor:
        """The context of the last positions of a sequence, from keys and values of all of it."""
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query_SBND, key_SBGD, value_SBGD))
        plain = self.softcap is None and self.softmax_offset is None
        attend = self._fused if plain else self._explicit
        drops = self.training and self.dropout > 0
        fork = tensor_parallel.get_cuda_rng_tracker().fork
        with fork() if drops else contextlib.nullcontext():
            contexts_BNSD = [
                attend(query[:, :, q], key[:, :, k], value[:, :, k], self.dropout if drops else 0.0)
                for q, k in blocks(query.size(2), key.size(2), self.window)
            ]
        whole = contexts_BNSD[0] if len(contexts_BNSD) == 1 else torch.cat(contexts_BNSD, dim=2)
        return whole.permute(2, 0, 1, 3).flatten(2)

    def _fused(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float
    ) -> torch.Tensor:
        queries, keys = query.size(2), key.size(2)
        mask: torch.Tensor | None = None
        if self.window is not None and self.window < keys:
            mask = _visible_SS(queries, keys, self.window, query.device)
            # No fused kernel takes a matrix and groups: torch's own would build all scores.
            key, value = _for_each_query(query, key, value)
        elif queries < keys:
            from torch.nn.attention.bias import causal_lower_right  # brings torch's compiler

            mask = causal_lower_right(queries, keys)  # not a matrix: flash attention takes it
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None,
            scale=self.softmax_scale,
            enable_gqa=query.size(1) != key.size(1),
        )

    def _explicit(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float
    ) -> torch.Tensor:
        key, value = _for_each_query(query, key, value)
        scale = self.softmax_scale or 1 / math.sqrt(query.size(-1))
        scores = query @ key.transpose(2, 3) * scale
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        visible = _visible_SS(query.size(2), key.size(2), self.window, query.device)
        scores = scores.masked_fill(~visible, -math.inf)
        if self.softmax_offset is not None:
            offset = self.softmax_offset.to(scores).view(-1, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat((scores, offset), dim=-1)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        weights = weights[..., : key.size(2)]
        return F.dropout(weights, dropout) @ value


_LEAST_BLOCK = 256  # positions: smaller ones are many calls


def blocks(queries: int, keys: int, window: int | None) -> Iterator[tuple[slice, slice]]:
    """The last positions of a sequence in blocks, and for each the keys that it sees."""
    if window is None or window >= keys:
        yield slice(0, queries), slice(0, keys)
        return
    before, size = keys - queries, max(window, _LEAST_BLOCK)
    for start in range(0, queries, size):
        end = min(start + size, queries)
        yield slice(start, end), slice(max(0, before + start + 1 - window), before + end)


def _for_each_query(query: torch.Tensor, *of_groups: torch.Tensor) -> Iterator[torch.Tensor]:
    """Keys or values repeated for every query head of their group, B × N × S × D."""
    repeats = query.size(1) // of_groups[0].size(1)
    return (x.repeat_interleave(repeats, dim=1) if repeats > 1 else x for x in of_groups)


_MOST_KEPT = 2**28  # bytes: of 16,384 positions that all see each other
# The largest mask so far of each window and device: that of a shorter sequence is its lower right.
_largest_SS: dict[tuple[int | None, torch.device], torch.Tensor] = {}


def _visible_SS(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Which of the last positions (rows) sees which (columns): the past, or `window` of it."""
    kept = _largest_SS.get((window, device), torch.empty(0, 0))
    rows, columns = max(queries, kept.size(0)), max(keys, kept.size(1))
    if kept.shape != (rows, columns):
        before = columns - rows
        past = torch.ones(rows, columns, dtype=torch.bool, device=device).tril(before)
        kept = past if window is None else past.triu(before + 1 - window)
        if kept.numel() <= _MOST_KEPT:
            _largest_SS[window, device] = kept
    return kept[rows - queries :, columns - keys :]
