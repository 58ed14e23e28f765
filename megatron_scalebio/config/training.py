"""Optimizer, bilevel problem, LISA, steps, checkpoints and logging."""

import math
from dataclasses import dataclass, fields
from typing import Literal

from megatron_scalebio.config.checks import option, require_positive, require_within
from megatron_scalebio.core.options import CONFIDENCE_LEVELS, BilevelOptions, LisaOptions
from megatron_scalebio.errors import UserError


@dataclass
class OptimizerConfig:
    """AdamW for w and u, and the schedule that w, u and the mixture share."""

    lr: float = option(3e-4, "peak learning rate of the model (w)")
    lr_u: float | None = option(None, "peak learning rate of the reference model (u) [lr]")
    min_lr: float | None = option(
        None, "lowest lr of the decay [lr / 10]; that of lr_u is in proportion"
    )
    lr_decay_style: Literal["cosine", "linear", "constant"] = option("cosine", "decay of lr, lr_u")
    lr_warmup_fraction: float = option(0.03, "share of the steps spent warming up")
    weight_decay: float = option(0.0, "decoupled weight decay of w and u")
    adam_beta1: float = option(0.9, "decay rate of Adam's first moment")
    adam_beta2: float = option(0.95, "decay rate of Adam's second moment")
    adam_eps: float = option(1e-8, "added to the square root of Adam's second moment")
    clip_grad: float = option(1.0, "clip the gradient norms of w and of u (0: off)")

    def __post_init__(self) -> None:
        require_positive(self, "lr", "lr_u", "adam_eps")
        require_positive(self, "min_lr", "weight_decay", "clip_grad", or_zero=True)
        require_within(self, "[0, 1)", "lr_warmup_fraction", "adam_beta1", "adam_beta2")
        if self.min_lr is None:
            self.min_lr = self.lr / 10
        if self.min_lr > self.lr:
            raise UserError(f"min_lr: {self.min_lr!r} is above lr {self.lr} (lower min_lr)")


@dataclass
class BilevelConfig:
    """The bilevel problem and how its mixture is stepped (`mixture/objective.py`)."""

    preset: Literal["paper"] | None = option(
        None, "a named set of options, which your own override; paper: the method as published"
    )
    objective: Literal["mean", "worst_case"] = option(
        "mean",
        "what is minimized with several validation sets: the weighted mean of their losses, or the "
        "loss of the set that is worst off relative to its reference_loss",
    )
    level: Literal["source", "example"] = option(
        "source", "example: also score every single example, into example_weights.npz"
    )
    group_sources: int | None = option(
        None,
        "number of groups to put sources into, by their gradients at the start; for sources whose "
        "names define no groups",
    )
    interactions: bool = option(
        False, "estimate which source helps which validation set, by weighting the sets in turn"
    )
    alpha: float = option(
        BilevelOptions.alpha,
        "how strongly w is held to the training mixture: weight of L2(w) - L2(u), its training "
        "loss above the reference model's; grows in long runs",
    )
    alpha_growth: float = option(
        1.0, "each outer round multiplies alpha by this, and divides the learning rates by it"
    )
    outer_rounds: int = option(1, "number of rounds of the alpha schedule")
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
        BilevelOptions.resync_interval,
        "steps between resets of u to w; with LISA every new draw resets (null: never)",
    )
    memory_growth: float = option(
        BilevelOptions.memory_growth,
        "after 40 complete resets, share of the steps since then that u's difference from w is "
        "remembered for (0: all resets are complete)",
    )
    floor_share: float = option(
        0.25,
        "share of each batch that is split equally among the sources; the rest follows the mixture",
    )
    average_fraction: float = option(
        BilevelOptions.average_fraction, "last share of the steps that the weights average over"
    )
    confidence: float = option(
        BilevelOptions.confidence, "level of the intervals: 0.80, 0.90, 0.95 or 0.98"
    )
    tolerance: float = option(
        BilevelOptions.tolerance, "largest half-width of an interval that counts as converged"
    )
    kl_to_prior: float = option(
        0.0, "weight of the KL divergence of the mixture from `prior` in the objective"
    )
    prior: str | dict[str, float] | None = option(
        None,
        "what kl_to_prior pulls to: natural, initial, a former run's weights.json, or in a file "
        "also shares, {name: share} [natural]",
    )
    final_train_iters: int | None = option(
        None, "steps of the final training that the weights are meant for [train_iters]"
    )
    final_check: bool = option(
        True,
        "after the last step, measure how far another sample of the validation set would move the "
        "weights; takes at most 5% of the steps",
    )
    early_stop: bool = option(False, "end the run once the weights have converged")
    blend_floor: float = option(1e-3, "weights below this are left out of the blend files")

    def __post_init__(self) -> None:
        require_positive(
            self, "alpha", "alpha_growth", "outer_rounds", "lr_lambda", "tolerance",
            "resync_interval", "final_train_iters", "group_sources",
        )  # fmt: skip
        require_positive(self, "kl_to_prior", or_zero=True)
        require_within(self, "(0, 1]", "floor_share", "average_fraction")
        require_within(self, "[0, 1]", "memory_growth")
        require_within(self, "[0, 0.5)", "blend_floor")
        if self.group_sources == 1:
            raise UserError("group_sources: 1 is all sources in one group (ask for 2 or more)")
        if self.confidence not in CONFIDENCE_LEVELS:
            levels = ", ".join(str(level) for level in CONFIDENCE_LEVELS)
            raise UserError(f"confidence: {self.confidence!r} has no critical value (use {levels})")
        if self.resync_interval == 1:
            raise UserError("resync_interval: 1 leaves u no step to depart from w (use 2 or more)")
        if self.lr_lambda is None:
            self.lr_lambda = BilevelOptions(mixture_optimizer=self.mixture_optimizer).rate

    def options(self, loss_mean: Literal["sample", "token"]) -> BilevelOptions:
        """As the core takes them."""
        names = {spec.name for spec in fields(BilevelOptions)} - {"loss_mean"}
        given = {name: getattr(self, name) for name in names}
        return BilevelOptions(**given, loss_mean=loss_mean)


