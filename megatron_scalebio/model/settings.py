"""Megatron's configurations of the model, of DDP and of the optimizer, from a run's."""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.optimizer import OptimizerConfig

from megatron_scalebio import runtime
from megatron_scalebio.config import Config
from megatron_scalebio.config.checks import by_name
from megatron_scalebio.config.experts import options_of_experts
from megatron_scalebio.config.latent import OPTIONS as LATENT_OPTIONS
from megatron_scalebio.config.model import ModelConfig
from megatron_scalebio.errors import UserError
from megatron_scalebio.model.layers import ModelSettings

try:
    import transformer_engine  # noqa: F401

    HAVE_TRANSFORMER_ENGINE = True
except ImportError:
    HAVE_TRANSFORMER_ENGINE = False


def uses_transformer_engine(config: Config) -> bool:
    asked = config.model.transformer_impl
    if asked == "transformer_engine" and not (HAVE_TRANSFORMER_ENGINE and runtime.on_cuda()):
        raise UserError(
            "model.transformer_impl: 'transformer_engine' needs CUDA and the transformer_engine "
            "package (install it or use local)"
        )
    used = asked != "local" and HAVE_TRANSFORMER_ENGINE and runtime.on_cuda()
    if config.parallel.low_precision:
        option, recipe = config.parallel.low_precision
        named = f"parallel.{option}: {getattr(config.parallel, option)!r}"
        if not used:
            raise UserError(
                f"{named} needs CUDA and Transformer Engine's layers (install transformer_engine "
                "and leave transformer_impl at auto, or drop it)"
            )
        _require_recipe(named, recipe)
    return used


# Of Transformer Engine: whether this GPU and its CUDA can do a recipe.
_CHECKS = {
    "tensorwise": "is_fp8_available", "delayed": "is_fp8_available",
    "blockwise": "is_fp8_block_scaling_available", "mxfp8": "is_mxfp8_available",
    "nvfp4": "is_nvfp4_available",
}  # fmt: skip


def _require_recipe(named: str, recipe: str) -> None:
    import transformer_engine.pytorch as te

    available, reason = getattr(te, _CHECKS[recipe])(return_reason=True)
    if not available:
        other = ", or use fp8_format with fp8_recipe tensorwise"
        raise UserError(
            f"{named} with recipe {recipe}: {' '.join(reason.split())} (drop it"
            f"{'' if _CHECKS[recipe] == 'is_fp8_available' else other})"
        )


# Options of the section `model` that Megatron has under the same names, in its configuration and
# among its arguments; and those that are in its configuration alone.
MODEL_OPTIONS = (
    "num_layers", "hidden_size", "num_attention_heads", "normalization", "qk_layernorm",
    "qk_l2_norm", "rotary_interleaved", "activation_func_clamp_value", "glu_linear_offset",
    "add_bias_linear", "add_qkv_bias", "window_attn_skip_freq", "softmax_type",
    "hidden_dropout", "attention_dropout",
)  # fmt: skip
_MORE_MODEL_OPTIONS = (
    "kv_channels", "pre_norms", "post_norms", "qk_layernorm_whole", "parallel_residual",
    "no_rope_freq", "softmax_scale", "attn_logit_softcapping",
)  # fmt: skip
_PARALLEL_OPTIONS = (
    "sequence_parallel", "bf16", "fp8_recipe", "recompute_granularity", "recompute_method",
    "recompute_num_layers",
)  # fmt: skip


def transformer_config(config: Config) -> ModelSettings:
    """Megatron-Core's configuration of the model, its parallelism and its numerics."""
    model, parallel = config.model, config.parallel
    dtype = torch.bfloat16 if parallel.bf16 else torch.float32
    return ModelSettings(
        **by_name(model, *MODEL_OPTIONS, *_MORE_MODEL_OPTIONS),
        **by_name(parallel, *_PARALLEL_OPTIONS),
        num_query_groups=model.num_query_groups or model.num_attention_heads,
        ffn_hidden_size=model.ffn_hidden_size or default_ffn_hidden_size(config),
        layernorm_epsilon=model.norm_epsilon,
        layernorm_zero_centered_gamma=model.apply_layernorm_1p,
        gated_linear_unit=model.gated,
        activation_func=_activation(model),
        window_size=None if model.window_size is None else tuple(model.window_size),
        **parallel.group_sizes(model.num_layers),
        # Transformer Engine's ring of messages takes no sliding window.
        cp_comm_type="p2p" if model.window_size is None else "all_gather",
        fp8=parallel.fp8_format,
        fp4=parallel.fp4_format,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        # Micro-batches are padded to their own longest sequence, not to one length for all; except
        # when interleaved, where two stages would swap the announced shapes (see below).
        variable_seq_lengths=parallel.num_layers_per_virtual_pipeline_stage is None,
        **_expert_settings(config),
        **latent_settings(model),
        # Coefficients already divide by global counts; Megatron must not divide again.
        calculate_per_token_loss=True,
        # A sent tensor's storage is freed once the send is under way. NCCL's stream order makes
        # that safe; gloo would still be reading it.
        deallocate_pipeline_outputs=runtime.on_cuda(),
        # Interleaved stages 0 and 1 of two are each other's next and previous: batched sends
        # between them would be matched in the wrong order.
        overlap_p2p_comm=parallel.num_layers_per_virtual_pipeline_stage is not None,
        batch_p2p_comm=parallel.num_layers_per_virtual_pipeline_stage is None,
        # `model.init` draws the weights, alike under every layout. (Without
        # perform_initialization, Megatron would also not mark weights as split over TP.)
        init_method=_leave,
        output_layer_init_method=_leave,
        embedding_init_method=_leave,
        use_cpu_initialization=not runtime.on_cuda(),
        bias_activation_fusion=runtime.on_cuda() and fuses_activation(model),
        # Megatron's grouped experts do not take their biases along with it.
        bias_dropout_fusion=runtime.on_cuda() and not (model.num_experts and model.add_bias_linear),
        masked_softmax_fusion=False,
    )


