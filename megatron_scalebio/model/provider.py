"""Builds this rank's chunks of a GPT model from the configuration."""

import math
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_scalebio.config import Config
from megatron_scalebio.config.model import ModelConfig
from megatron_scalebio.core.twin import ModelProvider, build_chunks
from megatron_scalebio.model.init import seed_generators
from megatron_scalebio.model.layers import ModelSettings, block_spec
from megatron_scalebio.model.rope import scale_rope, turn_windows_apart
from megatron_scalebio.model.settings import uses_transformer_engine


def padded_vocab_size(config: Config, vocab_size: int) -> int:
    """The vocabulary that all TP ranks share evenly (Megatron-LM's rule)."""
    multiple = (
        config.model.make_vocab_size_divisible_by * config.parallel.tensor_model_parallel_size
    )
    return math.ceil(vocab_size / multiple) * multiple


def model_provider(config: Config, megatron: ModelSettings, vocab_size: int) -> ModelProvider:
    """Makes chunks of the model, as Megatron's providers do.

    Args:
        vocab_size: before padding.
    """
    return partial(build_chunk, config, megatron, vocab_size)


def build_model(config: Config, megatron: ModelSettings, vocab_size: int) -> list[torch.nn.Module]:
    """This rank's model chunks (one, or one per virtual pipeline chunk), in their dtype."""
    seed_generators(config.train.seed)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return build_chunks(model_provider(config, megatron, vocab_size), groups)


def build_chunk(
    config: Config,
    megatron: ModelSettings,
    vocab_size: int,
    pre_process: bool,
    post_process: bool,
    vp_stage: int | None = None,
) -> GPTModel:
    """One chunk of this rank, where torch's default device says (`meta`: shapes alone)."""
    model = config.model
    first = get_transformer_layer_offset(megatron, vp_stage=vp_stage)
    layers = range(first, first + get_num_layers_to_build(megatron, vp_stage=vp_stage))
    gpt = GPTModel(
        config=megatron,
        transformer_layer_spec=block_spec(megatron, layers, uses_transformer_engine(config)),
        vocab_size=padded_vocab_size(config, vocab_size),
        max_sequence_length=model.max_position_embeddings or config.data.seq_length,
        pre_process=pre_process,
        post_process=post_process,
        parallel_output=True,
        share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
        position_embedding_type=model.position_embedding_type,
        rotary_percent=model.rotary_percent,
        rotary_base=model.rotary_base,
        vp_stage=vp_stage,
    )
    if model.rope_scaling and not model.multi_latent_attention:
        scale_rope(gpt, model, config.data.seq_length)
    if model.window_rotary_base is not None:
        turn_windows_apart(gpt, model)
    for name, parameter in gpt.named_parameters():
        if name.endswith("softmax_offset"):  # else counted on one TP rank alone in norms
            set_tensor_model_parallel_attributes(parameter, True, 0, 1)
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
