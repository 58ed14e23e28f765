"""The rules only move elements, there and back; QKV lies as Megatron-LM has it."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_scalebio.convert.rules import RULES, Heads

HEADS = st.builds(
    lambda groups, per_group, channels: Heads(groups * per_group, groups, channels),
    st.integers(1, 4), st.integers(1, 4), st.integers(1, 5),
)  # fmt: skip


def numbered(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel()).reshape(shape)


def assert_inverse(name: str, parts: list[torch.Tensor], heads: Heads) -> None:
    rule = RULES[name]
    whole = rule.to_megatron(parts, heads)
    back = rule.to_hf(whole, heads)
    assert len(back) == len(parts)
    assert all(torch.equal(a, b) for a, b in zip(back, parts, strict=True))
    assert torch.equal(whole.flatten().sort().values, torch.cat([p.flatten() for p in parts]))
    on_meta = rule.to_megatron([part.to("meta") for part in parts], heads)
    assert on_meta.shape == whole.shape


@given(HEADS, st.integers(1, 6), st.booleans())
def test_qkv(heads: Heads, hidden: int, is_bias: bool) -> None:
    rows = numbered(sum(heads.rows)) if is_bias else numbered(sum(heads.rows), hidden)
    assert_inverse("qkv", list(rows.split(heads.rows)), heads)


@given(st.integers(1, 6), st.integers(1, 6))
def test_stack_rows(ffn: int, hidden: int) -> None:
    assert_inverse("stack_rows", list(numbered(2 * ffn, hidden).chunk(2)), Heads(1, 1, 1))


@given(st.integers(1, 6), st.integers(1, 6))
def test_copy_and_transposed(rows: int, columns: int) -> None:
    for name in ("copy", "transposed"):
        assert_inverse(name, [numbered(rows, columns)], Heads(1, 1, 1))


@given(st.integers(1, 6), st.integers(1, 6))
def test_alternating_gates(ffn: int, hidden: int) -> None:
    assert_inverse("transposed_alternate", [numbered(hidden, 2 * ffn)], Heads(1, 1, 1))
    assert_inverse("alternate", [numbered(2 * ffn)], Heads(1, 1, 1))
    assert RULES["alternate"].to_megatron([numbered(6)], Heads(1, 1, 1)).tolist() == [
        0, 2, 4, 1, 3, 5,
    ]  # fmt: skip


@given(st.integers(1, 4), st.integers(1, 4))
def test_gpt2_qkv(heads: int, channels: int) -> None:
    hidden = heads * channels
    assert_inverse("transposed_qkv", [numbered(hidden, 3 * hidden)], Heads(heads, heads, channels))
    assert_inverse("fused_qkv", [numbered(3 * hidden)], Heads(heads, heads, channels))


def test_megatron_order_of_rows() -> None:
    """Two groups of two heads with one channel: q q k v of the first group, then of the second."""
    q, k, v = torch.tensor([0, 1, 2, 3]), torch.tensor([10, 11]), torch.tensor([20, 21])
    whole = RULES["qkv"].to_megatron([q, k, v], Heads(4, 2, 1))
    assert whole.tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
