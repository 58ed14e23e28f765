"""Every option of a run, in typed sections that refuse bad values by field, value and mend.

Parallelism, batch, tokenizer, checkpoint and logging options carry Megatron-LM's flag names.
`config_loader` fills these classes from defaults < YAML file < command-line flags.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from megatron_scalebio.config.baseline import BaselineConfig
from megatron_scalebio.config.checks import refuse
from megatron_scalebio.config.data import DataConfig, SourceConfig, ValidationConfig
from megatron_scalebio.config.model import ModelConfig
from megatron_scalebio.config.parallel import ParallelConfig
from megatron_scalebio.config.training import (
    BilevelConfig,
    CheckpointConfig,
    LisaConfig,
    LoggingConfig,
    OptimizerConfig,
    TrainConfig,
)

__all__ = [
    "SECTIONS", "BaselineConfig", "BilevelConfig", "CheckpointConfig", "Config", "DataConfig",
    "LisaConfig", "LoggingConfig", "ModelConfig", "OptimizerConfig", "ParallelConfig",
    "SourceConfig", "TrainConfig", "ValidationConfig",
]  # fmt: skip


@dataclass
class Config:
    """A whole run: the sections of the YAML file."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    bilevel: BilevelConfig = field(default_factory=BilevelConfig)
    baseline: BaselineConfig = field(default_factory=BaselineConfig)
    lisa: LisaConfig = field(default_factory=LisaConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def validate(self, world_size: int) -> None:
        """Checks what several fields and the number of ranks decide together, for `reweight`.

        Raises:
            UserError: naming the field, its value and the mend.
        """
        if len(self.data.sources) < 2:
            raise refuse(
                "data.sources", [source.name for source in self.data.sources],
                "a mixture needs at least two sources", "add sources",
            )  # fmt: skip
        if not self.data.validation:
            raise refuse("data.validation", [], "is empty", "name the validation set you aim at")
        if self.parallel.overlap_param_gather:
            raise refuse(
                "parallel.overlap_param_gather", True, "leaves weights to be gathered that u is "
                "reset to", "drop it here; `train` takes it",
            )  # fmt: skip
        if self.lisa.lisa_layers and self.lisa.lisa_interval == 1 and self.bilevel.resync_interval:
            raise refuse(
                "lisa.lisa_interval", 1, "leaves u no step to depart from w: a draw resets it",
                "use 2 or more",
            )  # fmt: skip
        train = self.train
        assert train.validation_batch_size is not None
        self._validate_batches(
            world_size, "global_batch_size", "validation_batch_size",
            sequences=2 * train.global_batch_size + train.validation_batch_size,
        )  # fmt: skip

    def validate_training(self, world_size: int) -> None:
        """The same for `train`, whose steps have training sequences alone."""
        if not self.data.sources:
            raise refuse("data.sources", [], "is empty", "name what to train on")
        self._validate_batches(
            world_size, "global_batch_size", sequences=self.train.global_batch_size
        )

    def _validate_batches(self, world_size: int, *names: str, sequences: int) -> None:
        self.validate_layout(world_size)
        per_pass = self.train.micro_batch_size * (world_size // self.parallel.model_parallel_size)
        for name in names:
            if getattr(self.train, name) % per_pass:
                raise refuse(
                    f"train.{name}", getattr(self.train, name),
                    f"is not divisible by micro_batch_size {self.train.micro_batch_size} x "
                    f"data-parallel size {world_size // self.parallel.model_parallel_size}",
                    f"use a multiple of {per_pass}",
                )  # fmt: skip
        self._validate_flush(sequences // per_pass)

    def validate_layout(self, world_size: int) -> None:
        """What every stage that builds the model needs."""
        parallel, model = self.parallel, self.model
        tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
        cp = parallel.context_parallel_size
        if world_size % parallel.model_parallel_size:
            sizes = f"TP {tp} x PP {pp}" + (f" x CP {cp}" if cp > 1 else "")
            raise refuse(
                "world size", world_size, f"is not divisible by {sizes}",
                "start a multiple of their product in ranks, or lower them",
            )  # fmt: skip
        if model.num_attention_heads % tp or (model.num_query_groups or tp) % tp:
            raise refuse(
                "parallel.tensor_model_parallel_size", tp,
                f"does not divide the {model.num_attention_heads} attention heads and "
                f"{model.num_query_groups or model.num_attention_heads} query groups",
                "choose a divisor of both",
            )  # fmt: skip
        if model.num_layers % pp:
            raise refuse(
                "parallel.pipeline_model_parallel_size", pp,
                f"does not divide num_layers {model.num_layers}", "choose a divisor",
            )  # fmt: skip
        if model.ffn_hidden_size and model.ffn_hidden_size % tp:
            raise refuse(
                "model.ffn_hidden_size", model.ffn_hidden_size,
                f"is not divisible by TP {tp}", "choose a multiple",
            )  # fmt: skip
        self._validate_lengths(tp)
        if parallel.fp8_format:
            self._validate_fp8(tp)
        per_chunk = model.num_layers // pp // (parallel.virtual_chunks(model.num_layers) or 1)
        if (parallel.recompute_num_layers or 0) > per_chunk:
            raise refuse(
                "parallel.recompute_num_layers", parallel.recompute_num_layers,
                f"is above the {per_chunk} layers of a pipeline stage or chunk", "lower it",
            )  # fmt: skip
        lisa = self.lisa.lisa_layers
        if lisa is not None and lisa > model.num_layers:
            raise refuse(
                "lisa.lisa_layers", lisa, f"is above num_layers {model.num_layers}", "lower it"
            )

    def _validate_fp8(self, tp: int) -> None:
        """Every side of a matrix product in FP8 is a multiple of 16 (Transformer Engine)."""
        model = self.model
        head = model.kv_channels or model.hidden_size // model.num_attention_heads
        groups = model.num_query_groups or model.num_attention_heads
        cp = self.parallel.context_parallel_size
        if self.data.seq_length % (16 * tp * cp):
            ranks = f"TP {tp}" + (f" x CP {cp}" if cp > 1 else "")
            raise refuse(
                "data.seq_length", self.data.seq_length,
                f"is not divisible by 16 x {ranks}, which FP8 needs", "choose a multiple",
            )  # fmt: skip
        for name, value, on_a_rank in (
            ("hidden_size", model.hidden_size, model.hidden_size),
            ("ffn_hidden_size", model.ffn_hidden_size, (model.ffn_hidden_size or 0) // tp),
            ("kv_channels", head, model.num_attention_heads * head // tp),
            ("kv_channels", head, groups * head // tp),
        ):
            if on_a_rank % 16:
                raise refuse(
                    f"model.{name}", value, f"makes a matrix of {on_a_rank} on each TP rank, which "
                    "FP8 needs divisible by 16", "choose another TP size, or drop fp8_format",
                )  # fmt: skip

    def _validate_lengths(self, tp: int) -> None:
        length, positions = self.data.seq_length, self.model.max_position_embeddings
        if self.parallel.sequence_parallel and length % tp:
            raise refuse(
                "data.seq_length", length, f"is not divisible by TP {tp}, which sequence_parallel "
                "needs", "choose a multiple",
            )  # fmt: skip
        cp = self.parallel.context_parallel_size
        if length % self.parallel.length_divisor:
            ranks = f"2 x CP {cp}" + (f" x TP {tp}" if self.parallel.sequence_parallel else "")
            raise refuse(
                "data.seq_length", length, f"is not divisible by {ranks}: each context-parallel "
                "rank holds two equal chunks of it", "choose a multiple",
            )  # fmt: skip
        scaling = self.model.rope_scaling
        if positions is not None and max(positions, scaling.longest if scaling else 0) < length:
            if scaling and scaling.rope_type == "dynamic":
                raise refuse(
                    "model.rope_scaling.rope_type", "dynamic", "has other frequencies for each "
                    f"length above max_position_embeddings {positions}; data.seq_length is "
                    f"{length}", f"lower seq_length to {positions}",
                )  # fmt: skip
            raise refuse(
                "model.max_position_embeddings", positions, f"is below data.seq_length {length}",
                "raise it or lower seq_length",
            )  # fmt: skip

    def _validate_flush(self, passes: int) -> None:
        pp = self.parallel.pipeline_model_parallel_size
        if self.parallel.num_layers_per_virtual_pipeline_stage is not None and passes % pp:
            raise refuse(
                "train.global_batch_size", self.train.global_batch_size,
                f"gives {passes} micro-batches a step, which the interleaved pipeline needs "
                f"divisible by its {pp} stages", "change it or validation_batch_size",
            )  # fmt: skip


SECTIONS = {section.name: section for section in fields(Config)}
