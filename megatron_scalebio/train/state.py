"""Everything a run holds between steps, built from its configuration and saved as one.

RunState   ─ data    sources, validation sets, their samplers
           └ models  w (and u) chunks of this rank, and the period's DDP and optimizers
TrainState ─ mixture λ with its trajectory: what `reweight` has besides
"""

from __future__ import annotations

import gc
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_scalebio import runtime
from megatron_scalebio.bilevel.mixture import Mixture
from megatron_scalebio.bilevel.schedule import Schedule
from megatron_scalebio.bilevel.spikes import SpikeGuard
from megatron_scalebio.config import Config
from megatron_scalebio.data.batch import BatchLayout, MicroBatch, micro_batches
from megatron_scalebio.data.blend import BlendSampler, Picks
from megatron_scalebio.data.sources import Source, open_sources, shared_vocab_size
from megatron_scalebio.errors import UserError
from megatron_scalebio.model.init import initialize_weights
from megatron_scalebio.model.provider import build_model, transformer_config
from megatron_scalebio.model.twin import build_twins, share_storage
from megatron_scalebio.optim.builder import Period
from megatron_scalebio.optim.lisa import active_layers, period_of, set_trainable
from megatron_scalebio.sample.inputs import read_weights

# Options of the bilevel section that judge or write what was learned.
_JUDGING = {
    "preset", "average_fraction", "confidence", "tolerance", "early_stop", "blend_floor",
}  # fmt: skip


@dataclass
class TokenCost:
    """Real tokens that went through a model of the run's size, in all ranks together.

    Attributes:
        trained: forward and backward; what LISA and recomputation save or add is left out.
        scored: forward alone.
    """

    trained: int = 0
    scored: int = 0

    def __add__(self, other: TokenCost) -> TokenCost:
        return TokenCost(self.trained + other.trained, self.scored + other.scored)


class Data:
    """Sources, validation sets and the samplers that draw from them."""

    def __init__(self, config: Config, cache: Path) -> None:
        self.config = config
        self.sources: list[Source] = []
        self.validation: list[Source] = []
        self.test: list[Source] = []
        # One rank writes the sample indices of packed sources, then the others read them.
        runtime.on_main(lambda: self._open(cache))
        if not runtime.is_main():
            self._open(cache)
        every = [*self.sources, *self.validation, *self.test]
        self.vocab_size = shared_vocab_size(every, config.model.vocab_size)
        self.tokenizer = next((source.tokenizer for source in every if source.tokenizer), None)
        for source in every:
            source.vocab_size = self.vocab_size
        weights = np.array([entry.weight for entry in config.data.validation])
        self.shares_V = weights / weights.sum() if len(weights) else weights
        train, seed = config.train, config.train.seed
        assert train.validation_batch_size is not None
        self.sampler = BlendSampler(
            [len(source) for source in self.sources],
            train.global_batch_size,
            seed,
            config.bilevel.floor_share,
        )
        self.validation_sampler = BlendSampler(
            [len(source) for source in self.validation],
            train.validation_batch_size,
            seed + 1,
            floor_share=0.5,
        )
        parallel = config.parallel
        tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
        multiple = 16 * tp * cp if parallel.fp8_format else 8
        self.layout = BatchLayout(
            micro_batch_size=train.micro_batch_size,
            dp_rank=runtime.dp_rank(),
            dp_size=runtime.dp_size(),
            pad_multiple=math.lcm(multiple, parallel.length_divisor),
            seq_length=config.data.seq_length,
            fixed_length=parallel.num_layers_per_virtual_pipeline_stage is not None,
            cp_rank=runtime.cp_rank(),
            cp_size=runtime.cp_size(),
        )

    def _open(self, cache: Path) -> None:
        data = self.config.data
        self.sources = open_sources(data.sources, self.config, cache)
        self.validation = open_sources(data.validation, self.config, cache)
        self.test = open_sources(data.test, self.config, cache)

    def next(
        self, probs_S: torch.Tensor
    ) -> tuple[list[MicroBatch], list[MicroBatch], Picks, Picks]:
        """This rank's training and validation micro-batches, and the global picks of both."""
        picks = self.sampler.next(probs_S.numpy())
        valid_picks = self.validation_sampler.next(self.shares_V)
        mean = self.config.data.loss_mean
        with runtime.refused_together():
            train = micro_batches(self.sources, picks, self.layout, mean)
            valid = micro_batches(self.validation, valid_picks, self.layout, mean)
        return train, valid, picks, valid_picks

    def initial_weights(self) -> list[float]:
        """The configured weights of the sources, not normalised; equal where none are given."""
        data = self.config.data
        if data.weights:
            return weights_by_name(Path(data.weights), [source.name for source in self.sources])
        return [1.0 if s.initial_weight is None else s.initial_weight for s in data.sources]


def weights_by_name(path: Path, names: list[str]) -> list[float]:
    """The weights of the named sources in a run's weights.json (or in its folder).

    Raises:
        UserError: if it is of other sources.
    """
    weights = read_weights(path / "weights.json" if path.is_dir() else path)
    if set(weights) != set(names):
        raise UserError(
            f"holds weights of {sorted(weights)}, data.sources are {sorted(names)}",
            where=str(path), mend="give the weights that were learned for these sources",
        )  # fmt: skip
    return [weights[name][0] for name in names]


