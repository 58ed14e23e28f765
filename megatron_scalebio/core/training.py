"""Models in training: w alone, or w and u, through the periods of LISA and the resets of u.

    enter_period ─▶ flush ─▶ losses, reduced gradients ─▶ finite? no spike? ─no─▶ nothing moves
                                                                             └yes▶ AdamW of w, of u

Whether a step is applied is rank 0's decision: the numbers it goes by are reduced and so equal on
all ranks, but for a last bit where their processors differ.
"""

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.safe_globals import register_safe_globals
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import unwrap_model

from megatron_scalebio.core import experts, low_bits
from megatron_scalebio.core import lisa as lisa_layers
from megatron_scalebio.core import state as states
from megatron_scalebio.core.batch import gpt_losses
from megatron_scalebio.core.collectives import of_first_rank, require_megatrons
from megatron_scalebio.core.flush import Losses, Observer, Pass, flush, reduce_losses, unobserved
from megatron_scalebio.core.options import WHOLE_RESETS, LisaOptions
from megatron_scalebio.core.period import Period, prepare_gradients, step_with
from megatron_scalebio.core.right_losses import require_right_losses
from megatron_scalebio.core.spikes import SpikeGuard
from megatron_scalebio.core.twin import (
    ModelProvider,
    build_chunks,
    build_twins,
    copy_buffers,
    named_parameters,
    share_storage,
)


@dataclass(frozen=True)
class Update:
    """What an update did.

    Attributes:
        norms: norm of the gradient of "w" (and "u"), before clipping.
        skipped: why nothing was applied; None where it was.
    """

    norms: Mapping[str, float]
    skipped: str | None


