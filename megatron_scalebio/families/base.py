"""What a model family is: its configuration and its tensors, in Megatron's terms.

config.json ──Family.model──▶ fields of config.ModelConfig
tensor names ──TensorMap────▶ names in a Megatron checkpoint, by a rule of `convert.rules`
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

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
        self.understood.add(key)
        return self.values.get(key)

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
        hf: names of its parts, in the order that the rule expects.
        rule: a name in `convert.rules.RULES`.
        vocab: rows are vocabulary entries, which Megatron pads.
        when: the field of ModelConfig that must be set for the tensor to exist.
    """

    megatron: str
    hf: tuple[str, ...]
    rule: str = "copy"
    vocab: bool = False
    when: str | None = None


@dataclass(frozen=True)
class Family:
    """A family of Hugging Face models.

    Args:
        architectures: names in config.json's `architectures`.
        model: fields of ModelConfig for a config.json.
        tensors: the table of tensors.
        prefix: what names begin with, and which checkpoints of the bare model leave out.
        ignored: endings of buffers in old checkpoints that are computed, not learned.
    """

    architectures: tuple[str, ...]
    model: Callable[[HfConfig], dict[str, Any]]
    tensors: tuple[TensorMap, ...]
    prefix: str = "model."
    ignored: tuple[str, ...] = (".rotary_emb.inv_freq",)


def pair(megatron: str, hf: str, **keywords: Any) -> tuple[TensorMap, TensorMap]:
    """A weight and a bias under the same names, `….weight` and `….bias`."""
    bias_when = keywords.pop("bias_when", keywords.get("when"))
    return (
        TensorMap(f"{megatron}weight", (f"{hf}weight",), **keywords),
        TensorMap(f"{megatron}bias", (f"{hf}bias",), **{**keywords, "when": bias_when}),
    )


_SCALINGS = ("linear", "llama3", "yarn", "longrope", "dynamic")


def rope(config: HfConfig) -> dict[str, Any]:
    """Rope's fields of ModelConfig."""
    # transformers takes its defaults for null, but for `truncate`, where null is false.
    given = config.take("rope_parameters")
    values = {k: v for k, v in given.items() if v is not None or k == "truncate"}
    kind = values.pop("rope_type", "default")
    values.pop("type", None)  # what `rope_type` was called
    theta = values.pop("rope_theta")
    if theta != int(theta):
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
        original = original or values["original_max_position_embeddings"]
        values["original_max_position_embeddings"] = original
        values.setdefault("factor", config.take("max_position_embeddings") / original)
    return {**fields, "rope_scaling": {"rope_type": kind, **values}}


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
