"""What a model family is: its configuration and its tensors, in Megatron's terms.

config.json ──Family.model──▶ fields of config.ModelConfig
tensor names ──TensorMap────▶ names in a Megatron checkpoint, by a rule of `convert.rules`
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from megatron_scalebio.errors import UserError

# Keys of a config.json that no forward pass of a causal language model depends on. Dropout is for
# the user to decide: Hugging Face's value applies to training only.
_HARMLESS = {
    "architectures", "model_type", "transformers_version", "dtype", "torch_dtype", "_name_or_path",
    "bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "initializer_range",
    "pretraining_tp", "return_dict", "output_hidden_states", "output_attentions", "id2label",
    "label2id", "problem_type", "chunk_size_feed_forward", "is_encoder_decoder",
    "attention_dropout", "hidden_dropout", "classifier_dropout", "resid_pdrop", "embd_pdrop",
    "attn_pdrop", "is_decoder", "reorder_and_upcast_attn", "cache_implementation",
}  # fmt: skip


class _Kind(NamedTuple):
    """What a value has to be, and in words."""

    holds: Callable[[Any], bool]
    words: str


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _whole(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**40


_KIND_OF = {
    key: kind
    for keys, kind in (
        ("num_hidden_layers hidden_size num_attention_heads intermediate_size vocab_size n_embd "
         "max_position_embeddings n_layer n_head n_positions num_experts num_local_experts "
         "num_experts_per_tok moe_intermediate_size decoder_sparse_step n_routed_experts "
         "n_shared_experts kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim "
         "intermediate_size_mlp attention_chunk_size floor_scale",
         _Kind(_whole, "a whole number")),
        ("first_k_dense_replace", _Kind(lambda value: value == 0 or _whole(value),
                                        "a whole number or 0")),
        ("head_dim num_key_value_heads n_inner sliding_window original_max_position_embeddings "
         "q_lora_rank n_group topk_group",
         _Kind(lambda value: value is None or _whole(value), "a whole number or null")),
        ("rms_norm_eps layer_norm_epsilon layer_norm_eps query_pre_attn_scalar "
         "routed_scaling_factor swiglu_limit",
         _Kind(lambda value: is_number(value) and value > 0, "a number above 0")),
        ("attn_logit_softcapping final_logit_softcapping",
         _Kind(lambda value: value is None or (is_number(value) and value > 0),
               "a number above 0 or null")),
        ("tie_word_embeddings use_parallel_residual norm_topk_prob use_qk_norm "
         "attn_temperature_tuning",
         _Kind(lambda value: isinstance(value, bool), "true or false")),
        ("rope_parameters", _Kind(lambda value: isinstance(value, dict), "an object")),
        ("no_rope_layers",
         _Kind(lambda value: isinstance(value, list) and set(value) <= {0, 1},
               "a 1 or 0 for each layer")),
        ("architectures layer_types",
         _Kind(lambda value: value is None or (isinstance(value, list)
                                               and all(isinstance(v, str) for v in value)),
               "a list of names or null")),
    )
    for key in keys.split()
}  # fmt: skip


@dataclass
class HfConfig:
    """A model's config.json, which keeps account of what was understood.

    Args:
        values: all values, defaults filled in and names normalized by transformers.
        defaults: what the model's class takes where config.json is silent.
        where: the file, for messages.
    """

    values: dict[str, Any]
    defaults: dict[str, Any]
    where: str
    understood: set[str] = field(default_factory=set)

    def take(self, key: str) -> Any:
        """The value of a key, of the type that every family expects of it."""
        self.understood.add(key)
        value = self.values.get(key)
        kind = _KIND_OF.get(key)
        if kind is not None and not kind.holds(value):
            raise self.refuse(key, f"{kind.words} is expected; mend it, or fetch the file again")
        return value

    def of_text(self) -> "HfConfig":
        """The part that is the language model's, of a model that has others."""
        values, defaults = (each["text_config"] for each in (self.values, self.defaults))
        return HfConfig(values, defaults, self.where)

    def refuse(self, key: str, known: str) -> UserError:
        return UserError(
            f"{self.where}: {key}: {self.values.get(key)!r} is not supported ({known})"
        )

    def require(self, key: str, *allowed: Any) -> Any:
        """Takes a value and refuses the model if it is not one of those supported."""
        value = self.take(key)
        if value not in allowed:
            raise self.refuse(key, "supported: " + ", ".join(repr(a) for a in allowed))
        return value

    def refuse_rest(self) -> None:
        """Refuses options that the model's class knows, this family does not, and that are set."""
        for key, default in self.defaults.items():
            known = key in self.understood or key in _HARMLESS or key.startswith("summary_")
            if not known and self.values.get(key) != default:
                raise self.refuse(key, f"only {default!r} is")


