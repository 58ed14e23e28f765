"""Copies of the weights in FP8 and FP4: made in time, shared while u has w's weights."""

from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.transformer.module import Float16Module

from megatron_scalebio.core.twin import (
    TwinModel,
    copy_buffers,
    forget_weight_copies,
    share_storage,
    unshare_storage,
)
from tests.core.test_twin import ToyChunk


def remade(both: TwinModel, moved: bool = True) -> list[bool]:
    """Which layers of w, then of u, make FP8 copies anew, when a flush begins."""
    if moved:
        both.weights_have_moved()
    both.set_is_first_microbatch()
    layers = [layer for gpt in (both.w, both.u) for layer in (gpt.first, gpt.second)]  # type: ignore[union-attr]
    made = [bool(layer.is_first_microbatch) for layer in layers]
    for layer in layers:
        layer.is_first_microbatch = False
    return made


def test_fp8_copies_of_what_trains_are_made_every_step_and_of_the_rest_every_period() -> None:
    w, u = ToyChunk("hybrid"), ToyChunk("hybrid")
    for gpt in (w, u):
        gpt.first.requires_grad_(False)
    gpt.second.bias.requires_grad_(False)  # any of a layer's parameters makes it train
    both = TwinModel(w, u)  # type: ignore[arg-type]
    assert remade(both) == [True, True, True, True]
    assert remade(both) == remade(both) == [False, True, False, True]
    assert remade(both, moved=False) == [False] * 4, "another flush of the same step"
    forget_weight_copies([u])
    assert remade(both) == [False, True, True, True]
    assert remade(both) == [False, True, False, True]
    assert remade(TwinModel(w, u)) == [True, True, True, True], "another period"  # type: ignore[arg-type]
    forget_weight_copies([w, u])
    w.first.is_first_microbatch = True
    both.set_is_first_microbatch()
    both.set_is_first_microbatch()
    assert w.first.is_first_microbatch is True, "asked for and not yet made"
    alone = TwinModel(w, w)  # type: ignore[arg-type]
    assert remade(alone)[:2] == [True, True] and remade(alone)[:2] == [False, True]


def test_copies_of_a_model_in_half_precision_are_forgotten_too() -> None:
    """Its chunks are wrapped, in runs always."""
    w, u = ToyChunk("hybrid"), ToyChunk("hybrid")
    for gpt in (w, u):
        gpt.requires_grad_(False)
    both = TwinModel(w, u)  # type: ignore[arg-type]
    assert remade(both) == [True] * 4 and remade(both) == [False] * 4
    half: Any = SimpleNamespace(fp16=False, bf16=True, virtual_pipeline_model_parallel_size=None)
    forget_weight_copies([Float16Module(half, w)])
    assert remade(both) == [True, True, False, False]


def test_under_delayed_scaling_a_period_begins_with_two_casts() -> None:
    """The first of a layer is cast with the scale that it had before, at a run's start 1."""
    w, u = ToyChunk("hybrid", "delayed"), ToyChunk("hybrid", "delayed")
    for gpt in (w, u):
        gpt.first.requires_grad_(False)
    both = TwinModel(w, u)  # type: ignore[arg-type]
    assert remade(both) == remade(both) == [True, True, True, True]
    assert remade(both) == [False, True, False, True]
    assert remade(TwinModel(w, u)) == [True, True, True, True], "another period"  # type: ignore[arg-type]
    for gpt in (w, u):
        gpt.first._fp8_workspaces = {}  # type: ignore[assignment]
    share_storage([w], [u])
    remade(TwinModel(w, u))  # type: ignore[arg-type]
    assert u.first._fp8_workspaces is not w.first._fp8_workspaces, "each has its own scales"


def test_copies_in_fp4_are_made_as_without_delayed_scaling() -> None:
    w, u = ToyChunk(None, "delayed"), ToyChunk(None, "delayed")  # Megatron's default recipe
    for gpt in (w, u):
        gpt.config.fp4 = "e2m1"
        gpt.first.requires_grad_(False)
    both = TwinModel(w, u)  # type: ignore[arg-type]
    assert remade(both) == [True] * 4
    assert remade(both) == [False, True, False, True]


def test_the_first_to_run_makes_the_copies_that_both_share() -> None:
    w, u = ToyChunk("hybrid"), ToyChunk("hybrid")
    for gpt in (w, u):
        gpt.first.requires_grad_(False)
        gpt.second.bias.requires_grad_(False)  # a layer is shared whole or not at all
        for layer in (gpt.first, gpt.second):
            layer._fp8_workspaces = {}  # type: ignore[assignment]
    of_w = w.first._fp8_workspaces
    share_storage([w], [u])
    unshare_storage([w], [u])

    def made(on_u: bool) -> list[bool]:
        both = TwinModel(w, u, lambda model, batch: None)  # type: ignore[arg-type, return-value]
        both.set_is_first_microbatch()
        both(on_u, None)
        both(not on_u, None)
        marks = [bool(layer.is_first_microbatch) for g in (w, u) for layer in (g.first, g.second)]
        for layer in (w.first, w.second, u.first, u.second):
            layer.is_first_microbatch = False
        return marks

    assert made(on_u=True) == [False, True, True, True]
    assert made(on_u=False) == [True, True, False, True]
    assert u.first._fp8_workspaces is w.first._fp8_workspaces is of_w
    assert u.second._fp8_workspaces is not w.second._fp8_workspaces
    both = TwinModel(w, u, lambda model, batch: None)  # type: ignore[arg-type, return-value]
    remade(both)
    forget_weight_copies([w])  # of w alone, which is to run first
    both.set_is_first_microbatch()
    both(False, None)
    assert w.first.is_first_microbatch and not u.first.is_first_microbatch
    w.first.is_first_microbatch = False  # type: ignore[assignment]
    for gpt in (w, u):
        gpt.first.requires_grad_(True)
    unshare_storage([w], [u])
    assert made(on_u=True) == [True] * 4
    assert u.first._fp8_workspaces is not w.first._fp8_workspaces


def test_u_is_given_the_delayed_scales_of_w() -> None:
    def scaled(value: float, **others: Any) -> ToyChunk:
        chunk = ToyChunk()
        scale, history = torch.full((3,), value), torch.full((1, 3), value)
        meta = SimpleNamespace(scale=scale, amax_history=history)
        chunk.first.fp8_meta = {"scaling_fwd": meta, **others}  # type: ignore[assignment]
        return chunk

    stateless = SimpleNamespace(quantizers=())
    w, u = scaled(2.0, scaling_bwd=stateless), scaled(1.0, scaling_bwd=stateless)
    held = u.first.fp8_meta["scaling_fwd"].scale  # type: ignore[index]
    copy_buffers([w], [u])
    assert held.tolist() == [2.0] * 3, "in place"
    assert u.first.fp8_meta["scaling_fwd"].amax_history.tolist() == [[2.0] * 3]  # type: ignore[index]
    copy_buffers([w], [ToyChunk()])  # one that has not run yet has none
    held.fill_(6.0)
    copy_buffers([w], [u], 0.25)
    assert held.tolist() == [5.0] * 3, "a part of the way"
    held.fill_(torch.inf)
    copy_buffers([w], [u])
    assert held.tolist() == [2.0] * 3, "what has diverged comes back, too"


def test_without_fp8_nothing_is_marked() -> None:
    both = TwinModel(ToyChunk(), ToyChunk())  # type: ignore[arg-type]
    assert remade(both) == [False] * 4
