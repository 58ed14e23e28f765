"""Builds this rank's chunks of a GPT model from the configuration."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import get_num_layers_to_build

from megatron_scalebio import runtime
from megatron_scalebio.config import Config
from megatron_scalebio.config.model import ModelConfig
from megatron_scalebio.errors import UserError
from megatron_scalebio.model.layers import ModelSettings, block_spec
from megatron_scalebio.model.rope import scale_rope, softmax_scale

try:
    import transformer_engine  # noqa: F401

    HAVE_TRANSFORMER_ENGINE = True
except ImportError:
    HAVE_TRANSFORMER_ENGINE = False


def uses_transformer_engine(config: Config) -> bool:
    asked = config.model.transformer_impl
    if asked == "transformer_engine" and not (HAVE_TRANSFORMER_ENGINE and runtime.on_cuda()):
        raise UserError(
            "'transformer_engine' needs CUDA and the transformer_engine package",
            where="model.transformer_impl",
            mend="install it or use local",
        )
    used = asked != "local" and HAVE_TRANSFORMER_ENGINE and runtime.on_cuda()
    if config.parallel.fp8_format and not used:
        raise UserError(
            f"{config.parallel.fp8_format!r} needs CUDA and Transformer Engine's layers",
            where="parallel.fp8_format",
            mend="install transformer_engine and leave transformer_impl at auto, or drop it",
        )
    return used


def transformer_config(config: Config) -> ModelSettings:
    """Megatron-Core's configuration of the model, its parallelism and its numerics."""
    model, parallel = config.model, config.parallel
    dtype = torch.bfloat16 if parallel.bf16 else torch.float32
    return ModelSettings(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups or model.num_attention_heads,
        kv_channels=model.kv_channels,
        ffn_hidden_size=model.ffn_hidden_size or default_ffn_hidden_size(config),
        normalization=model.normalization,
        layernorm_epsilon=model.norm_epsilon,
        layernorm_zero_centered_gamma=model.apply_layernorm_1p,
        qk_layernorm=model.qk_layernorm,
        post_norms=model.post_norms,
        parallel_residual=model.parallel_residual,
        gated_linear_unit=model.swiglu or model.activation == "geglu_tanh",
        activation_func=_activation(model),
        add_bias_linear=model.add_bias_linear,
        add_qkv_bias=model.add_qkv_bias,
        window_size=None if model.window_size is None else tuple(model.window_size),
        window_attn_skip_freq=model.window_attn_skip_freq,
        softmax_scale=softmax_scale(model),
        attn_logit_softcapping=model.attn_logit_softcapping,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_chunks(model.num_layers),
        context_parallel_size=parallel.context_parallel_size,
        # Transformer Engine's ring of messages takes no sliding window.
        cp_comm_type="p2p" if model.window_size is None else "all_gather",
        sequence_parallel=parallel.sequence_parallel,
        bf16=parallel.bf16,
        fp8=parallel.fp8_format,
        fp8_recipe=parallel.fp8_recipe,
        fp8_param=parallel.fp8_param_gather,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        recompute_granularity=parallel.recompute_granularity,
        recompute_method=parallel.recompute_method,
        recompute_num_layers=parallel.recompute_num_layers,
        # Micro-batches are padded to their own longest sequence, not to one length for all; except
        # when interleaved, where two stages would swap the announced shapes (see below).
        variable_seq_lengths=parallel.num_layers_per_virtual_pipeline_stage is None,
        moe_token_dispatcher_type="alltoall",  # unused here; the default refuses variable lengths
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
        # The fused GELU is always the tanh approximation.
        bias_activation_fusion=runtime.on_cuda() and model.swiglu,
        bias_dropout_fusion=runtime.on_cuda(),
        masked_softmax_fusion=False,
    )


def _leave(weight: torch.Tensor) -> torch.Tensor:
    return weight