class Training:
    """This rank's part of the models of a run, and their optimizers while a period lasts.

    Args:
        model_provider: makes a chunk of the model; called for w and, where both train, for u. Its
            configuration needs `calculate_per_token_loss`, bf16 or fp32, and no loss but that of
            the labels.
        ddp, optimizer: Megatron's configurations, of w and u alike; no `check_for_nan_in_grad`.
        with_u: u trains beside w.
        lisa: layers are drawn for each period; None: all train always.
        resync_interval, memory_growth: as of `BilevelOptions`.
        seed: of LISA's draws.
        losses: the forward pass of a batch, on the last stage the loss of each label [B, S].
        set_trainable: sets requires_grad for a period, as `lisa.set_trainable` for a GPTModel does.
        observe: is entered with the name of each part of a step while it lasts: "period", "flush",
            "forward" (within it, for each pass), "update".
        pg_collection: Megatron's process groups, with the ranks of parallel_state's [the latter].

    Attributes:
        w, u: chunks of the models; u is None where w trains alone.
        steps: steps made, applied or not.
        skipped_in_a_row: of the last steps, those not applied.
        period: None before the first step and after `leave_period`.
        active_layers: indices of the layers that train in it, over the whole model; None: all.
        u_is_w: u was reset to w before this step.

    Raises:
        ValueError: if the model's configuration is not one that a step is right for.
    """

    def __init__(
        self,
        model_provider: ModelProvider,
        ddp: DistributedDataParallelConfig,
        optimizer: OptimizerConfig,
        *,
        with_u: bool = False,
        lisa: LisaOptions | None = None,
        resync_interval: int | None = None,
        memory_growth: float = 0.0,
        seed: int = 1234,
        losses: Callable[[torch.nn.Module, Any], torch.Tensor] = gpt_losses,
        set_trainable: Callable[..., None] = lisa_layers.set_trainable,
        observe: Observer = unobserved,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        self._ddp, self._optimizer, self._pg_collection = ddp, optimizer, pg_collection
        if pg_collection is not None:
            require_megatrons(pg_collection)
        self.groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        self.lisa, self._resync_interval, self._seed = lisa, resync_interval, seed
        self._memory_growth = memory_growth
        self._losses, self._set_trainable, self.observe = losses, set_trainable, observe
        self.u: list[torch.nn.Module] | None = None
        if with_u:
            self.w, self.u = build_twins(model_provider, self.groups)
        else:
            self.w = build_chunks(model_provider, self.groups)
        require_right_losses(self.model_config, ddp)
        if lisa is not None and lisa.layers > self.model_config.num_layers:
            raise ValueError(f"lisa.layers is {lisa.layers} of {self.model_config.num_layers}")
        self.steps = self.skipped_in_a_row = 0
        self.spikes = SpikeGuard()
        self.u_is_w = False
        self.period_number: int | None = None
        self.period: Period | None = None
        self.active_layers: list[int] | None = None

    @property
    def models(self) -> dict[str, list[torch.nn.Module]]:
        """The chunks of each model, by "w" and "u"."""
        return {"w": self.w} if self.u is None else {"w": self.w, "u": self.u}

    @property
    def model_config(self) -> TransformerConfig:
        return unwrap_model(self.w[0]).config

    def enter_period(self, resuming: bool = False) -> Period:
        """The period of the current step; a new one is built when LISA draws new layers.

        Args:
            resuming: u has just been loaded and is not reset to w.
        """
        number = lisa_layers.period_of(self.steps, self.lisa)
        self.u_is_w = False
        if self.period is None or number != self.period_number:
            self.leave_period()
            if self.u and self._resync_interval is not None and not resuming:
                share_storage(self.w, self.u)
                self.u_is_w = True
            elif self.u and self.steps == 0:  # w may have been loaded since both were built
                copy_buffers(self.w, self.u)
            self._freeze(number)
            if self.u and not resuming:
                self._dither()
            self.period = Period(
                self._ddp, self._optimizer, self.w, self.u, self._losses, self._pg_collection
            )
            self.period_number = number
        elif self._resync_is_due():
            self.period.resync(1.0 / self.memory)
            self.u_is_w = self.memory == 1.0
        return self.period

    def _resync_is_due(self) -> bool:
        """Without LISA; with it, every new period starts from u = w."""
        interval = self._resync_interval
        if self.u is None or interval is None or self.lisa is not None:
            return False
        return self.steps % interval == 0

    @property
    def memory(self) -> float:
        """For how long u's departure from w is remembered now, in `resync_interval`s."""
        interval = self._resync_interval
        if interval is None or self.lisa is not None:
            return 1.0
        return 1.0 + self._memory_growth * max(0.0, self.steps / interval - WHOLE_RESETS)

    @property
    def whole_resets_end(self) -> int:
        """The step from which memory grows, if it does so in this run; else 0."""
        if self._resync_interval is None or not self._memory_growth or self.lisa is not None:
            return 0
        return WHOLE_RESETS * self._resync_interval

    def leave_period(self) -> None:
        """Frees what lasts no longer than a period: gradient buffers, masters, Adam's moments.

        Under LISA layers train again, from the masters they had. u's are reset to w's by then.
        """
        if self.period is not None:
            models = {"w"} if self._resync_interval is not None else set(self.models)
            self.period.close(going_on=models if self.lisa is not None else ())
            self.period = self.period_number = None
            gc.collect()  # DDP's hooks and buffers form cycles; their memory is wanted now

    def _freeze(self, period: int) -> None:
        self.active_layers = lisa_layers.active_layers(
            self.lisa,
            self.model_config.num_layers,
            self.groups.pp.size(),
            parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
            period,
            self._seed,
        )
        for chunks in self.models.values():
            self._set_trainable(chunks, self.active_layers, self.lisa)

    def _dither(self) -> None:
        """Before w and u part: a difference below a bf16 step has to show in their losses."""
        for chunks in self.models.values():
            for _, parameter in named_parameters(chunks):
                if parameter.requires_grad and parameter.dtype is torch.bfloat16:
                    low_bits.dither(parameter, self._seed, self.sharing_group(parameter))

    def flush_takes(self, passes: int) -> bool:
        """Whether one flush may have so many micro-batches: interleaved pipelines are choosy."""
        interleaved = parallel_state.get_virtual_pipeline_model_parallel_world_size() is not None
        return not interleaved or passes % self.groups.pp.size() == 0

    def flush(self, passes: Sequence[Pass], num_sources: int, num_validation: int = 0) -> Losses:
        """Adds the gradients of all passes to the period's; their losses. A collective."""
        assert self.period is not None
        records = flush(self.period.twins, passes, self.groups, self.observe)
        return reduce_losses(records, passes, num_sources, num_validation, self.groups)

    def update(
        self,
        losses: Losses,
        watched: Mapping[str, float],
        rates: Mapping[str, float],
        learned: Sequence[torch.Tensor] = (),
        learn: Callable[[], None] = lambda: None,
    ) -> Update:
        """Steps the models, all or none, and counts the step. A collective.

        Args:
            watched: losses in which a spike shows, by the names of `spikes.WATCHED`.
            rates: learning rate of "w" (and "u").
            learned, learn: what else moves in a step that is applied, float64 on the CPU, and what
                moves it, in place; all ranks then hold rank 0's.
        """
        assert self.period is not None
        optimizers = self.period.optimizers
        norms = {name: prepare_gradients(optimizer) for name, optimizer in optimizers.items()}
        skipped = losses.culprit or self._spike(norms, watched)
        if self._agreed(skipped is None, learned, learn):
            skipped = None
            for name, optimizer in optimizers.items():
                step_with(optimizer, rates[name])
                experts.move_biases(self.models[name], self.groups)
            for twin in self.period.twins:
                twin.weights_have_moved()
        else:
            skipped = skipped or "rank 0 refused the step"
        for chunks in self.models.values():
            experts.forget_load(chunks)
        self.steps += 1
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        return Update(norms, skipped)

    def _spike(self, norms: Mapping[str, float], watched: Mapping[str, float]) -> str | None:
        for name, norm in norms.items():
            if not math.isfinite(norm):
                return f"{name}: gradient norm is {norm}"
        of_norms = {f"{name}: gradient norm": norm for name, norm in norms.items()}
        return self.spikes.judge({**watched, **of_norms})

    @torch.no_grad()
    def _agreed(
        self, sound: bool, learned: Sequence[torch.Tensor], learn: Callable[[], None]
    ) -> bool:
        """Whether rank 0 applies the step, and what it has learned, in one broadcast."""
        first = dist.get_rank() == 0
        if first and sound:
            learn()
        flag = torch.tensor([float(sound)])
        applied, *states = of_first_rank(torch.cat([flag, *learned])).split(
            [1, *(len(each) for each in learned)]
        )
        if applied and not first:
            learn()
        for each, state in zip(learned, states, strict=True):
            each.copy_(state)
        return bool(applied)

    def common_state(self) -> dict[str, Any]:
        """What is equal on all ranks: counts of steps, what the spike guard has seen."""
        return {
            "step": self.steps,
            "skipped_in_a_row": self.skipped_in_a_row,
            "spikes": self.spikes.state_dict(),
        }

    def load_common_state(self, common: Mapping[str, Any]) -> None:
        self.steps = common["step"]
        self.skipped_in_a_row = common["skipped_in_a_row"]
        self.spikes.load_state_dict(common.get("spikes", {}))

    def sharded_state_dict(self, loading: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """All state, to be saved or loaded by Megatron's dist_checkpointing. A collective.

        w's part is an ordinary Megatron-LM checkpoint. Generators of random numbers (dropout) are
        the caller's, as with Megatron's own models.

        Args:
            loading: the checkpoint's common state (`load_common_state_dict`), where the result is
                to be loaded into; `load_state_dict` takes what comes of it.

        Raises:
            ValueError: if the checkpoint is of other sources.
        """
        if loading is None:
            return self._state_to_save()
        common = loading["scalebio"]
        for name, ours in self.made_for().items():
            if common.get(name) != ours:
                raise ValueError(f"the checkpoint is of {name} {common.get(name)}, not {ours}")
        self.leave_period()  # left later, it would write into what is loaded
        self.load_common_state(common)
        wanted = states.model_state_to_load(self.w, common.get("w", ()))
        if self.u is not None:
            share_storage(self.w, self.u)  # but for what the checkpoint has of u
            wanted["u"] = states.state_of_u_to_load(self.u, common["u"])
        wanted |= states.low_bits_to_load(self.models, common.get("low_bits", ()))
        if common["period"] == lisa_layers.period_of(self.steps, self.lisa):
            period = self.enter_period(resuming=True)
            wanted |= states.optimizer_states(self.models, period, is_loading=True)
        register_safe_globals()
        return wanted

    def made_for(self) -> dict[str, Any]:
        """What a checkpoint has to have been made for, too."""
        return {}

    def _state_to_save(self) -> dict[str, Any]:
        common: dict[str, Any] = {**self.made_for(), **self.common_state(), "period": None}
        self.make_savable()
        whole = states.model_state(self.w)
        common["w"] = states.of_all_ranks(states.keys_of(whole))
        if self.u is not None:
            whole["u"] = states.state_of_u(self.w, self.u)
            common["u"] = states.of_all_ranks(states.keys_of(whole["u"]))
        bits = states.low_bits_state(self.models, self.sharing_group)
        common["low_bits"] = states.of_all_ranks(
            [k for x in bits.values() for k in states.keys_of(x)]
        )
        whole |= bits
        if self.saves_period:
            assert self.period is not None
            common["period"] = self.period_number
            whole |= states.optimizer_states(self.models, self.period)
        return {**whole, "scalebio": common}

    def make_savable(self) -> None:
        """For saving: makes weights whole, or leaves a period that is over. A collective."""
        if self.period is not None and self.saves_period:
            self.period.gather_parameters()
        else:
            self.leave_period()

    @property
    def sharing_group(self) -> low_bits.SharingGroup:
        return low_bits.sharing_group(self._ddp, self.groups)

    @property
    def saves_period(self) -> bool:
        """Whether the next step goes on in the present period, whose optimizers it then needs."""
        return self.period_number == lisa_layers.period_of(self.steps, self.lisa)

    def load_state_dict(self, loaded: Mapping[str, Any]) -> None:
        """Takes what was loaded for `sharded_state_dict(loading=...)`.

        Raises:
            UserError: if FP8 state names anything but tensors and recipes.
        """
        states.load_models(self.w, loaded)
        if self.u is not None:
            states.load_models(self.u, loaded["u"], strict=False)
        states.load_low_bits(self.models, loaded, self.sharing_group)
        if self.period is not None:
            states.load_optimizers(self.period, loaded)
