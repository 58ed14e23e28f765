"""The layers of every supported family, as Megatron-Core layer specs.

Two implementations: `local`, Megatron-Core's own modules with this package's attention and norm
(CPU, or CUDA without Transformer Engine), and Transformer Engine's. Both write the same checkpoint
names. What Megatron-Core has no option for is added here: a norm after each block (Gemma 2), in
place of the one before it (OLMo 2), norms of queries and keys over all heads, or in some layers
(Llama 4), and attention and MLP in parallel (GPT-NeoX).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import (
    MLATransformerConfig,
    TransformerConfig,
)

from megatron_scalebio.compat.megatron import PartedLayer
from megatron_scalebio.model.attention import SdpaAttention
from megatron_scalebio.model.latent import LatentAttention
from megatron_scalebio.model.norm import LocalNorm, WholeNorm, plain_norm
from megatron_scalebio.model.router import Router


@dataclass
class ModelSettings(MLATransformerConfig):
    """Megatron-Core's configuration and the options that it does not have."""

    multi_latent_attention: bool = False
    pre_norms: bool = True
    post_norms: bool = False
    qk_layernorm_whole: bool = False
    parallel_residual: bool = False
    attn_logit_softcapping: float | None = None


def block_spec(
    config: ModelSettings, layers: Iterable[int], transformer_engine: bool
) -> TransformerBlockSubmodules:
    """The spec of a stage or chunk with these layers (from 0)."""
    freq, no_rope = config.moe_layer_freq, config.no_rope_freq
    experts = config.num_moe_experts
    kinds = [
        (
            experts if not isinstance(freq, list) or freq[layer] else None,
            config.qk_l2_norm and not (isinstance(no_rope, list) and no_rope[layer]),
        )
        for layer in layers
    ]
    norm = _te_norm() if transformer_engine else LocalNorm
    specs = {kind: _layer_spec(config, *kind, transformer_engine, norm) for kind in set(kinds)}
    return TransformerBlockSubmodules(layer_specs=[specs[kind] for kind in kinds], layer_norm=norm)


def _layer_spec(
    config: ModelSettings, experts: int | None, l2_norm: bool, transformer_engine: bool, norm: Any
) -> ModuleSpec:
    build = _transformer_engine_layer if transformer_engine else _local_layer
    layer = build(config, experts)
    mlp = layer.submodules.mlp.keywords["submodules"]
    if experts:
        mlp.router = Router
    attention = layer.submodules.self_attention.submodules
    if config.multi_latent_attention:
        layer.submodules.self_attention.module = LatentAttention
    if config.qk_layernorm_whole:
        attention.q_layernorm = partial(WholeNorm, "num_attention_heads")
        attention.k_layernorm = partial(WholeNorm, "num_query_groups")
    if l2_norm:
        attention.q_layernorm = attention.k_layernorm = plain_norm
    if not config.pre_norms:
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = IdentityOp
        if transformer_engine:  # whose linear layers have the norm before them within
            from megatron.core.extensions.transformer_engine import TEColumnParallelLinear

            attention.linear_qkv = TEColumnParallelLinear
            mlp.linear_fc1 = TEColumnParallelLinear
    if config.parallel_residual:
        layer.module = ParallelResidualLayer
    if config.post_norms:
        attention.linear_proj = mlp.linear_fc2 = _with_post_norm(attention.linear_proj, norm)
    return layer


def _local_layer(config: ModelSettings, experts: int | None) -> ModuleSpec:
    layer = get_gpt_layer_local_spec(
        num_experts=experts,
        normalization=config.normalization,
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=config.multi_latent_attention,
    )
    if config.multi_latent_attention:
        layer.submodules.sharded_state_dict_keys_map = _LATENT_NAMES.copy()
    if experts:  # the norm before them is a module of its own in Transformer Engine, too
        layer.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.")
        if config.add_bias_linear:
            experts_mlp = layer.submodules.mlp.keywords["submodules"].experts
            experts_mlp.keywords["submodules"].linear_fc2 = _ExpertLinear
    layer.submodules.input_layernorm = LocalNorm
    layer.submodules.pre_mlp_layernorm = LocalNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = SdpaAttention
    if config.multi_latent_attention:
        attention.q_layernorm = attention.kv_layernorm = LocalNorm
    elif config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = LocalNorm
    return layer


# Transformer Engine's names, whose linear layers hold the norm before them.
_LATENT_NAMES = {
    "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
    "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


class _ExpertLinear(RowParallelLinear):
    """An expert's last linear layer with a bias, which Megatron's experts add to its output.

    They do so in place, to an output that must be the layer's own. And a rank has the bias's whole
    gradient of its tokens: it is not to be summed over TP as where ranks share a sequence.
    """

    def __init__(self, *words: Any, **keywords: Any) -> None:
        super().__init__(*words, **keywords)
        self.bias.sequence_parallel = False

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, Any]:
        output, bias = super().forward(input_)
        return output.clone(), bias


def _te_norm() -> Any:
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm


def _transformer_engine_layer(config: ModelSettings, experts: int | None) -> ModuleSpec:
    layer = get_gpt_layer_with_transformer_engine_spec(
        num_experts=experts,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=config.multi_latent_attention,
    )
    # What Transformer Engine 2.11 has no option for, the second in the exchange of whole sequences.
    offset_under_cp = config.softmax_type != "vanilla" and config.context_parallel_size > 1
    if config.attn_logit_softcapping is not None or offset_under_cp:
        layer.submodules.self_attention.submodules.core_attention = SdpaAttention
    return layer


def _with_post_norm(linear: type, norm: Any) -> type:
    """A row-parallel linear layer whose output is normalized before it joins the residual."""

    class PostNormLinear(linear):
        def __init__(
            self, input_size: int, output_size: int, *, config: TransformerConfig, **keywords: Any
        ) -> None:
            super().__init__(input_size, output_size, config=config, **keywords)
            self.post_layernorm = norm(config, output_size, eps=config.layernorm_epsilon)

        def forward(self, *inputs: Any, **keywords: Any) -> tuple[torch.Tensor, None]:
            output, _ = super().forward(*inputs, **keywords)
            return self.post_layernorm(output), None

    assert linear is not RowParallelLinear or norm is LocalNorm
    return PostNormLinear


class ParallelResidualLayer(PartedLayer):
    """x + Attention(norm₁(x)) + MLP(norm₂(x)): both blocks read the layer's input."""

    def forward(
        self, hidden_states: torch.Tensor, *args: Any, **keywords: Any
    ) -> tuple[torch.Tensor, Any]:
        keywords.pop("dynamic_inference_decode_only", None)
        after_attention, context = self.attend(hidden_states, *args, **keywords)
        mlp_output = self.mlp(self.normalize_for_mlp(hidden_states))
        return self.join_mlp(mlp_output, after_attention), context