def _activation(model: ModelConfig) -> Callable[[torch.Tensor], torch.Tensor]:
    if model.swiglu:
        return F.silu
    return F.gelu if model.activation == "gelu" else gelu_tanh


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU by its tanh approximation (`gelu_new`, `gelu_pytorch_tanh`)."""
    return F.gelu(x, approximate="tanh")


def default_ffn_hidden_size(config: Config) -> int:
    """4 × hidden, or 8/3 × hidden for a gated MLP: equal parameters, rounded up to 64."""
    model = config.model
    gated = model.swiglu or model.activation == "geglu_tanh"
    return math.ceil(model.hidden_size * 8 / 3 / 64) * 64 if gated else 4 * model.hidden_size


def padded_vocab_size(config: Config, vocab_size: int) -> int:
    """The vocabulary that all TP ranks share evenly (Megatron-LM's rule)."""
    multiple = (
        config.model.make_vocab_size_divisible_by * config.parallel.tensor_model_parallel_size
    )
    return math.ceil(vocab_size / multiple) * multiple


def build_model(config: Config, megatron: ModelSettings, vocab_size: int) -> list[torch.nn.Module]:
    """This rank's model chunks (one, or one per virtual pipeline chunk), in their dtype.

    Args:
        vocab_size: before padding.
    """
    torch.manual_seed(config.train.seed)
    model_parallel_cuda_manual_seed(config.train.seed)
    virtual = megatron.virtual_pipeline_model_parallel_size
    chunks = []
    for vp_stage in range(virtual or 1):
        stage = vp_stage if virtual else None
        chunk = build_chunk(config, megatron, vocab_size, stage)
        chunk.to(runtime.device())
        chunks.append(Float16Module(megatron, chunk) if config.parallel.bf16 else chunk)
    return chunks


def build_chunk(
    config: Config, megatron: ModelSettings, vocab_size: int, vp_stage: int | None
) -> GPTModel:
    """One chunk of this rank, where torch's default device says (`meta`: shapes alone)."""
    model = config.model
    layers = get_num_layers_to_build(megatron, vp_stage=vp_stage)
    gpt = GPTModel(
        config=megatron,
        transformer_layer_spec=block_spec(megatron, layers, uses_transformer_engine(config)),
        vocab_size=padded_vocab_size(config, vocab_size),
        max_sequence_length=model.max_position_embeddings or config.data.seq_length,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        parallel_output=True,
        share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
        position_embedding_type=model.position_embedding_type,
        rotary_percent=model.rotary_percent,
        rotary_base=model.rotary_base,
        vp_stage=vp_stage,
    )
    if model.rope_scaling:
        scale_rope(gpt.rotary_pos_emb, model, config.data.seq_length)
    _hook_ends(gpt, model, vocab_size)
    return gpt


def _hook_ends(gpt: GPTModel, model: ModelConfig, vocab_size: int) -> None:
    """What Megatron-Core has no option for at the embedding and at the logits."""
    if gpt.pre_process:
        if model.scale_embedding:
            gpt.embedding.register_forward_hook(partial(_scale, math.sqrt(model.hidden_size)))
        if gpt.config.recompute_granularity == "full":
            gpt.embedding.register_forward_hook(_require_grad)
    if gpt.post_process:
        if model.final_logit_softcapping is not None:
            gpt.output_layer.register_forward_hook(
                partial(_soft_cap, model.final_logit_softcapping)
            )
        gpt.output_layer.register_forward_hook(partial(_mask_padded_vocab, vocab_size))


def _scale(factor: float, embedding: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output * torch.tensor(factor, dtype=output.dtype)  # rounded first, as Gemma does


def _soft_cap(cap: float, layer: Any, inputs: Any, output: Any) -> Any:
    logits, *rest = output
    return (cap * torch.tanh(logits / cap), *rest)


def _mask_padded_vocab(vocab_size: int, layer: Any, inputs: Any, output: Any) -> None:
    """Takes padded vocabulary entries out of the softmax; their number depends on TP."""
    logits_SBV = output[0]
    rank = parallel_state.get_tensor_model_parallel_rank()
    first_padded = vocab_size - rank * logits_SBV.size(-1)
    if first_padded < logits_SBV.size(-1):
        logits_SBV[..., max(first_padded, 0) :] = -math.inf


def _require_grad(embedding: Any, inputs: Any, output: torch.Tensor) -> None:
    """Makes a frozen embedding's output require a gradient.

    A reentrant checkpoint whose input needs none runs its layers without a graph: under full
    recompute, the gradients of all layers above a frozen embedding would silently be zero.
    """
    if torch.is_grad_enabled() and not output.requires_grad:
        output.requires_grad_()