class RunState:
    """The state of a run on this rank: w, and u where the stage trains both.

    Args:
        stage: the command; a checkpoint resumes under the same alone.
        cache: folder for the sample indices of packed sources.
    """

    def __init__(self, config: Config, stage: str, cache: Path, with_u: bool) -> None:
        self.config, self.stage = config, stage
        self.step = 0
        self.skipped_in_a_row = 0
        self.cost = TokenCost()
        self.spikes = SpikeGuard()
        self.data = Data(config, cache)
        config.train.resolve_epochs(sum(len(source) for source in self.data.sources))
        self.schedule = Schedule(config)
        self.megatron = transformer_config(config)
        if with_u:
            self.w, self.u = build_twins(config, self.megatron, self.data.vocab_size)
            self.models = {"w": self.w, "u": self.u}
        else:
            self.w = build_model(config, self.megatron, self.data.vocab_size)
            self.models = {"w": self.w}
        if not (config.model.pretrained_checkpoint or config.model.hf):
            initialize_weights(
                self.w, config.train.seed, config.model.init_method_std, config.model.num_layers
            )
        self.u_is_w = False  # at this step, after `enter_period`
        self.period_number: int | None = None
        self.period: Period | None = None
        self.active_layers: list[int] | None = None

    def enter_period(self, resuming: bool = False) -> Period:
        """The period of the current step; a new one is built when LISA draws new layers.

        Args:
            resuming: the period is gone on with: u, just loaded, is not reset to w.
        """
        number = period_of(self.step, self.config.lisa)
        self.u_is_w = False
        if self.period is None or number != self.period_number:
            self.leave_period()
            resync = self.config.bilevel.resync_interval is not None and not resuming
            if "u" in self.models and resync:
                share_storage(self.w, self.models["u"])
                self.u_is_w = True
            self._set_trainable(number)
            self.period = Period(self.config, self.megatron, **self.models)
            self.period_number = number
        elif self._resync_is_due():
            self.period.resync()
            self.u_is_w = True
        return self.period

    def flush_takes(self, passes: int) -> bool:
        """Whether one flush may have so many micro-batches: interleaved pipelines are choosy."""
        parallel = self.config.parallel
        interleaved = parallel.num_layers_per_virtual_pipeline_stage is not None
        return not interleaved or passes % parallel.pipeline_model_parallel_size == 0

    def _resync_is_due(self) -> bool:
        """Without LISA; with it, every new period starts from u = w."""
        interval = self.config.bilevel.resync_interval
        if "u" not in self.models or interval is None or self.config.lisa.lisa_layers is not None:
            return False
        return self.step % interval == 0

    def leave_period(self) -> None:
        if self.period is not None:
            self.period.close()
            self.period = None
            gc.collect()  # DDP's hooks and buffers form cycles; their memory is wanted now

    def _set_trainable(self, period: int) -> None:
        config = self.config
        self.active_layers = active_layers(
            config.lisa,
            config.model.num_layers,
            config.parallel.pipeline_model_parallel_size,
            config.parallel.virtual_chunks(config.model.num_layers) or 1,
            period,
            config.train.seed,
        )
        for chunks in self.models.values():
            set_trainable(chunks, self.active_layers, config.lisa)

    def settings(self) -> dict[str, Any]:
        """The options that decide the steps to come, besides data, model and layout, by field."""
        config = self.config
        sections = {
            "optimizer": asdict(config.optimizer), "lisa": asdict(config.lisa),
            "train": {
                name: getattr(config.train, name)
                for name in ("seed", "global_batch_size", "validation_batch_size")
            },
            "data": {"seq_length": config.data.seq_length, "loss_mean": config.data.loss_mean},
        }  # fmt: skip
        return {f"{name}.{k}": v for name, section in sections.items() for k, v in section.items()}

    def common_state(self) -> dict[str, Any]:
        """What is equal on all ranks: step and samplers."""
        return {
            "stage": self.stage,
            "settings": self.settings(),
            "step": self.step,
            "skipped_in_a_row": self.skipped_in_a_row,
            "cost": asdict(self.cost),
            "spikes": self.spikes.state_dict(),
            "sampler": self.data.sampler.state_dict(),
            "validation_sampler": self.data.validation_sampler.state_dict(),
            "sources": [[source.name, source.fingerprint] for source in self.data.sources],
            "validation": [
                [source.name, source.fingerprint, share]
                for source, share in zip(
                    self.data.validation, self.data.shares_V.tolist(), strict=True
                )
            ],
        }

    def load_common_state(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.skipped_in_a_row = state["skipped_in_a_row"]
        self.cost = TokenCost(**state["cost"])
        self.spikes.load_state_dict(state.get("spikes", {}))
        self.data.sampler.load_state_dict(state["sampler"])
        self.data.validation_sampler.load_state_dict(state["validation_sampler"])


class TrainState(RunState):
    """The state of a `reweight` run on this rank."""

    def __init__(self, config: Config, cache: Path) -> None:
        super().__init__(config, "reweight", cache, with_u=True)
        self.mixture = Mixture(self.data.initial_weights(), config.bilevel.mixture_optimizer)

    def settings(self) -> dict[str, Any]:
        bilevel = asdict(self.config.bilevel)
        return {
            **super().settings(),
            **{f"bilevel.{k}": v for k, v in bilevel.items() if k not in _JUDGING},
        }

    def common_state(self) -> dict[str, Any]:
        return {**super().common_state(), "mixture": self.mixture.state_dict()}

    def load_common_state(self, state: dict[str, Any]) -> None:
        super().load_common_state(state)
        self.mixture.load_state_dict(state["mixture"])