def _expert_settings(config: Config) -> dict[str, Any]:
    model = config.model
    if model.num_experts is None:
        # Unused; the default refuses variable lengths.
        return {"moe_token_dispatcher_type": "alltoall"}
    ffn = model.ffn_hidden_size or default_ffn_hidden_size(config)
    return {
        **options_of_experts(model),
        "num_moe_experts": model.num_experts,
        "moe_layer_freq": model.moe_layer_freq or 1,
        "moe_ffn_hidden_size": model.moe_ffn_hidden_size or ffn,
        "moe_grouped_gemm": uses_transformer_engine(config),
    }


def latent_settings(model: ModelConfig) -> dict[str, Any]:
    """Of latent attention, which has rope within itself."""
    if not model.multi_latent_attention:
        return {}
    settings = by_name(model, "multi_latent_attention", *LATENT_OPTIONS)
    settings |= {"rope_type": "rope", "rotary_base": model.rotary_base}
    scaling = model.rope_scaling
    if scaling is None:
        return settings
    names = ["original_max_position_embeddings", "beta_fast", "beta_slow"]
    names += ["mscale", "mscale_all_dim"] if scaling.mscale is not None else []
    yarn = {"rope_type": "yarn", "rotary_scaling_factor": scaling.factor}
    return {**settings, **yarn, **by_name(scaling, *names)}


def scoring_config(megatron: ModelSettings) -> ModelSettings:
    """The configuration of a model that does not train.

    Delayed scales follow what training steps have seen: without one they would all stay 1.
    """
    scoring = copy.copy(megatron)
    if scoring.fp8_recipe == "delayed":
        scoring.fp8_recipe = "tensorwise"
    return scoring


def _leave(weight: torch.Tensor) -> torch.Tensor:
    return weight


def _activation(model: ModelConfig) -> Callable[[torch.Tensor], torch.Tensor]:
    if model.swiglu:
        return F.silu
    return {"gelu": F.gelu, "quick_geglu": quick_gelu}.get(model.activation, gelu_tanh)


def fuses_activation(model: ModelConfig) -> bool:
    """Megatron's fused GELU is always the tanh approximation, its fused SiLU has no clamp."""
    plain = model.activation_func_clamp_value is None and not model.glu_linear_offset
    return model.swiglu and plain


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU by its tanh approximation (`gelu_new`, `gelu_pytorch_tanh`)."""
    return F.gelu(x, approximate="tanh")


def default_ffn_hidden_size(config: Config) -> int:
    """4 × hidden, or 8/3 × hidden for a gated MLP: equal parameters, rounded up to 64."""
    model = config.model
    return math.ceil(model.hidden_size * 8 / 3 / 64) * 64 if model.gated else 4 * model.hidden_size


def ddp_config(config: Config) -> DistributedDataParallelConfig:
    parallel = config.parallel
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
    )


def optimizer_config(config: Config) -> OptimizerConfig:
    """AdamW of w and u alike; a step sets its own learning rate."""
    rates, parallel = config.optimizer, config.parallel
    return OptimizerConfig(
        optimizer="adam",
        **by_name(
            rates, "lr", "min_lr", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps",
            "clip_grad",
        ),
        **by_name(parallel, "bf16", "use_distributed_optimizer", "overlap_param_gather"),
        params_dtype=torch.bfloat16 if parallel.bf16 else torch.float32,
        fp8_recipe=parallel.fp8_recipe if parallel.fp8_format else None,
    )  # fmt: skip
