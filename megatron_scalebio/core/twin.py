"""The two models of the bilevel problem, w and u, behind one module for Megatron's schedules.

A bilevel step has three kinds of micro-batch (`Role`). `TwinModel` hands each to w or u by its
role, so that all go through one `forward_backward_func` call: the pipeline fills and drains once.

    schedule ──▶ TwinModel ──role──▶ w (Megatron DDP ▸ Float16Module ▸ GPTModel)
                            └──────▶ u (the same)

u is built on w's storage, parameter by parameter; a parameter gets its own storage when it first
trains (copy on write), so u costs only the layers that were ever active.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import unwrap_model
from torch.nn.modules.module import register_module_parameter_registration_hook

from megatron_scalebio.compat import fp8_state
from megatron_scalebio.compat.routing_replay import Choices
from megatron_scalebio.compat.transformer_engine import share_copies
from megatron_scalebio.core import experts, low_bits
from megatron_scalebio.core.batch import Batch, gpt_losses
from megatron_scalebio.core.collectives import device

# Makes a chunk of the model: called with Megatron's `pre_process`, `post_process` and `vp_stage`.
ModelProvider = Callable[..., torch.nn.Module]


def build_chunks(provider: ModelProvider, groups: ProcessGroupCollection) -> list[torch.nn.Module]:
    """This rank's chunks of a model (one, or one per virtual stage), on its device, in its dtype.

    As Megatron-LM makes them, but for DDP, which a `Period` adds.
    """
    virtual = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    chunks = []
    for number in range(virtual or 1):
        chunk = provider(
            pre_process=groups.pp.rank() == 0 and number == 0,
            post_process=groups.pp.rank() == groups.pp.size() - 1 and number == (virtual or 1) - 1,
            vp_stage=number if virtual else None,
        )
        config = unwrap_model(chunk).config
        chunk = chunk.to(device())
        half = config.bf16 and not isinstance(chunk, Float16Module)
        chunks.append(Float16Module(config, chunk) if half else chunk)
    experts.prepare(chunks)
    return chunks


def build_twins(
    provider: ModelProvider, groups: ProcessGroupCollection
) -> tuple[list[torch.nn.Module], list[torch.nn.Module]]:
    """This rank's chunks of w, and of u on w's storage, at the memory of one model.

    Both are built by the same code, which makes parameters in the same order: each of u's is given
    w's storage as soon as it is made, so one at a time has its own. Buffers are each model's own.
    """
    made: list[weakref.ref[torch.nn.Parameter]] = []  # some may be replaced while w is built
    with _each_new_parameter(lambda parameter: made.append(weakref.ref(parameter))):
        w = build_chunks(provider, groups)
    of_w = iter(made)

    def take_storage(parameter: torch.nn.Parameter) -> None:
        its_like = next(of_w)()
        if its_like is not None:
            parameter.data = its_like.data

    with _each_new_parameter(take_storage):
        u = build_chunks(provider, groups)
    assert all(
        p_u.shape == p_w.shape and p_u.untyped_storage()._cdata == p_w.untyped_storage()._cdata
        for (_, p_w), (_, p_u) in zip(named_parameters(w), named_parameters(u), strict=True)
    )
    return w, u


@contextmanager
def _each_new_parameter(seen: Callable[[torch.nn.Parameter], None]) -> Iterator[None]:
    """Calls `seen` with every parameter that a module is given within."""

    def hook(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        if parameter is not None:
            seen(parameter)

    handle = register_module_parameter_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class TwinModel(torch.nn.Module):
    """One pipeline chunk of w and of u (or of w alone, which is then both).

    Carries the attributes that Megatron's schedules look up on a model. Its parameters are those of
    `w` and `u`, its children. It lasts as long as its period.

    Args:
        losses: the forward pass of a batch through a model, `gpt_losses` or like it.
    """

    def __init__(
        self,
        w: DistributedDataParallel,
        u: DistributedDataParallel,
        losses: Callable[[torch.nn.Module, Any], torch.Tensor] = gpt_losses,
    ) -> None:
        super().__init__()
        gpt: Any = unwrap_model(w)
        self.w, self.u = w, u
        self._losses = losses
        self.config: TransformerConfig = gpt.config
        # What Megatron's schedules ask of a model; those that are no GPTModel may lack it.
        self.model_type = getattr(gpt, "model_type", ModelType.encoder_or_decoder)
        self.share_embeddings_and_output_weights = getattr(
            gpt, "share_embeddings_and_output_weights", False
        )
        self.vp_stage = getattr(gpt, "vp_stage", None)
        self._input: torch.Tensor | None = None
        self._period = object()  # a twin lives as long
        self._moved = True
        self._routers = {True: list(experts.routers([u])), False: list(experts.routers([w]))}
        self._choices = Choices()
        self._one_copy: list[tuple[Any, Any]] | None = None  # modules of w and of u
        self._unclaimed = False

    def set_input_tensor(self, tensor: Any) -> None:
        self._input = tensor

    def set_is_first_microbatch(self) -> None:
        """Has Transformer Engine make the FP8 copies of both models' weights anew.

        Those of what trains, once it has moved; those of frozen layers when their period begins,
        and under delayed scaling once more: only then is their scale that of these weights.
        """
        if self.config.fp8 is None and self.config.fp4 is None:
            return
        delayed = self.config.fp8 is not None and self.config.fp8_recipe == "delayed"
        if self._one_copy is None:
            self._one_copy = [] if delayed else self._share_copies()
        wanted = 2 if delayed else 1
        for ddp in {id(ddp): ddp for ddp in (self.w, self.u)}.values():
            gpt: Any = unwrap_model(ddp)
            period, made = getattr(gpt, _COPIES_OF, (None, 0))
            made = made if period is self._period else 0
            for module in gpt.modules():
                if hasattr(module, "is_first_microbatch"):
                    moved = self._moved and any(p.requires_grad for p in module.parameters())
                    module.is_first_microbatch |= moved or made < wanted
            setattr(gpt, _COPIES_OF, (self._period, made + 1))
        self._moved = False
        self._unclaimed = bool(self._one_copy)

    def _share_copies(self) -> list[tuple[Any, Any]]:
        """Has frozen layers whose storage u shares with w share their copies; their modules."""
        shared: list[tuple[Any, Any]] = []
        if self.u is self.w:
            return shared
        for of_w, of_u in zip(self.w.modules(), self.u.modules(), strict=True):
            pairs = zip(of_w.parameters(), of_u.parameters(), strict=True)
            equal = all(p_u.data_ptr() == p_w.data_ptr() for p_w, p_u in pairs)
            if hasattr(of_w, "is_first_microbatch") and share_copies(of_w, of_u, equal):
                shared.append((of_w, of_u))
        return shared

    def _claim_copies(self, on_u: bool) -> None:
        """The model that runs first in a flush makes the copies that both share."""
        for pair in self._one_copy or ():
            other, mine = pair if on_u else pair[::-1]
            mine.is_first_microbatch |= other.is_first_microbatch
            other.is_first_microbatch = False
        self._unclaimed = False

    def weights_have_moved(self) -> None:
        """A step has been made: flushes before the next one share their copies."""
        self._moved = True

    def hold_reduction(self) -> None:
        """Before a flush: gradients add up on this rank until the last pass of each model."""
        for ddp in (self.w, self.u):
            _reduce_as_they_come(ddp, False)

    def forward(
        self, on_u: bool, batch: Batch, last: bool = False, router_scale: float = 0.0
    ) -> torch.Tensor:
        """A pass of w or u.

        Args:
            router_scale: of its routers' losses.
            last: the model's last one in this flush. Where reduction overlaps the backward pass,
                the gradients are reduced as this pass completes them.
        """
        if self._unclaimed:
            self._claim_copies(on_u)
        ddp = self.u if on_u else self.w
        gpt: Any = unwrap_model(ddp)
        gpt.set_input_tensor(self._input)
        routers = self._routers[on_u]
        chosen = self._choices.of(batch) if on_u else None
        if routers:
            experts.set_pass(routers, router_scale, chosen)
        output = self._losses(ddp, batch)
        if not on_u:
            self._choices.keep(batch, routers)
        if routers and output.requires_grad:
            output.register_hook(lambda gradient: experts.set_pass(routers, router_scale, chosen))
        if last and ddp.ddp_config.overlap_grad_reduce and output.requires_grad:
            # Not before its backward pass begins: other passes of the pipeline end in between.
            output.register_hook(lambda gradient: _reduce_as_they_come(ddp, True))
        return output


def _reduce_as_they_come(ddp: DistributedDataParallel, reduce: bool) -> None:
    """Whether the backward passes to come start the reduction of the gradients they complete."""
    if ddp.ddp_config.overlap_grad_reduce:
        for group in ddp.bucket_groups + ddp.expert_parallel_bucket_groups:
            group.is_last_microbatch = reduce


# On a GPT chunk: the period for which its weights' FP8 copies were made, and how often.
_COPIES_OF = "_fp8_copies_of"


def forget_weight_copies(chunks: Iterable[torch.nn.Module]) -> None:
    """Has the next flush make all FP8 copies anew.

    For after a pass outside the twin, whose copies lack what a backward pass needs, and after a
    load of other weights.
    """
    for chunk in chunks:
        setattr(unwrap_model(chunk), _COPIES_OF, (None, 0))


def finalize_twin_grads(
    model: list[TwinModel], num_tokens: torch.Tensor | None = None, **kwargs: Any
) -> None:
    """Reduces the gradients of w, then of u. Coefficients are global: no division by tokens."""
    w, u = [twin.w for twin in model], [twin.u for twin in model]
    for chunks in (w,) if u[0] is w[0] else (w, u):
        experts.take_load(chunks)
        finalize_model_grads(chunks, None, **kwargs)


def named_parameters(chunks: Iterable[torch.nn.Module]) -> Iterable[tuple[str, torch.nn.Parameter]]:
    """(chunk-unique name, parameter) of GPT chunks, in an order that w and u share."""
    for number, chunk in enumerate(chunks):
        for name, parameter in unwrap_model(chunk).named_parameters():
            yield f"{number}.{name}", parameter


def share_storage(w: list[torch.nn.Module], u: list[torch.nn.Module]) -> None:
    """Makes u equal to w at no memory: its parameters view w's storage, buffers are copied."""
    for (_, p_w), (_, p_u) in zip(named_parameters(w), named_parameters(u), strict=True):
        p_u.data = p_w.data
    copy_buffers(w, u)


@torch.no_grad()
def copy_buffers(w: list[torch.nn.Module], u: list[torch.nn.Module], share: float = 1.0) -> None:
    """Gives u w's buffers, and a share of its FP8 scales: what a model counts as it runs."""
    for chunk_w, chunk_u in zip(w, u, strict=True):
        for of_w, of_u in zip(chunk_w.buffers(), chunk_u.buffers(), strict=True):
            of_u.copy_(of_w)
        for module_w, module_u in zip(chunk_w.modules(), chunk_u.modules(), strict=True):
            fp8_state.move_scales(module_w, module_u, share)


def unshare_storage(w: list[torch.nn.Module], u: list[torch.nn.Module]) -> None:
    """Gives the trainable parameters of u storage of their own, where they still share w's."""
    for (_, p_w), (_, p_u) in zip(named_parameters(w), named_parameters(u), strict=True):
        if p_u.requires_grad and p_u.data_ptr() == p_w.data_ptr():
            p_u.data = p_u.data.clone()
            low_bits.share(p_w, p_u)
