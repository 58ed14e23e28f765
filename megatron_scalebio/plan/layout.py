"""How a run is laid over devices, and what that decides before anything is built."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_scalebio.config import Config
from megatron_scalebio.core.lisa import active_layers, period_of
from megatron_scalebio.plan.hardware import Gpu

PERIODS_LOOKED_AT = 1000


@dataclass(frozen=True)
class Layout:
    """TP × CP × PP × VPP × DP on devices of one kind; EP of the DP ranks share experts.

    Attributes:
        virtual: chunks per stage, 1 without interleaving.
        train, validation: micro-batches per step and rank; u and w both pass over the former.
    """

    tp: int
    pp: int
    virtual: int
    dp: int
    train: int
    validation: int
    gpu: Gpu
    cp: int = 1
    ep: int = 1

    @classmethod
    def of(cls, config: Config, gpus: int, gpu: Gpu) -> Layout:
        """Raises UserError where the configuration does not fit that many devices."""
        config.validate(gpus)
        parallel, train = config.parallel, config.train
        dp = gpus // parallel.model_parallel_size
        assert train.validation_batch_size is not None
        return cls(
            tp=parallel.tensor_model_parallel_size,
            pp=parallel.pipeline_model_parallel_size,
            virtual=parallel.virtual_chunks(config.model.num_layers) or 1,
            dp=dp,
            train=train.global_batch_size // (train.micro_batch_size * dp),
            validation=train.validation_batch_size // (train.micro_batch_size * dp),
            gpu=gpu,
            cp=parallel.context_parallel_size,
            ep=parallel.expert_model_parallel_size,
        )

    @property
    def world(self) -> int:
        return self.tp * self.cp * self.pp * self.dp

    @property
    def passes(self) -> int:
        """Micro-batches of a flush: u and w on training data, w on validation."""
        return 2 * self.train + self.validation

    @property
    def bubble(self) -> float:
        """Share of a flush in which a stage waits: (p − 1) / (v·n + p − 1), n micro-batches in v
        virtual chunks (Narayanan et al. 2021, section 2.2)."""
        idle = self.pp - 1
        return idle / (self.virtual * self.passes + idle)

    def shortest_flush(self) -> tuple[int, int]:
        """Training and validation micro-batches of a flush that fills the pipeline.

        1F1B holds at most `pp` micro-batches at once, interleaved under 2 · pp of each chunk.
        """
        needed = 3 if self.pp == 1 else self.pp + 1 if self.virtual == 1 else 2 * self.pp
        if self.passes <= needed + 1:
            return self.train, self.validation
        validation = 1 if needed % 2 else 2
        return max(1, (needed - validation) // 2), validation

    def __str__(self) -> str:
        context = f" x CP {self.cp}" if self.cp > 1 else ""
        experts = f" (EP {self.ep})" if self.ep > 1 else ""
        return f"TP {self.tp}{context} x PP {self.pp} x VPP {self.virtual} x DP {self.dp}{experts}"


def draws(config: Config, layout: Layout, most: int = PERIODS_LOOKED_AT) -> list[list[int] | None]:
    """LISA's active layers of the run's first periods, `most` at most."""
    lisa = config.lisa.options()
    last = period_of(config.train.train_iters - 1, lisa)
    return [
        active_layers(
            lisa, config.model.num_layers, layout.pp, layout.virtual, period,
            config.train.seed,
        )
        for period in range(min(last + 1, most))
    ]  # fmt: skip


def stage_layers(config: Config, layout: Layout, stage: int) -> set[int]:
    """Layers (from 0) of a stage: block v · pp + stage of the layers, for each virtual chunk v."""
    per_chunk = config.model.num_layers // (layout.pp * layout.virtual)
    starts = ((v * layout.pp + stage) * per_chunk for v in range(layout.virtual))
    return {layer for start in starts for layer in range(start, start + per_chunk)}


def worst_draw(
    config: Config, layout: Layout, stage: int, drawn: list[list[int] | None]
) -> list[int] | None:
    """The period that costs a stage most: most active layers there, of these most with experts
    where only some have them, then the lowest among them."""
    here, pattern = stage_layers(config, layout, stage), config.model.moe_layer_freq

    def cost(active: list[int] | None) -> tuple[int, int, int]:
        mine = sorted(here & set(active or ()))
        with_experts = sum(pattern[layer] for layer in mine) if pattern else 0
        return len(mine), with_experts, -mine[0] if mine else 0

    return max(drawn, key=cost)


def ever_active(stage_holds: set[int], drawn: list[list[int] | None]) -> set[int]:
    """Layers of a stage that train in some period."""
    return {layer for active in drawn for layer in stage_holds.intersection(active or stage_holds)}
