"""Everything a run holds between steps, built from its configuration and saved as one.

RunState ─ data      sources, validation sets, their samplers
         ├ schedule  rates (and α) of every step
         └ training  the core's `Training` of w, or its `ScaleBiO` of w, u and λ
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_scalebio import runtime
from megatron_scalebio.config import Config, SourceConfig, ValidationConfig
from megatron_scalebio.core.batch import MicroBatch
from megatron_scalebio.core.training import Training
from megatron_scalebio.data.batch import BatchLayout, micro_batches
from megatron_scalebio.data.load_tokenizer import require_ids_of
from megatron_scalebio.data.reuse import Reused, reused
from megatron_scalebio.data.sources import Source, open_sources, shared_vocab_size
from megatron_scalebio.engine.clock import StepClock
from megatron_scalebio.engine.epochs import natural_counts
from megatron_scalebio.engine.schedule import Schedule
from megatron_scalebio.logs.opening import opening
from megatron_scalebio.mixture.sampler import BlendSampler, Ints, Picks, shuffled_index
from megatron_scalebio.model.init import initialize_weights, seed_generators
from megatron_scalebio.model.provider import model_provider
from megatron_scalebio.model.settings import ddp_config, optimizer_config, transformer_config

KEPT_SEED = 2**32  # above the run's: which rows are kept has nothing to do with their order
Record = dict[str, Any]  # of a step: what metrics.jsonl has of it


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
        # One rank looks at all sources and writes down what it saw, then the others read that.
        runtime.on_main(lambda: self._open(cache))
        if not runtime.is_main():
            self._open(cache)
        every = [*self.sources, *self.validation, *self.test]
        self.vocab_size = shared_vocab_size(every, config.model.vocab_size)
        self.tokenizer = next((source.tokenizer for source in every if source.tokenizer), None)
        hf, tokenizer = config.model.hf, self.tokenizer
        if hf and tokenizer:
            runtime.on_main(lambda: require_ids_of(Path(hf), tokenizer))
        for source in every:
            source.vocab_size = self.vocab_size
        weights = np.array([entry.weight for entry in config.data.validation])
        self.shares_V = weights / weights.sum() if len(weights) else weights
        train, seed = config.train, config.train.seed
        assert train.validation_batch_size is not None
        self._whole_S = np.array([len(source) for source in self.sources])
        self.keep(self._whole_S.tolist())
        self.validation_sampler = BlendSampler(
            [len(source) for source in self.validation],
            train.validation_batch_size,
            seed + 1,
            floor_share=0.5,
        )
        parallel = config.parallel
        tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
        multiple = parallel.product_divisor * tp * cp if parallel.low_precision else 8
        interleaved = parallel.num_layers_per_virtual_pipeline_stage is not None
        self.layout = BatchLayout(
            micro_batch_size=train.micro_batch_size,
            dp_rank=runtime.dp_rank(),
            dp_size=runtime.dp_size(),
            pad_multiple=math.lcm(multiple, parallel.length_divisor),
            seq_length=config.data.seq_length,
            fixed_length=interleaved,
            cp_rank=runtime.cp_rank(),
            cp_size=runtime.cp_size(),
            packed=train.packing,
            rows_multiple=runtime.dp_size()
            * (parallel.pipeline_model_parallel_size if interleaved else 1),
        )

    def keep(self, rows_S: list[int]) -> None:
        """Draws from so many rows of each source from now on, chosen by the run's seed."""
        train = self.config.train
        self._keeps_some = rows_S != self._whole_S.tolist()
        self.sampler = BlendSampler(
            rows_S, train.global_batch_size, train.seed, self.config.bilevel.floor_share
        )

    def rows(self, group_B: Ints, index_B: Ints) -> Ints:
        """The rows of sources that numbers of kept ones stand for."""
        if not self._keeps_some:
            return index_B
        seed = self.config.train.seed + KEPT_SEED
        return shuffled_index(index_B, self._whole_S[group_B], group_B, seed)

    def kept(self, picks: Picks) -> Picks:
        """Picks of a sampler of kept rows, as rows of the sources."""
        return replace(picks, index_B=self.rows(picks.group_B, picks.index_B))

    def _open(self, cache: Path) -> None:
        data, first = self.config.data, runtime.is_main()
        entries: list[SourceConfig | ValidationConfig]
        entries = [*data.sources, *data.validation, *data.test]
        with opening(quiet=not first) as on_opened:
            every = iter(open_sources(entries, self.config, cache, on_opened, check=first))
        self.sources, self.validation, self.test = (
            [next(every) for _ in part] for part in (data.sources, data.validation, data.test)
        )

    def next(
        self, probs_S: torch.Tensor, shares_V: torch.Tensor | None = None
    ) -> tuple[list[MicroBatch], list[MicroBatch], Picks, Picks]:
        """This rank's training and validation micro-batches, and the global picks of both.

        Args:
            shares_V: of the validation sets [as configured].
        """
        picks = self.kept(self.sampler.next(probs_S.numpy()))
        valid_picks = self.validation_sampler.next(
            self.shares_V if shares_V is None else shares_V.numpy()
        )
        with runtime.refused_together():
            train = micro_batches(self.sources, picks, self.layout)
            valid = micro_batches(self.validation, valid_picks, self.layout)
        return train, valid, picks, valid_picks

    @cached_property
    def former(self) -> Reused | None:
        """The sources as the run that `data.weights` names has left them."""
        data = self.config.data
        if not data.weights:
            return None
        names, counts = [s.name for s in self.sources], natural_counts(self.sources)
        return reused(Path(data.weights), names, data.new_share, examples_S=counts)

    def initial_weights(self) -> list[float]:
        """The configured weights of the sources, not normalised; equal where none are given."""
        if self.former is not None:
            return self.former.weights
        given = [source.initial_weight for source in self.config.data.sources]
        return [1.0 if weight is None else weight for weight in given]