@dataclass
class LisaConfig:
    """Layerwise importance sampled AdamW: few layers train at a time, redrawn each interval."""

    lisa_layers: int | None = option(None, "active layers over the whole model [all: LISA off]")
    lisa_interval: int = option(LisaOptions.interval, "steps between draws of layers")
    lisa_train_embedding: bool = option(True, "train the embedding and the output head")
    lisa_train_norm: bool = option(True, "train the final norm")
    lisa_train_routers: bool = option(False, "train the routers of experts in all layers")

    def __post_init__(self) -> None:
        require_positive(self, "lisa_layers", "lisa_interval")

    def options(self) -> LisaOptions | None:
        """As the core takes them; None: LISA is off."""
        if self.lisa_layers is None:
            return None
        return LisaOptions(
            self.lisa_layers, self.lisa_interval, self.lisa_train_embedding, self.lisa_train_norm,
            self.lisa_train_routers,
        )  # fmt: skip


@dataclass
class TrainConfig:
    output: str = option("run", "folder that receives everything")
    train_iters: int = option(800, "training steps")
    train_epochs: float | None = option(
        None, "passes over the sources' examples, in place of train_iters"
    )
    micro_batch_size: int = option(4, "sequences per forward pass")
    packing: bool = option(
        False,
        "pack examples into rows, at most micro_batch_size x seq_length tokens per forward pass; "
        "none attends to another",
    )
    global_batch_size: int = option(32, "training sequences per step")
    validation_batch_size: int | None = option(
        None, "validation sequences per step [global_batch_size]"
    )
    eval_interval: int = option(
        100, "`train`: steps between evaluations on the validation sets (0: only at the end)"
    )
    eval_examples: int | None = option(
        None, "`train`: examples of a validation set per evaluation [all]"
    )
    seed: int = option(1234, "seed of everything random")
    skip_limit: int = option(5, "stop after this many steps in a row with NaN, Inf or a spike")

    def __post_init__(self) -> None:
        require_positive(
            self, "train_iters", "train_epochs", "micro_batch_size", "global_batch_size",
            "validation_batch_size", "skip_limit", "eval_examples",
        )  # fmt: skip
        require_positive(self, "seed", "eval_interval", or_zero=True)
        if self.seed >= 2**32:
            raise UserError(f"seed: {self.seed!r} does not fit 32 bits (choose a smaller one)")
        self.validation_batch_size = self.validation_batch_size or self.global_batch_size

    def resolve_epochs(self, examples: int) -> None:
        """Sets train_iters where epochs were asked for."""
        if self.train_epochs is not None:
            self.train_iters = math.ceil(self.train_epochs * examples / self.global_batch_size)
            self.train_epochs = None


@dataclass
class CheckpointConfig:
    save: str | None = option(None, "checkpoint folder [OUTPUT/checkpoints]")
    load: str | None = option(
        None, "checkpoint folder to resume from if `save` holds no checkpoint yet"
    )
    save_interval: int = option(100, "steps between checkpoints (0: only at the end)")
    keep_last: int = option(2, "checkpoints kept")
    async_save: bool = option(False, "write checkpoints in the background while the run goes on")

    def __post_init__(self) -> None:
        require_positive(self, "save_interval", or_zero=True)
        require_positive(self, "keep_last")


@dataclass
class LoggingConfig:
    log_interval: int = option(10, "steps between console lines")
    tensorboard_dir: str | None = option(None, "TensorBoard folder [OUTPUT/tensorboard]")
    tensorboard_log_interval: int = option(1, "steps between TensorBoard points")
    wandb_project: str | None = option(
        None, "Weights & Biases project to log to as well; WANDB_MODE=offline: into OUTPUT/wandb"
    )
    wandb_exp_name: str | None = option(None, "name of the run in Weights & Biases [OUTPUT]")
    mlflow_experiment: str | None = option(
        None, "MLflow experiment to log to as well, at MLFLOW_TRACKING_URI [into OUTPUT/mlruns]"
    )
    record_memory_history: bool = option(
        False, "note which lines allocate GPU memory, for the snapshot written when it runs out"
    )

    def __post_init__(self) -> None:
        require_positive(self, "log_interval", "tensorboard_log_interval")