@dataclass(frozen=True)
class TensorMap:
    """One tensor of a Megatron checkpoint and the Hugging Face tensors it is made of.

    Args:
        megatron: its name; `{}` stands for the layer.
        hf: names of its parts, in the order that the rule expects; a second `{}` stands for the
            expert, and `…[{}]` for its part of a tensor of all experts.
        rule: a name in `convert.rules.RULES`.
        vocab: rows are vocabulary entries, which Megatron pads.
        when: the field of ModelConfig that must be set for the tensor to exist.
        layers: which layers have it [all].
    """

    megatron: str
    hf: tuple[str, ...]
    rule: str = "copy"
    vocab: bool = False
    when: str | None = None
    layers: Literal["dense", "experts"] | None = None

    @property
    def per_expert(self) -> bool:
        return self.hf[0].count("{}") == 2


@dataclass(frozen=True)
class Family:
    """A family of Hugging Face models.

    Args:
        architectures: names in config.json's `architectures`.
        model: fields of ModelConfig for a config.json.
        tensors: the table of tensors.
        prefix: what names begin with, and which checkpoints of the bare model leave out.
        ignored: endings of buffers in old checkpoints that are computed, not learned.
        more_layers: a file may have layers after the last (multi-token prediction), which are kept
            on the way through and do not train.
        packed: a file may have experts' matrices as MXFP4.
        beside: what names of the model's other parts, for images, begin with. They are kept on the
            way through and do not train; `text_config` in config.json is then the model's.
    """

    architectures: tuple[str, ...]
    model: Callable[[HfConfig], dict[str, Any]]
    tensors: tuple[TensorMap, ...]
    prefix: str = "model."
    ignored: tuple[str, ...] = (".rotary_emb.inv_freq",)
    more_layers: bool = False
    packed: bool = False
    beside: tuple[str, ...] = ()


LAYER, HF_LAYER = "decoder.layers.{}.", "model.layers.{}."


def rows(hf_of: Mapping[str, str | tuple[str, str]], **keywords: Any) -> tuple[TensorMap, ...]:
    """Tensors of layers: the name in a layer of Megatron → that in a layer of Hugging Face.

    Of two, a gate and what it gates, Megatron has one matrix.
    """
    parts = {name: (hf,) if isinstance(hf, str) else hf for name, hf in hf_of.items()}
    return tuple(
        TensorMap(
            f"{LAYER}{name}", tuple(f"{HF_LAYER}{part}" for part in hf),
            "copy" if len(hf) == 1 else "stack_rows", **keywords,
        )
        for name, hf in parts.items()
    )  # fmt: skip


def pair(megatron: str, hf: str) -> tuple[TensorMap, TensorMap]:
    """A weight and a bias under the same names, `….weight` and `….bias`."""
    return (
        TensorMap(f"{megatron}weight", (f"{hf}weight",)),
        TensorMap(f"{megatron}bias", (f"{hf}bias",)),
    )


def head(hf: str) -> TensorMap:
    """The output head, where it is not the embedding."""
    return TensorMap(
        "output_layer.weight", (hf,), vocab=True, when="untie_embeddings_and_output_weights"
    )


_ROPE_NUMBERS = {
    "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings",
    "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
    "attention_factor",
}  # fmt: skip
_LAYER_KINDS = ("full_attention", "sliding_attention")
_SCALINGS = ("linear", "llama3", "yarn", "longrope", "dynamic")