class RunState:
    """The state of a run on this rank.

    Args:
        stage: the command; a checkpoint resumes under the same alone.
        cache: folder for the sample indices of packed sources.
    """

    training: Training

    def __init__(self, config: Config, stage: str, cache: Path) -> None:
        self.config, self.stage = config, stage
        self.cost = TokenCost()
        self.changes: list[str] = []
        self.clock = StepClock()
        self.data = Data(config, cache)
        config.train.resolve_epochs(sum(len(source) for source in self.data.sources))
        self.schedule = Schedule(config)
        self.megatron = transformer_config(config)
        seed_generators(config.train.seed)
        self.training = self._training()
        if not (config.model.pretrained_checkpoint or config.model.hf):
            initialize_weights(
                self.training.w,
                config.train.seed,
                config.model.init_method_std,
                config.model.num_layers,
            )

    def _training(self) -> Training:
        """Of w alone."""
        return Training(**self.training_options())

    def training_options(self) -> dict[str, Any]:
        """What every `Training` is made with, from the configuration."""
        config = self.config
        return {
            "model_provider": model_provider(config, self.megatron, self.data.vocab_size),
            "ddp": ddp_config(config),
            "optimizer": optimizer_config(config),
            "lisa": config.lisa.options(),
            "seed": config.train.seed,
            "observe": self.clock,
        }

    @property
    def step(self) -> int:
        """Steps made, applied or not."""
        return self.training.steps

    def make_step(self) -> Record:
        """One step of all ranks; its record, but for times. Each kind of run has its own."""
        raise NotImplementedError

    def evaluate(self, record: Record, job: Any) -> None:
        """Looks at the models after a step, where it is time to, and adds what it found.

        Args:
            job: the run's `Job`.
        """

    def converged(self) -> bool:
        """Whether the run may end before its last step. Rank 0 is asked."""
        return False

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
            **self.training.common_state(),
            "stage": self.stage,
            "settings": self.settings(),
            "changes": self.changes,
            "cost": asdict(self.cost),
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
        self.training.load_common_state(state)
        self.cost = TokenCost(**state["cost"])
        self.changes = list(state.get("changes", []))  # earlier versions did not keep them
        self.data.sampler.load_state_dict(state["sampler"])
        self.data.validation_sampler.load_state_dict(state["validation_sampler"])
