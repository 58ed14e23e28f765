"""The twin: u on w's storage, micro-batches to the model of their role, FP8 copies made in time.

Of toy chunks, in this process: what Megatron's own models do in it is in tests/distributed.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.enums import ModelType
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from megatron.core.utils import unwrap_model

from megatron_scalebio.compat.routing_replay import follow
from megatron_scalebio.core import twin
from megatron_scalebio.core.twin import (
    TwinModel,
    build_chunks,
    build_twins,
    finalize_twin_grads,
    named_parameters,
    share_storage,
    unshare_storage,
)
from tests.core.regression import Counter, parts
from tests.described import shared_names


class ToyChunk(torch.nn.Module):
    """A chunk of two layers; the weights of the second are replaced while it is built."""

    def __init__(self, fp8: str | None = None, recipe: str = "tensorwise") -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 2)
        self.second.weight = torch.nn.Parameter(torch.full((2, 3), 0.5))
        self.register_parameter("none", None)
        self.register_buffer("table", torch.arange(4.0))
        self.config = SimpleNamespace(fp8=fp8, fp8_recipe=recipe, fp4=None, bf16=False)
        self.ddp_config = SimpleNamespace(overlap_grad_reduce=False)
        self.model_type, self.vp_stage = object(), 3
        self.share_embeddings_and_output_weights = object()
        self.input: Any = None
        for layer in (self.first, self.second):
            layer.is_first_microbatch = False

    def set_input_tensor(self, tensor: Any) -> None:
        self.input = tensor

    def forward(self, *args: Any, **kwargs: Any) -> tuple:
        return self, self.input, args, kwargs


NAMES = [
    f"{chunk}.{layer}.{kind}"
    for chunk in (0, 1) for layer in ("first", "second") for kind in ("weight", "bias")
]  # fmt: skip


@pytest.mark.parametrize("virtual", [None, 2])
def test_one_chunk_of_a_pipeline_begins_and_one_ends(
    monkeypatch: pytest.MonkeyPatch, virtual: int | None
) -> None:
    of_megatron = SimpleNamespace(get_virtual_pipeline_model_parallel_world_size=lambda: virtual)
    monkeypatch.setattr(twin, "parallel_state", of_megatron)
    monkeypatch.setattr(twin, "device", lambda: torch.device("cpu"))
    asked: list[tuple] = []

    def provider(pre_process: bool, post_process: bool, vp_stage: int | None) -> torch.nn.Module:
        asked.append((stage, vp_stage, pre_process, post_process))
        return ToyChunk()

    for stage in range(3):
        pp: Any = SimpleNamespace(rank=lambda at=stage: at, size=lambda: 3)
        assert len(build_chunks(provider, SimpleNamespace(pp=pp))) == (virtual or 1)  # type: ignore[arg-type]
    numbers = range(virtual) if virtual else [None]
    last = virtual - 1 if virtual else None
    assert asked == [
        (stage, number, (stage, number or 0) == (0, 0), (stage, number) == (2, last))
        for stage in range(3) for number in numbers
    ]  # fmt: skip


@pytest.mark.parametrize("bf16", [False, True])
def test_chunks_are_in_their_dtype_and_routers_count_in_fp32(
    monkeypatch: pytest.MonkeyPatch, bf16: bool
) -> None:
    of_megatron = SimpleNamespace(get_virtual_pipeline_model_parallel_world_size=lambda: None)
    monkeypatch.setattr(twin, "parallel_state", of_megatron)
    monkeypatch.setattr(twin, "device", lambda: torch.device("cpu"))
    provider = parts(bf16)["model_provider"]
    pp = SimpleNamespace(rank=lambda: 0, size=lambda: 1)
    [plain] = build_chunks(provider, SimpleNamespace(pp=pp))  # type: ignore[arg-type]
    assert isinstance(plain, Float16Module) == bf16
    gpt: Any = unwrap_model(plain)
    dtype = torch.bfloat16 if bf16 else torch.float32
    assert {layer.weight.dtype for layer in gpt.layers} == {dtype}
    assert gpt.router.expert_bias.dtype is torch.float32 and gpt.router.frozen_expert_bias
    if bf16:
        [again] = build_chunks(lambda **stages: plain, SimpleNamespace(pp=pp))  # type: ignore[arg-type]
        assert again is plain, "it is in half precision already"


@pytest.fixture
def twins(monkeypatch: pytest.MonkeyPatch) -> tuple[list, list]:
    arguments = ("provider", "groups")

    def build(*given: Any) -> list[ToyChunk]:
        assert given == arguments
        return [ToyChunk(), ToyChunk()]

    monkeypatch.setattr(twin, "build_chunks", build)
    return build_twins(*arguments)  # type: ignore[arg-type, return-value]


def tensors(chunks: list, kind: str = "parameters") -> list[torch.Tensor]:
    return [tensor for chunk in chunks for tensor in getattr(chunk, kind)()]


def test_u_is_built_on_the_storage_of_w(twins: tuple[list, list]) -> None:
    w, u = twins
    assert [type(chunk) for chunk in w + u] == [ToyChunk] * 4
    for p_w, p_u in zip(tensors(w), tensors(u), strict=True):
        assert p_w is not p_u and p_u.data_ptr() == p_w.data_ptr() and p_u.equal(p_w)
    assert len({p.data_ptr() for p in tensors(w)}) == 8
    for b_w, b_u in zip(tensors(w, "buffers"), tensors(u, "buffers"), strict=True):
        assert b_w.data_ptr() != b_u.data_ptr()
    later = torch.nn.Linear(3, 3)
    assert later.weight.data_ptr() not in {p.data_ptr() for p in tensors(w)}, "no hook is left"


def test_another_model_for_u_is_refused_and_nothing_stays_hooked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models = iter([[ToyChunk], [torch.nn.LayerNorm]])

    def build(*_: Any) -> list[torch.nn.Module]:
        [kind] = next(models)
        return [kind(7)] if kind is torch.nn.LayerNorm else [kind()]

    monkeypatch.setattr(twin, "build_chunks", build)
    with pytest.raises((AssertionError, ValueError)):
        build_twins("provider", "groups")  # type: ignore[arg-type]
    before = torch.nn.Linear(2, 2).weight
    assert before.shape == (2, 2)


def test_parameters_are_named_by_their_chunk(twins: tuple[list, list]) -> None:
    w, _ = twins
    named = list(named_parameters(w))
    assert [name for name, _ in named] == NAMES
    assert all(p is q for (_, p), q in zip(named, tensors(w), strict=True))


def test_what_trains_gets_storage_of_its_own_once(twins: tuple[list, list]) -> None:
    w, u = twins
    assert shared_names(w, u) == set(NAMES)
    trained = {"0.second.weight", "1.first.bias"}
    for name, parameter in named_parameters(u):
        parameter.requires_grad_(name in trained)
    before = [p.clone() for p in tensors(w)]
    places = [p.data_ptr() for p in tensors(w)]
    unshare_storage(w, u)
    assert [p.data_ptr() for p in tensors(w)] == places, "w stays where it is"
    assert shared_names(w, u) == set(NAMES) - trained
    for value, p_w, p_u in zip(before, tensors(w), tensors(u), strict=True):
        assert p_w.equal(value) and p_u.equal(value)
    own = dict(named_parameters(u))["0.second.weight"]
    own.data += 1.0
    place = own.data_ptr()
    unshare_storage(w, u)
    assert own.data_ptr() == place, "it has its own already"
    assert dict(named_parameters(w))["0.second.weight"].equal(torch.full((2, 3), 0.5))
    assert own.equal(torch.full((2, 3), 1.5))
    for chunk in w:
        chunk.table += 5.0
    share_storage(w, u)
    for b_w, b_u in zip(tensors(w, "buffers"), tensors(u, "buffers"), strict=True):
        assert b_u.equal(b_w) and b_u.data_ptr() != b_w.data_ptr()
    assert shared_names(w, u) == set(NAMES)
    for value, p_w, p_u in zip(before, tensors(w), tensors(u), strict=True):
        assert p_w.equal(value) and p_u.equal(value), "u is w again, not w u"


def test_a_micro_batch_goes_to_the_model_of_its_role() -> None:
    w, u = ToyChunk(), ToyChunk()
    both = TwinModel(w, u, lambda model, batch: (model, batch))  # type: ignore[arg-type, return-value]
    first, second = torch.zeros(1), torch.ones(1)
    both.set_input_tensor(first)
    assert both(True, "a batch") == (u, "a batch")
    assert w.input is None and u.input is first
    both.set_input_tensor(second)
    assert both(False, "another", last=True) == (w, "another")
    assert u.input is first and w.input is second
    assert both.config is w.config and both.model_type is w.model_type and both.vp_stage == 3
    shared = both.share_embeddings_and_output_weights
    assert shared is w.share_embeddings_and_output_weights


def test_a_model_that_is_no_gpt_may_lack_what_schedules_ask_for() -> None:
    bare: Any = torch.nn.Linear(1, 1)
    bare.config = SimpleNamespace()
    both = TwinModel(bare, bare)
    assert both.model_type is ModelType.encoder_or_decoder and both.vp_stage is None
    assert both.share_embeddings_and_output_weights is False


def test_losses_of_routers_are_scaled_by_the_pass_that_is_under_way() -> None:
    """In its forward and its backward pass, whatever ran between the two."""
    w, u = ToyChunk(), ToyChunk()
    for chunk in (w, u):
        chunk.router = Counter(SimpleNamespace())

    def scale() -> float:
        return float(MoEAuxLossAutoScaler.main_loss_backward_scale)

    def losses(model: Any, batch: float) -> torch.Tensor:
        assert scale() == batch and model.router.enable_expert_bias == (batch > 0)
        return model.first.weight.sum()

    both = TwinModel(w, u, losses)  # type: ignore[arg-type]
    passes = {
        0.25: both(False, 0.25, router_scale=0.25), 0.5: both(True, 0.5, router_scale=0.5),
        0.0: both(False, 0.0),
    }  # fmt: skip
    for chunk in (w, u):
        chunk.first.weight.register_hook(lambda gradient: found.append(scale()))
    found: list[float] = []
    for output in passes.values():
        output.backward()
    assert found == list(passes)
    assert (w.router.enable_expert_bias, u.router.enable_expert_bias) == (False, True)
    with torch.no_grad():
        both(True, 0.5, router_scale=0.5)


def test_each_router_follows_what_its_like_has_chosen() -> None:
    routers = [SimpleNamespace(router_replay=RouterReplay()) for _ in range(3)]
    chosen = [torch.full((2, 1), number) for number in range(3)]
    follow(routers, chosen)
    found = [router.router_replay.target_topk_idx for router in routers]
    assert all(ours is theirs for ours, theirs in zip(found, chosen, strict=True))
    follow(routers, None)
    assert [router.router_replay.target_topk_idx for router in routers] == [None] * 3


def test_us_tokens_go_where_ws_went_on_the_same_batch() -> None:
    """In its forward pass, and in its backward pass, which may compute that again."""
    w, u = ToyChunk(), ToyChunk()
    for chunk in (w, u):
        chunk.router = Counter(SimpleNamespace())
        chunk.router.router_replay = RouterReplay()
    batches = [torch.tensor([0.0]), torch.tensor([1.0]), torch.tensor([2.0])]

    def to_follow(model: Any) -> torch.Tensor | None:
        replay = model.router.router_replay
        follows = replay.router_replay_action is RouterReplayAction.REPLAY_FORWARD
        assert follows or replay.router_replay_action is RouterReplayAction.RECORD
        return replay.target_topk_idx if follows else None

    def losses(model: Any, batch: torch.Tensor) -> torch.Tensor:
        followed.append(to_follow(model))
        if followed[-1] is None:
            model.router.router_replay.record_indices(batch.long())
        return model.first.weight.sum()

    followed: list[Any] = []
    both = TwinModel(w, u, losses)  # type: ignore[arg-type]
    outputs = [both(on_u, batches[n]) for n, on_u in ((0, 0), (0, 1), (1, 0), (2, 1), (1, 1))]
    assert followed == [None, 0, None, None, 1]
    u.first.weight.register_hook(lambda gradient: followed.append(to_follow(u)))
    followed.clear()
    for output in outputs:
        output.backward()
    assert followed == [0, None, 1]


@pytest.mark.parametrize("overlap", [True, False])
def test_reduction_starts_in_the_backward_pass_of_each_models_last(overlap: bool) -> None:
    """And not when that pass is made: with a pipeline, others end between the two."""
    w, u = ToyChunk(), ToyChunk()
    for chunk in (w, u):
        chunk.ddp_config.overlap_grad_reduce = overlap
        chunk.bucket_groups = [SimpleNamespace(is_last_microbatch=True) for _ in range(2)]
        chunk.expert_parallel_bucket_groups = [SimpleNamespace(is_last_microbatch=True)]

    def reducing() -> list[bool]:
        marks = [
            {g.is_last_microbatch for g in c.bucket_groups + c.expert_parallel_bucket_groups}
            for c in (w, u)
        ]
        assert all(len(mark) == 1 for mark in marks)
        return [mark.pop() for mark in marks]

    both = TwinModel(w, u, lambda model, batch: model.first.weight.sum() * batch)  # type: ignore[arg-type]
    both.hold_reduction()
    assert reducing() == ([False, False] if overlap else [True, True])
    passes = [both(True, 2.0), both(False, 2.0), both(True, 3.0, last=True), both(False, 3.0)]
    last_of_w = both(False, 4.0, last=True)
    for each in passes[:2]:
        each.backward()
    assert reducing() == ([False, False] if overlap else [True, True])
    passes[2].backward()
    assert reducing() == ([False, True] if overlap else [True, True])
    passes[3].backward()
    assert reducing() == ([False, True] if overlap else [True, True])
    last_of_w.backward()
    assert reducing() == [True, True]
    both.hold_reduction()
    assert reducing() == ([False, False] if overlap else [True, True])
    with torch.no_grad():
        both(True, 1.0, last=True)


def test_gradients_of_w_and_then_of_u_are_finalized(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple] = []
    monkeypatch.setattr(
        twin, "finalize_model_grads", lambda *args, **kwargs: calls.append((*args, kwargs))
    )
    chunks = [ToyChunk() for _ in range(4)]
    w, u = chunks[:2], chunks[2:]
    apart: list[Any] = [TwinModel(a, b) for a, b in zip(w, u, strict=True)]  # type: ignore[arg-type]
    options = {"force_all_reduce": True, "pg_collection": "groups"}
    finalize_twin_grads(apart, torch.tensor(99), **options)
    assert calls == [(w, None, options), (u, None, options)]
    calls.clear()
    finalize_twin_grads([TwinModel(a, a) for a in w], None)  # type: ignore[arg-type]
    assert calls == [(w, None, {})], "w alone once: twice would reduce its sums again"
