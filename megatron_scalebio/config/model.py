"""The model: architecture by Megatron-LM's names, and where its weights come from."""

from dataclasses import dataclass
from typing import Literal

from megatron_scalebio.config.checks import (
    option,
    pattern_of_layers,
    require_positive,
    require_within,
)
from megatron_scalebio.config.experts import check_experts, refuse_without_experts
from megatron_scalebio.config.latent import check_latent
from megatron_scalebio.config.rope import RopeScaling
from megatron_scalebio.errors import UserError


@dataclass
class ModelConfig:
    """A GPT model by Megatron-LM's flag names; the defaults are Llama-shaped."""

    hf: str | None = option(
        None,
        "Hugging Face folder: gives the architecture, and the weights that training starts from",
    )
    num_layers: int = option(4, "transformer layers")
    hidden_size: int = option(128, "width of the residual stream")
    num_attention_heads: int = option(4, "attention heads")
    num_query_groups: int | None = option(None, "key/value heads (grouped-query attention)")
    kv_channels: int | None = option(None, "size of one head [hidden_size / heads]")
    ffn_hidden_size: int | None = option(None, "width of the MLP [8/3 or 4 x hidden_size]")
    max_position_embeddings: int | None = option(None, "longest sequence [seq_length]")
    position_embedding_type: Literal["rope", "learned_absolute"] = option(
        "rope", "position embedding"
    )
    rotary_base: int = option(10000, "base period of rope")
    window_rotary_base: int | None = option(
        None,
        "base of rope in sliding-window layers, to which rope_scaling does not apply (Gemma 3) "
        "[rotary_base]",
    )
    rotary_percent: float = option(1.0, "share of a head's channels that rope rotates")
    rotary_interleaved: bool = option(
        False, "rope rotates pairs of neighbouring channels, not of a head's two halves (Llama 4)"
    )
    rope_scaling: RopeScaling | None = option(None, "long-context scaling of rope")
    no_rope_freq: list[int] | None = option(
        None,
        "layers without rope: 1 (without) or 0 for each layer; or N: every N-th (SmolLM3) [none]",
    )
    normalization: Literal["RMSNorm", "LayerNorm"] = option("RMSNorm", "normalization")
    norm_epsilon: float = option(1e-5, "added to the variance in normalization")
    apply_layernorm_1p: bool = option(False, "norms multiply by 1 + weight")
    pre_norms: bool = option(True, "normalize the inputs of attention and MLP (not OLMo 2)")
    post_norms: bool = option(False, "normalize the outputs of attention and MLP (Gemma 2)")
    qk_layernorm: bool = option(False, "normalize the queries and keys of each head (Qwen 3)")
    qk_layernorm_whole: bool = option(
        False, "normalize queries and keys over all heads together (OLMo 2); needs qk_layernorm"
    )
    qk_l2_norm: bool = option(
        False, "L2-normalize queries and keys, without weights, in layers with rope (Llama 4)"
    )
    parallel_residual: bool = option(False, "attention and MLP read the same input (GPT-NeoX)")
    swiglu: bool = option(True, "gated SiLU in the MLP, else `activation`")
    activation: Literal["gelu", "gelu_tanh", "geglu_tanh", "quick_geglu"] = option(
        "gelu",
        "MLP without swiglu: GELU, its tanh approximation, or gated by the tanh (geglu_tanh) or "
        "sigmoid (quick_geglu) approximation",
    )
    activation_func_clamp_value: float | None = option(
        None, "clamp a gated MLP: its gate from above, its linear part to +- this value (gpt-oss)"
    )
    glu_linear_offset: float = option(0.0, "added to the linear part of a gated MLP (gpt-oss)")
    num_experts: int | None = option(None, "experts of a layer, in place of its MLP (MoE) [none]")
    moe_layer_freq: list[int] | None = option(
        None, "layers with experts: 1 (with) or 0 for each layer; or N: every N-th [all]"
    )
    moe_ffn_hidden_size: int | None = option(None, "width of an expert [ffn_hidden_size]")
    moe_shared_expert_intermediate_size: int | None = option(
        None, "width of the shared expert, which every token goes through [none]"
    )
    moe_shared_expert_gate: bool = option(False, "weigh the shared expert by a gate (Qwen 2 MoE)")
    moe_router_topk: int = option(2, "experts that a token goes through")
    moe_router_score_function: Literal["softmax", "sigmoid"] = option(
        "softmax", "how a router turns its logits into scores"
    )
    moe_router_pre_softmax: bool = option(
        False, "softmax over all experts, not only the chosen ones"
    )
    moe_router_num_groups: int | None = option(
        None, "groups of experts; a token chooses only from the best groups (DeepSeek) [no groups]"
    )
    moe_router_group_topk: int | None = option(None, "number of groups that a token chooses from")
    moe_router_topk_scaling_factor: float | None = option(
        None, "factor that the routers' weights are multiplied by"
    )
    moe_router_dtype: Literal["fp32", "fp64"] | None = option(
        None, "data type in which routers compute [the model's]"
    )
    moe_router_enable_expert_bias: bool = option(
        False,
        "balance the experts by a bias on their scores (DeepSeek-V3); needs score function sigmoid",
    )
    moe_apply_probs_on_input: bool = option(
        False, "the router's weights multiply the experts' inputs, not their outputs (Llama 4)"
    )
    moe_router_bias_update_rate: float = option(1e-3, "step size of moe_router_enable_expert_bias")
    moe_router_load_balancing_type: Literal["aux_loss", "seq_aux_loss", "none"] = option(
        "aux_loss", "balance over a micro-batch or over each sequence"
    )
    moe_aux_loss_coeff: float = option(0.0, "coefficient of the load-balancing loss")
    moe_z_loss_coeff: float | None = option(None, "coefficient of the routers' z-loss [0]")
    moe_enable_routing_replay: bool = option(
        False, "u's tokens go to the experts that w chose: less noise in the mixture's gradient"
    )
    moe_token_dispatcher_type: Literal["alltoall", "flex"] = option(
        "alltoall", "how tokens get to their experts; flex: DeepEP"
    )
    multi_latent_attention: bool = option(
        False,
        "latent attention: queries, keys and values from low-rank vectors (DeepSeek); needs "
        "qk_layernorm",
    )
    q_lora_rank: int | None = option(
        None, "width of the low-rank vector of queries [none: directly from the hidden state]"
    )
    kv_lora_rank: int = option(512, "width of the low-rank vector of keys and values")
    qk_head_dim: int = option(128, "channels of a query or key without rope")
    qk_pos_emb_head_dim: int = option(64, "channels of a query or key with rope")
    v_head_dim: int = option(128, "channels of a value")
    add_bias_linear: bool = option(False, "biases in linear layers")
    add_qkv_bias: bool = option(False, "biases in the QKV projection (Qwen 2)")
    window_size: list[int] | None = option(
        None,
        "sliding window: positions that a token sees before and after it, not counting it (4095,0)",
    )
    window_attn_skip_freq: int | None = option(
        None, "every N-th layer sees all tokens in spite of window_size"
    )
    full_attention_length: int | None = option(
        None,
        "longest sequence with full causal attention; longer ones are refused (Llama 4)",
    )
    softmax_scale: float | None = option(None, "factor of attention scores [1/sqrt(kv_channels)]")
    softmax_type: Literal["vanilla", "learnable"] = option(
        "vanilla",
        "learnable: each head has a learned score for attending to nothing, a sink (gpt-oss)",
    )
    attn_logit_softcapping: float | None = option(None, "attention scores s become c tanh(s/c)")
    final_logit_softcapping: float | None = option(None, "output logits z become c tanh(z/c)")
    scale_embedding: bool = option(False, "multiply embeddings by sqrt(hidden_size) (Gemma)")
    untie_embeddings_and_output_weights: bool = option(False, "separate output head")
    vocab_size: int | None = option(None, "vocabulary [from the prepared sources]")
    make_vocab_size_divisible_by: int = option(
        128, "pad the vocabulary to a multiple of this times the TP size"
    )
    init_method_std: float = option(0.02, "standard deviation of the initial weights")
    hidden_dropout: float = option(0.0, "dropout on the residual stream")
    attention_dropout: float = option(0.0, "dropout on attention probabilities")
    transformer_impl: Literal["auto", "local", "transformer_engine"] = option(
        "auto", "layer implementation [transformer_engine, if it is installed and there is a GPU]"
    )
    pretrained_checkpoint: str | None = option(
        None, "Megatron checkpoint that w starts from; with hf, hf gives only the architecture"
    )

    def __post_init__(self) -> None:
        require_positive(
            self, "num_layers", "hidden_size", "num_attention_heads", "num_query_groups",
            "kv_channels", "ffn_hidden_size", "max_position_embeddings", "vocab_size",
            "make_vocab_size_divisible_by", "norm_epsilon", "init_method_std", "rotary_base",
            "window_rotary_base",
            "softmax_scale", "attn_logit_softcapping", "final_logit_softcapping", "num_experts",
            "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size", "moe_router_topk",
            "moe_router_num_groups", "moe_router_group_topk", "moe_router_topk_scaling_factor",
            "activation_func_clamp_value", "full_attention_length",
        )  # fmt: skip
        if self.window_size is not None:
            self._check_window(self.window_size)
        if self.window_attn_skip_freq is not None and (
            self.window_attn_skip_freq < 2 or self.window_size is None
        ):
            raise UserError(
                f"window_attn_skip_freq: {self.window_attn_skip_freq!r} needs a window_size and "
                "two or more (set window_size, or drop it)"
            )
        if self.qk_layernorm_whole and not self.qk_layernorm:
            raise UserError("qk_layernorm_whole: True needs qk_layernorm (set it)")
        if self.qk_l2_norm and self.qk_layernorm:
            raise UserError("qk_l2_norm: True does not go with qk_layernorm (drop one of them)")
        if not self.pre_norms and (not self.post_norms or self.parallel_residual):
            raise UserError(
                "pre_norms: False needs post_norms, and no parallel_residual (change one of them)"
            )
        if self.window_rotary_base is not None and self.window_size is None:
            raise UserError(
                f"window_rotary_base: {self.window_rotary_base!r} needs a window_size (set it)"
            )
        if not self.gated and (self.activation_func_clamp_value or self.glu_linear_offset):
            raise UserError(
                f"glu_linear_offset: {self.glu_linear_offset!r} and activation_func_clamp_value "
                f"{self.activation_func_clamp_value!r} need a gated MLP (set swiglu)"
            )
        if self.post_norms and self.add_bias_linear:
            raise UserError("post_norms: True does not go with add_bias_linear (drop one of them)")
        check_latent(self)
        if self.num_experts is not None:
            check_experts(self)
        else:
            refuse_without_experts(self)
        require_within(self, "[0, 1)", "hidden_dropout", "attention_dropout")
        if not 0 < self.rotary_percent <= 1:
            raise UserError(f"rotary_percent: {self.rotary_percent!r} is outside (0, 1] (use 1)")
        if self.kv_channels is None and self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"hidden_size: {self.hidden_size!r} is not divisible by num_attention_heads "
                f"{self.num_attention_heads} (change one of them or set kv_channels)"
            )
        if self.num_query_groups and self.num_attention_heads % self.num_query_groups:
            raise UserError(
                f"num_query_groups: {self.num_query_groups!r} does not divide num_attention_heads "
                f"{self.num_attention_heads} (choose a divisor)"
            )
        if self.position_embedding_type == "rope":
            latent = self.multi_latent_attention
            self._check_rope(self.qk_pos_emb_head_dim if latent else self.head_channels)
        elif self.rope_scaling or self.no_rope_freq:
            name, value = "no_rope_freq", repr(self.no_rope_freq)
            if self.rope_scaling:
                name, value = "rope_scaling", repr(self.rope_scaling.rope_type)
            raise UserError(
                f"{name}: {value} does not go with position_embedding_type "
                f"{self.position_embedding_type} (drop one of them)"
            )

    @property
    def gated(self) -> bool:
        """Half of an MLP's first layer is a gate for the other."""
        return self.swiglu or self.activation in ("geglu_tanh", "quick_geglu")

    @property
    def direct_queries(self) -> bool:
        """Latent attention whose queries are not made from a narrow vector."""
        return self.multi_latent_attention and self.q_lora_rank is None

    @property
    def head_channels(self) -> int:
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    def _check_window(self, window: list[int]) -> None:
        causal = "write {0},0, in YAML [{0}, 0]"
        if len(window) == 1:  # the form of earlier versions
            raise UserError(
                f"window_size: {window[0]!r} is one number; Megatron's form is two, neither of "
                f"which counts the position itself ({causal.format(max(window[0] - 1, 0))})"
            )
        if len(window) != 2 or window[0] < 0:
            raise UserError(
                f"window_size: {window!r} must be how many positions one sees before and after it "
                "(write two whole numbers as in 4095,0, or drop it)"
            )
        if window[1] != 0:
            raise UserError(
                f"window_size: {window!r} sees positions after a token, which the model predicts "
                f"({causal.format(window[0])})"
            )

    def _check_rope(self, head: int) -> None:
        if self.no_rope_freq is not None:  # Megatron counts from the N-th layer
            every = self.no_rope_freq[0] if self.no_rope_freq else 0
            self.no_rope_freq = pattern_of_layers(
                "no_rope_freq", self.no_rope_freq, self.num_layers, every - 1
            )
        turned = int(head * self.rotary_percent)
        if turned % 2 or not turned:
            raise UserError(
                f"kv_channels: {self.kv_channels!r} makes rope turn {turned} channels of a head "
                "(choose an even number, two or more)"
            )
        if self.rope_scaling:
            self.rope_scaling.check_model(self.rotary_base, turned)
