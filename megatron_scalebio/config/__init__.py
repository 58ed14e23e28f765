"""Every option of a run, in typed sections that refuse bad values by field, value and fix.

Parallelism, batch, tokenizer, checkpoint and logging options carry Megatron-LM's flag names.
`config_loader` fills these classes from defaults < YAML file < command-line flags.
"""

from dataclasses import dataclass, field, fields

from megatron_scalebio.config.baseline import BaselineConfig
from megatron_scalebio.config.data import DataConfig, SourceConfig, ValidationConfig
from megatron_scalebio.config.experts import check_expert_layout, widths_of_experts
from megatron_scalebio.config.latent import check_latent_layout, widths_of_latent
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
from megatron_scalebio.errors import UserError

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
            UserError: naming the field, its value and the fix.
        """
        if len(self.data.sources) < 2:
            raise UserError(
                f"data.sources: {[source.name for source in self.data.sources]!r} is not a mixture "
                "(name two sources or more)"
            )
        if not self.data.validation:
            raise UserError(
                f"data.validation: {[]!r} is empty (name the validation set you aim at)"
            )
        if self.data.blend_schedule:
            raise UserError(
                f"data.blend_schedule: {self.data.blend_schedule!r} is for `train`, which follows "
                "it (drop it)"
            )
        self._validate_goals()
        if self.parallel.overlap_param_gather:
            raise UserError(
                "parallel.overlap_param_gather: True leaves weights to be gathered that u is reset "
                "to (drop it here; `train` takes it)"
            )
        if self.lisa.lisa_layers and self.lisa.lisa_interval == 1 and self.bilevel.resync_interval:
            raise UserError(
                "lisa.lisa_interval: 1 leaves u no step to depart from w: a draw resets it (use 2 "
                "or more)"
            )
        train = self.train
        assert train.validation_batch_size is not None
        self._validate_batches(
            world_size, "global_batch_size", "validation_batch_size",
            sequences=2 * train.global_batch_size + train.validation_batch_size,
        )  # fmt: skip

    def _validate_goals(self) -> None:
        sets, objective = self.data.validation, self.bilevel.objective
        free = [entry for entry in sets if not entry.is_bounded]
        if not free:
            raise UserError(
                f"data.validation: {sets[0].name!r} has a bound, and so has every set (leave one "
                "free, as the goal)"
            )
        if objective == "worst_case" and len(free) < 2:
            raise UserError(
                f"bilevel.objective: {objective!r} of {len(free)} validation set without a bound "
                "(name two or more, or drop it)"
            )
        referred = next((entry for entry in sets if entry.reference_loss is not None), None)
        if self.bilevel.interactions and len(sets) < 2:
            raise UserError(
                f"bilevel.interactions: True of {len(sets)} validation set (name two or more, or "
                "drop it)"
            )
        if self.bilevel.interactions and self.bilevel.resync_interval is None:
            raise UserError(
                "bilevel.interactions: True needs steps at which u is reset (give resync_interval)"
            )
        if referred and objective != "worst_case":
            raise UserError(
                f"data.validation: {referred.name!r} has a reference_loss, which worst_case alone "
                "compares with (set bilevel.objective, or drop it)"
            )

    def validate_training(self, world_size: int) -> None:
        """The same for `train`, whose steps have training sequences alone."""
        if not self.data.sources:
            raise UserError(f"data.sources: {[]!r} is empty (name what to train on)")
        self._validate_batches(
            world_size, "global_batch_size", sequences=self.train.global_batch_size
        )

    def _validate_batches(self, world_size: int, *names: str, sequences: int) -> None:
        self.validate_layout(world_size)
        per_pass = self.train.micro_batch_size * (world_size // self.parallel.model_parallel_size)
        for name in names:
            if getattr(self.train, name) % per_pass:
                raise UserError(
                    f"train.{name}: {getattr(self.train, name)!r} is not divisible by "
                    f"micro_batch_size {self.train.micro_batch_size} x data-parallel size "
                    f"{world_size // self.parallel.model_parallel_size} (use a multiple of "
                    f"{per_pass})"
                )
            if self.train.packing:
                self._validate_rows(name, world_size // self.parallel.model_parallel_size)
        self._validate_flush(sequences // per_pass)

    def _validate_rows(self, name: str, replicas: int) -> None:
        """Interleaved stages take packed rows by as many as they are."""
        pp = self.parallel.pipeline_model_parallel_size
        interleaved = self.parallel.num_layers_per_virtual_pipeline_stage is not None
        if interleaved and getattr(self.train, name) % (pp * replicas):
            raise UserError(
                f"train.{name}: {getattr(self.train, name)!r} is not divisible by the {pp} stages "
                f"of the interleaved pipeline x data-parallel size {replicas}, which packing needs "
                f"(use a multiple of {pp * replicas})"
            )

    def validate_layout(self, world_size: int) -> None:
        """What every stage that builds the model needs."""
        parallel, model = self.parallel, self.model
        tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
        cp = parallel.context_parallel_size
        if world_size % parallel.model_parallel_size:
            sizes = f"TP {tp} x PP {pp}" + (f" x CP {cp}" if cp > 1 else "")
            raise UserError(
                f"world size: {world_size!r} is not divisible by {sizes} (start a multiple of "
                "their product in ranks, or lower them)"
            )
        if model.num_attention_heads % tp or (model.num_query_groups or tp) % tp:
            raise UserError(
                f"parallel.tensor_model_parallel_size: {tp!r} does not divide the "
                f"{model.num_attention_heads} attention heads and "
                f"{model.num_query_groups or model.num_attention_heads} query groups (choose a "
                "divisor of both)"
            )
        if model.num_layers % pp:
            raise UserError(
                f"parallel.pipeline_model_parallel_size: {pp!r} does not divide num_layers "
                f"{model.num_layers} (choose a divisor)"
            )
        if model.ffn_hidden_size and model.ffn_hidden_size % tp:
            raise UserError(
                f"model.ffn_hidden_size: {model.ffn_hidden_size!r} is not divisible by TP {tp} "
                "(choose a multiple)"
            )
        check_expert_layout(model, parallel, world_size)
        check_latent_layout(model, parallel)
        if self.train.packing and cp > 1:
            raise UserError(
                f"train.packing: True with parallel.context_parallel_size {cp} is not supported: "
                "ranks would have to share each sequence of a row (drop one of them)"
            )
        if self.train.packing and model.moe_router_load_balancing_type == "seq_aux_loss":
            raise UserError(
                "train.packing: True with model.moe_router_load_balancing_type 'seq_aux_loss' "
                "would balance experts over rows, not sequences (use aux_loss, or drop packing)"
            )
        self._validate_lengths(tp)
        self._validate_products(tp)
        per_chunk = model.num_layers // pp // (parallel.virtual_chunks(model.num_layers) or 1)
        if (parallel.recompute_num_layers or 0) > per_chunk:
            raise UserError(
                f"parallel.recompute_num_layers: {parallel.recompute_num_layers!r} is above the "
                f"{per_chunk} layers of a pipeline stage or chunk (lower it)"
            )
        if self.lisa.lisa_train_routers and model.num_experts is None:
            raise UserError("lisa.lisa_train_routers: True needs model.num_experts (drop it)")
        lisa = self.lisa.lisa_layers
        if lisa is not None and lisa > model.num_layers:
            raise UserError(
                f"lisa.lisa_layers: {lisa!r} is above num_layers {model.num_layers} (lower it)"
            )

    def _validate_products(self, tp: int) -> None:
        """Products in FP8 and FP4 take matrices of certain sizes (Transformer Engine)."""
        if self.parallel.low_precision is None:
            return
        (option, recipe), divisor = self.parallel.low_precision, self.parallel.product_divisor
        model = self.model
        head, groups = model.head_channels, model.num_query_groups or model.num_attention_heads
        heads = [("kv_channels", head, n * head // tp) for n in (model.num_attention_heads, groups)]
        cp = self.parallel.context_parallel_size
        if self.data.seq_length % (divisor * tp * cp):
            ranks = f"TP {tp}" + (f" x CP {cp}" if cp > 1 else "")
            raise UserError(
                f"data.seq_length: {self.data.seq_length!r} is not divisible by {divisor} x "
                f"{ranks}, which {option} with recipe {recipe} needs (choose a multiple)"
            )
        for name, value, on_a_rank in (
            ("hidden_size", model.hidden_size, model.hidden_size),
            ("ffn_hidden_size", model.ffn_hidden_size, (model.ffn_hidden_size or 0) // tp),
            *widths_of_experts(model, self.parallel),
            *(widths_of_latent(model, tp) if model.multi_latent_attention else heads),
        ):
            if on_a_rank % divisor:
                raise UserError(
                    f"model.{name}: {value!r} makes a matrix of {on_a_rank} on each TP rank, which "
                    f"{option} with recipe {recipe} needs divisible by {divisor} (choose another "
                    f"TP size, or drop {option})"
                )

    def _validate_lengths(self, tp: int) -> None:
        length, positions = self.data.seq_length, self.model.max_position_embeddings
        if self.parallel.sequence_parallel and length % tp:
            raise UserError(
                f"data.seq_length: {length!r} is not divisible by TP {tp}, which sequence_parallel "
                "needs (choose a multiple)"
            )
        cp = self.parallel.context_parallel_size
        if length % self.parallel.length_divisor:
            ranks = f"2 x CP {cp}" + (f" x TP {tp}" if self.parallel.sequence_parallel else "")
            raise UserError(
                f"data.seq_length: {length!r} is not divisible by {ranks}: each context-parallel "
                "rank holds two equal chunks of it (choose a multiple)"
            )
        scaling = self.model.rope_scaling
        if positions is not None and max(positions, scaling.longest if scaling else 0) < length:
            if scaling and scaling.rope_type == "dynamic":
                raise UserError(
                    "model.rope_scaling.rope_type: 'dynamic' has other frequencies for each length "
                    f"above max_position_embeddings {positions}; data.seq_length is {length} "
                    f"(lower seq_length to {positions})"
                )
            raise UserError(
                f"model.max_position_embeddings: {positions!r} is below data.seq_length {length} "
                "(raise it or lower seq_length)"
            )
        whole = self.model.full_attention_length
        if whole is not None and whole < length:
            raise UserError(
                f"model.full_attention_length: {whole!r} is below data.seq_length {length}: beyond "
                "it the model attends in chunks (attention_chunk_size) or at other scales "
                "(floor_scale), which Megatron-Core does not have (lower seq_length)"
            )

    def _validate_flush(self, passes: int) -> None:
        pp = self.parallel.pipeline_model_parallel_size
        if self.parallel.num_layers_per_virtual_pipeline_stage is not None and passes % pp:
            raise UserError(
                f"train.global_batch_size: {self.train.global_batch_size!r} gives {passes} "
                f"micro-batches a step, which the interleaved pipeline needs divisible by its {pp} "
                "stages (change it or validation_batch_size)"
            )


SECTIONS = {section.name: section for section in fields(Config)}