def rope(config: HfConfig) -> dict[str, Any]:
    """Rope's fields of ModelConfig."""
    # transformers takes its defaults for null, but for `truncate`, where null is false.
    given = config.take("rope_parameters")
    values = {k: v for k, v in given.items() if v is not None or k == "truncate"}
    kind = values.pop("rope_type", "default")
    values.pop("type", None)  # what `rope_type` was called
    for name, value in values.items():
        _check_rope(config, name, value)
    theta = values.pop("rope_theta", None)
    if theta is None or theta != int(theta) or theta <= 0:
        raise config.refuse("rope_parameters", "rope_theta must be a whole number")
    fields: dict[str, Any] = {
        "rotary_base": int(theta),
        "rotary_percent": values.pop("partial_rotary_factor", 1.0),
    }
    if kind == "default":
        return fields
    if kind not in _SCALINGS:
        raise config.refuse("rope_parameters", f"supported: default, {', '.join(_SCALINGS)}")
    if kind in ("llama3", "yarn", "longrope"):
        # Beside rope's options it goes before the same among them, as in transformers.
        original = config.take("original_max_position_embeddings")
        original = original or values.get("original_max_position_embeddings")
        if not _whole(original):
            raise config.refuse(
                "rope_parameters", "original_max_position_embeddings must be a whole number"
            )
        values["original_max_position_embeddings"] = original
        values.setdefault("factor", config.take("max_position_embeddings") / original)
    return {**fields, "rope_scaling": {"rope_type": kind, **values}}


def layered_rope(config: HfConfig) -> dict[str, Any]:
    """`rope` where layers with a window have a plain one of their own, and the window's fields."""
    given = config.take("rope_parameters")
    if not all(isinstance(given.get(kind), dict) for kind in _LAYER_KINDS) or len(given) != 2:
        raise config.refuse("rope_parameters", f"options of {' and '.join(_LAYER_KINDS)}")
    full, window = (
        rope(replace(config, values={**config.values, "rope_parameters": given[kind]}))
        for kind in _LAYER_KINDS
    )
    if "rope_scaling" in window or window["rotary_percent"] != full["rotary_percent"]:
        raise config.refuse("rope_parameters", "supported: sliding_attention without scaling")
    windows = sliding_window(config)
    if windows:
        full["window_rotary_base"] = window["rotary_base"]
    return {**full, **windows}


def _check_rope(config: HfConfig, name: str, value: Any) -> None:
    """Refuses an option of rope of another type than all kinds of rope expect."""
    if name == "truncate":
        good = value is None or isinstance(value, bool)
    elif name in ("short_factor", "long_factor"):
        good = isinstance(value, list) and all(is_number(factor) for factor in value)
    elif name not in _ROPE_NUMBERS:
        raise config.refuse("rope_parameters", f"unknown key {name!r}")
    else:
        least = 0 if name in ("factor", "rope_theta") else -math.inf
        good = is_number(value) and least < value < 2**53
    if not good:
        raise config.refuse(
            "rope_parameters",
            f"{name} can't be {value!r}; mend it, or fetch the file again",
        )


def sliding_window(config: HfConfig) -> dict[str, Any]:
    """The window's fields of ModelConfig, from `sliding_window` and which layers use it."""
    size, kinds = config.take("sliding_window"), config.take("layer_types")
    if size is None or not any(
        kind == "sliding_attention" for kind in kinds or ["sliding_attention"]
    ):
        return {}
    window = [size - 1, 0]  # transformers counts the position itself, Megatron those before it
    if kinds is None or "full_attention" not in kinds:
        return {"window_size": window}
    every = kinds.index("full_attention") + 1
    pattern = [
        "full_attention" if number % every == 0 else "sliding_attention"
        for number in range(1, len(kinds) + 1)
    ]
    if every < 2 or kinds != pattern:
        raise config.refuse("layer_types", "supported: every N-th layer full, the others sliding")
    return {"window_size": window, "window_attn_skip_freq": every}
