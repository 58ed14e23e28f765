"""Every option of a run, in typed sections that refuse bad values by field, value and mend.

Parallelism, batch, tokenizer, checkpoint and logging options carry Megatron-LM's flag names.
`config_loader` fills these classes from defaults < YAML file < command-line flags.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from megatron_scalebio.errors import UserError

CONFIDENCE_LEVELS = (0.80, 0.90, 0.95, 0.98)


def option(default: Any, help: str) -> Any:
    """A dataclass field with the help text that its command-line flag shows."""
    factory = {"default_factory": default} if callable(default) else {"default": default}
    return field(metadata={"help": help}, **factory)


def refuse(field_name: str, value: object, problem: str, mend: str) -> UserError:
    return UserError(f"{value!r} {problem}", where=field_name, mend=mend)


def require_positive(section: Any, *names: str, or_zero: bool = False) -> None:
    for name in names:
        value = getattr(section, name)
        if value is None:
            continue
        if not math.isfinite(value) or value < 0 or (value == 0 and not or_zero):
            bound = "at least 0" if or_zero else "above 0"
            raise refuse(name, value, f"must be {bound}", f"set {name} {bound}")


def require_within_one(section: Any, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(section, name) < 1:
            raise refuse(name, getattr(section, name), "is outside [0, 1)", "choose within")


@dataclass
class SourceConfig:
    """One data source: a prepared folder, or a Megatron `.bin/.idx` prefix."""

    name: str
    path: str
    initial_weight: float | None = None

    def __post_init__(self) -> None:
        require_positive(self, "initial_weight")


@dataclass
class ValidationConfig:
    """One validation set; L1 is the weighted mean of their losses."""

    name: str
    path: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        require_positive(self, "weight")


@dataclass
class DataConfig:
    sources: list[SourceConfig] = option(list, "training sources, NAME=PATH ...")
    validation: list[ValidationConfig] = option(list, "validation sets, NAME=PATH ...")
    seq_length: int = option(1024, "tokens of model input per sequence")
    loss_mean: Literal["sample", "token"] = option(
        "sample", "mean over examples of their token means, or over all target tokens"
    )
    known_weights: dict[str, float] | None = option(
        None, "true mixture where it is known, NAME=WEIGHT ...: shown beside the learned one"
    )

    def __post_init__(self) -> None:
        require_positive(self, "seq_length")
        for kind, entries in (("sources", self.sources), ("validation", self.validation)):
            names = [entry.name for entry in entries]
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise refuse(kind, twice[0], "names two entries", "rename one of them")
        given = [source.initial_weight is not None for source in self.sources]
        if any(given) and not all(given):
            missing = self.sources[given.index(False)].name
            raise refuse(
                "sources",
                missing,
                "has no initial_weight, others have",
                "give every source one, or none for a uniform start",
            )
        unknown = sorted(set(self.known_weights or {}) - {source.name for source in self.sources})
        if unknown:
            raise refuse(
                "known_weights", unknown[0], "is not a source", "use the names in data.sources"
            )


@dataclass
class ModelConfig:
    """A GPT model by Megatron-LM's flag names; the defaults are Llama-shaped."""

    num_layers: int = option(4, "transformer layers")
    hidden_size: int = option(128, "width of the residual stream")
    num_attention_heads: int = option(4, "attention heads")
    num_query_groups: int | None = option(None, "key/value heads (grouped-query attention)")
    kv_channels: int | None = option(None, "size of one head [hidden_size / heads]")
    ffn_hidden_size: int | None = option(None, "width of the MLP [8/3 or 4 x hidden_size]")
    max_position_embeddings: int | None = option(None, "longest sequence [seq_length]")
    position_embedding_type: Literal["rope", "learned_absolute"] = option("rope", "position code")
    rotary_base: int = option(10000, "base period of rope")
    rotary_percent: float = option(1.0, "share of a head that rope turns")
    normalization: Literal["RMSNorm", "LayerNorm"] = option("RMSNorm", "normalization")
    norm_epsilon: float = option(1e-5, "added to the variance in normalization")
    swiglu: bool = option(True, "gated SiLU in the MLP, else GELU")
    add_bias_linear: bool = option(False, "biases in linear layers")
    untie_embeddings_and_output_weights: bool = option(False, "separate output head")
    vocab_size: int | None = option(None, "vocabulary [from the prepared sources]")
    make_vocab_size_divisible_by: int = option(128, "pad the vocabulary, times the TP size")
    init_method_std: float = option(0.02, "standard deviation of the initial weights")
    hidden_dropout: float = option(0.0, "dropout on the residual stream")
    attention_dropout: float = option(0.0, "dropout on attention probabilities")
    transformer_impl: Literal["auto", "local", "transformer_engine"] = option(
        "auto", "layer implementation [transformer_engine where CUDA has it]"
    )
    pretrained_checkpoint: str | None = option(None, "Megatron checkpoint that w starts from")

    def __post_init__(self) -> None:
        require_positive(
            self, "num_layers", "hidden_size", "num_attention_heads", "num_query_groups",
            "kv_channels", "ffn_hidden_size", "max_position_embeddings", "vocab_size",
            "make_vocab_size_divisible_by", "norm_epsilon", "init_method_std",
        )  # fmt: skip
        require_positive(self, "rotary_base")
        require_within_one(self, "hidden_dropout", "attention_dropout")
        if not 0 < self.rotary_percent <= 1:
            raise refuse("rotary_percent", self.rotary_percent, "is outside (0, 1]", "use 1")
        if self.kv_channels is None and self.hidden_size % self.num_attention_heads:
            raise refuse(
                "hidden_size", self.hidden_size,
                f"is not divisible by num_attention_heads {self.num_attention_heads}",
                "change one of them or set kv_channels",
            )  # fmt: skip
        if self.num_query_groups and self.num_attention_heads % self.num_query_groups:
            raise refuse(
                "num_query_groups", self.num_query_groups,
                f"does not divide num_attention_heads {self.num_attention_heads}",
                "choose a divisor",
            )  # fmt: skip
        turned = int((self.kv_channels or self.hidden_size // self.num_attention_heads)
                     * self.rotary_percent)  # fmt: skip
        if self.position_embedding_type == "rope" and (turned % 2 or not turned):
            raise refuse(
                "kv_channels", self.kv_channels, f"makes rope turn {turned} channels of a head",
                "choose an even number, two or more",
            )  # fmt: skip


@dataclass
class ParallelConfig:
    tensor_model_parallel_size: int = option(1, "ranks that share each layer (TP)")
    pipeline_model_parallel_size: int = option(1, "pipeline stages (PP)")
    num_layers_per_virtual_pipeline_stage: int | None = option(
        None, "layers per virtual chunk: interleaved pipeline (VPP)"
    )
    sequence_parallel: bool = option(False, "split norms along the sequence over TP")
    use_distributed_optimizer: bool = option(False, "shard optimizer state over DP (ZeRO-1)")
    bf16: bool = option(False, "bfloat16 weights with fp32 masters and gradient sums")
    recompute_granularity: Literal["full", "selective"] | None = option(
        None, "recompute activations in the backward pass"
    )
    recompute_method: Literal["uniform", "block"] | None = option(None, "with full recompute")
    recompute_num_layers: int | None = option(None, "with full recompute")
    distributed_timeout_minutes: int = option(10, "how long a collective may wait")

    def __post_init__(self) -> None:
        require_positive(
            self, "tensor_model_parallel_size", "pipeline_model_parallel_size",
            "num_layers_per_virtual_pipeline_stage", "recompute_num_layers",
            "distributed_timeout_minutes",
        )  # fmt: skip
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise refuse(
                "sequence_parallel", True, "needs tensor parallelism",
                "raise tensor_model_parallel_size or drop it",
            )  # fmt: skip
        if self.num_layers_per_virtual_pipeline_stage and self.pipeline_model_parallel_size == 1:
            raise refuse(
                "num_layers_per_virtual_pipeline_stage",
                self.num_layers_per_virtual_pipeline_stage,
                "needs pipeline parallelism",
                "raise pipeline_model_parallel_size or drop it",
            )
        if self.recompute_granularity == "full":
            self.recompute_method = self.recompute_method or "uniform"
            self.recompute_num_layers = self.recompute_num_layers or 1

    @property
    def model_parallel_size(self) -> int:
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size

    def virtual_chunks(self, num_layers: int) -> int | None:
        """Virtual pipeline chunks per rank, or None without interleaving."""
        per_chunk = self.num_layers_per_virtual_pipeline_stage
        if per_chunk is None:
            return None
        per_stage, rest = divmod(num_layers, self.pipeline_model_parallel_size)
        if rest or per_stage % per_chunk or per_stage == per_chunk:
            raise refuse(
                "num_layers_per_virtual_pipeline_stage", per_chunk,
                f"does not split {num_layers} layers over {self.pipeline_model_parallel_size} "
                "stages into two or more equal chunks each", "choose a smaller divisor",
            )  # fmt: skip
        return per_stage // per_chunk


@dataclass
class OptimizerConfig:
    """AdamW for w and u, and the schedule that w, u and the mixture share."""

    lr: float = option(3e-4, "peak learning rate of w")
    lr_u: float | None = option(None, "peak learning rate of u [lr]")
    min_lr: float | None = option(None, "floor of the learning rates of w and u [lr / 10]")
    lr_decay_style: Literal["cosine", "linear", "constant"] = option("cosine", "decay of lr, lr_u")
    lr_warmup_fraction: float = option(0.03, "share of the steps spent warming up")
    weight_decay: float = option(0.0, "decoupled weight decay of w and u")
    adam_beta1: float = option(0.9, "first moment")
    adam_beta2: float = option(0.95, "second moment")
    adam_eps: float = option(1e-8, "added to the root of the second moment")
    clip_grad: float = option(1.0, "clip the gradient norms of w and of u (0: off)")

    def __post_init__(self) -> None:
        require_positive(self, "lr", "lr_u", "adam_eps")
        require_positive(self, "min_lr", "weight_decay", "clip_grad", or_zero=True)
        require_within_one(self, "lr_warmup_fraction", "adam_beta1", "adam_beta2")
        if self.min_lr is None:
            self.min_lr = self.lr / 10
        if self.min_lr > self.lr:
            raise refuse("min_lr", self.min_lr, f"is above lr {self.lr}", "lower min_lr")


@dataclass
class BilevelConfig:
    """The bilevel problem and how its mixture is stepped (DESIGN: `bilevel/objective.py`)."""

    alpha: float = option(10.0, "penalty on the lower level's suboptimality")
    alpha_growth: float = option(1.0, "alpha times this each outer round; rates divided by it")
    outer_rounds: int = option(1, "rounds of the alpha schedule")
    mixture_optimizer: Literal["eg", "adamw"] = option(
        "eg", "exponentiated gradient, or AdamW on the logits as published"
    )
    lr_lambda: float | None = option(
        None, "learning rate of the mixture [0.1 for eg, 0.01 for adamw]"
    )
    lr_lambda_decay_style: Literal["constant", "cosine", "linear"] = option(
        "constant", "decay of lr_lambda; intervals need it constant"
    )
    resync_interval: int | None = option(
        10, "steps between resets of u to w; with LISA every new draw resets (null: never)"
    )
    floor_share: float = option(
        0.25, "share of each batch dealt equally to all sources; the rest follows the mixture"
    )
    average_fraction: float = option(0.5, "last share of the steps that the weights average over")
    confidence: float = option(0.95, "level of the intervals: 0.80, 0.90, 0.95 or 0.98")
    tolerance: float = option(0.05, "widest half-interval that counts as converged")
    early_stop: bool = option(False, "stop once converged")
    blend_floor: float = option(1e-3, "weights below this are left out of the blend files")

    def __post_init__(self) -> None:
        require_positive(
            self, "alpha", "alpha_growth", "outer_rounds", "lr_lambda", "tolerance",
            "resync_interval",
        )  # fmt: skip
        for name in ("floor_share", "average_fraction"):
            if not 0 < getattr(self, name) <= 1:
                raise refuse(name, getattr(self, name), "is outside (0, 1]", "choose within")
        if not 0 <= self.blend_floor < 0.5:
            raise refuse("blend_floor", self.blend_floor, "is outside [0, 0.5)", "choose within")
        if self.confidence not in CONFIDENCE_LEVELS:
            levels = ", ".join(str(level) for level in CONFIDENCE_LEVELS)
            raise refuse("confidence", self.confidence, "has no critical value", f"use {levels}")
        if self.resync_interval == 1:
            raise refuse("resync_interval", 1, "leaves u no step to depart from w", "use 2 or more")
        if self.lr_lambda is None:
            self.lr_lambda = 0.1 if self.mixture_optimizer == "eg" else 0.01


@dataclass
class LisaConfig:
    """Layerwise importance sampled AdamW: few layers train at a time, redrawn each interval."""

    lisa_layers: int | None = option(None, "active layers over the whole model [all: LISA off]")
    lisa_interval: int = option(20, "steps between draws")
    lisa_train_embedding: bool = option(True, "train the embedding and the output head")
    lisa_train_norm: bool = option(True, "train the final norm")

    def __post_init__(self) -> None:
        require_positive(self, "lisa_layers", "lisa_interval")


@dataclass
class TrainConfig:
    output: str = option("run", "folder that receives everything")
    train_iters: int = option(600, "steps")
    micro_batch_size: int = option(4, "sequences per forward pass")
    global_batch_size: int = option(32, "training sequences per step")
    validation_batch_size: int | None = option(
        None, "validation sequences per step [global_batch_size]"
    )
    seed: int = option(1234, "seed of everything random")
    skip_limit: int = option(5, "stop after this many steps in a row with NaN or Inf")

    def __post_init__(self) -> None:
        require_positive(
            self, "train_iters", "micro_batch_size", "global_batch_size", "validation_batch_size",
            "skip_limit",
        )  # fmt: skip
        require_positive(self, "seed", or_zero=True)
        if self.seed >= 2**32:
            raise refuse("seed", self.seed, "does not fit 32 bits", "choose a smaller one")
        self.validation_batch_size = self.validation_batch_size or self.global_batch_size


@dataclass
class CheckpointConfig:
    save: str | None = option(None, "checkpoint folder [OUTPUT/checkpoints]")
    load: str | None = option(None, "checkpoint folder to resume from [save]")
    save_interval: int = option(100, "steps between checkpoints (0: only at the end)")
    keep_last: int = option(2, "checkpoints kept")

    def __post_init__(self) -> None:
        require_positive(self, "save_interval", or_zero=True)
        require_positive(self, "keep_last")


@dataclass
class LoggingConfig:
    log_interval: int = option(10, "steps between console lines")
    tensorboard_dir: str | None = option(None, "TensorBoard folder [OUTPUT/tensorboard]")
    tensorboard_log_interval: int = option(1, "steps between TensorBoard points")

    def __post_init__(self) -> None:
        require_positive(self, "log_interval", "tensorboard_log_interval")


@dataclass
class Config:
    """A whole run: the sections of the YAML file."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    bilevel: BilevelConfig = field(default_factory=BilevelConfig)
    lisa: LisaConfig = field(default_factory=LisaConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def validate(self, world_size: int) -> None:
        """Checks what several fields and the number of ranks decide together.

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
        self._validate_layout(world_size)
        dp = world_size // self.parallel.model_parallel_size
        for name in ("global_batch_size", "validation_batch_size"):
            per_pass = self.train.micro_batch_size * dp
            if getattr(self.train, name) % per_pass:
                raise refuse(
                    f"train.{name}", getattr(self.train, name),
                    f"is not divisible by micro_batch_size {self.train.micro_batch_size} x "
                    f"data-parallel size {dp}", f"use a multiple of {per_pass}",
                )  # fmt: skip
        self._validate_flush(dp)

    def _validate_layout(self, world_size: int) -> None:
        parallel, model = self.parallel, self.model
        tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
        if world_size % parallel.model_parallel_size:
            raise refuse(
                "world size", world_size, f"is not divisible by TP {tp} x PP {pp}",
                "start a multiple of TP x PP ranks, or lower them",
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

    def _validate_lengths(self, tp: int) -> None:
        length, positions = self.data.seq_length, self.model.max_position_embeddings
        if self.parallel.sequence_parallel and length % tp:
            raise refuse(
                "data.seq_length", length, f"is not divisible by TP {tp}, which sequence_parallel "
                "needs", "choose a multiple",
            )  # fmt: skip
        if positions is not None and positions < length:
            raise refuse(
                "model.max_position_embeddings", positions, f"is below data.seq_length {length}",
                "raise it or lower seq_length",
            )  # fmt: skip

    def _validate_flush(self, dp: int) -> None:
        pp = self.parallel.pipeline_model_parallel_size
        if self.parallel.num_layers_per_virtual_pipeline_stage is None:
            return
        per_pass = self.train.micro_batch_size * dp
        assert self.train.validation_batch_size is not None
        passes = (2 * self.train.global_batch_size + self.train.validation_batch_size) // per_pass
        if passes % pp:
            raise refuse(
                "train.global_batch_size", self.train.global_batch_size,
                f"gives {passes} micro-batches a step, which the interleaved pipeline needs "
                f"divisible by its {pp} stages", "change it or validation_batch_size",
            )  # fmt: skip


SECTIONS = {section.name: section for section in fields(Config)}
