"""The Hugging Face model families that can be read and written, found by architecture."""

import json
from pathlib import Path
from typing import Any

from megatron_scalebio.errors import UserError
from megatron_scalebio.families import deepseek, experts, gemma2, gpt, gpt_oss, llama, llama4, olmo
from megatron_scalebio.families.base import Family, HfConfig, TensorMap

__all__ = ["FAMILIES", "Family", "TensorMap", "read_family"]

FAMILIES = {
    name: family
    for module in (gpt, llama, gemma2, experts, olmo, gpt_oss, deepseek, llama4)
    for family in module.FAMILIES
    for name in family.architectures
}

MOST_LAYERS = 10_000  # transformers makes a list of them, or of labels, as long as it is told to


def read_family(hf: str | Path) -> tuple[Family, dict[str, Any]]:
    """The family of a Hugging Face folder (or GGUF file), and its fields of ModelConfig.

    Raises:
        UserError: naming the file, and the architecture or option that is not supported.
    """
    config = _read_config(Path(hf))
    architecture = (config.take("architectures") or ["nothing"])[0]
    family = FAMILIES.get(architecture)
    if family is None:
        raise UserError(
            f"{config.where}: architectures: {architecture!r} is not supported (supported: "
            f"{', '.join(sorted(FAMILIES))})"
        )
    quantization = config.values.get("quantization_config") or {}
    if quantization and not (family.packed and quantization.get("quant_method") == "mxfp4"):
        raise config.refuse(
            "quantization_config",
            "convert the model to plain weights; if they are plain already, delete this key",
        )
    if family.beside:
        config = config.of_text()
    fields = family.model(config)
    config.refuse_rest()
    return family, fields


def _raised_by_transformers() -> tuple[type[Exception], ...]:
    """What its classes raise: whatever a value that they do not expect leads to."""
    from huggingface_hub.errors import StrictDataclassError

    return (ArithmeticError, AttributeError, ImportError, LookupError, OSError, RecursionError,
            StrictDataclassError, TypeError, ValueError)  # fmt: skip


def _culprit(given: dict[str, Any]) -> str | None:
    """The field of a config.json without which transformers would read it, if it is one."""
    from transformers import CONFIG_MAPPING

    kind = given.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        return "model_type" if "model_type" in given else None
    for key in given:
        try:
            CONFIG_MAPPING[kind].from_dict({k: v for k, v in given.items() if k != key})
        except _raised_by_transformers():
            continue
        return key
    return None


def _read_config(hf: Path) -> HfConfig:
    gguf = hf.name if hf.suffix == ".gguf" else None
    folder = hf.parent if gguf else hf
    where = hf if gguf else folder / "config.json"
    try:
        if not gguf:
            given = json.loads(where.read_text())
            if not isinstance(given, dict):
                raise ValueError("not an object")
            of_text = given.get("text_config")
            for key in ("num_hidden_layers", "n_layer", "num_labels"):
                counts = [part.get(key) for part in (given, of_text) if isinstance(part, dict)]
                if most := [n for n in counts if isinstance(n, int) and n > MOST_LAYERS]:
                    raise UserError(
                        f"{where}: {key}: {most[0]!r} is not supported ({MOST_LAYERS} at most; "
                        "mend it, or fetch the file again)"
                    )
        elif not hf.is_file():
            raise FileNotFoundError(2, "No such file", str(hf))
    except OSError as error:
        raise UserError(
            error.strerror or str(error),
            where=str(where),
            fix="point to the Hugging Face folder of a model; a tokenizer's is not enough",
        ) from None
    except (RecursionError, ValueError) as error:
        raise UserError(f"{where}: not valid JSON: {error} (fetch it again)") from None
    from transformers import AutoConfig  # takes a second

    try:
        config = AutoConfig.from_pretrained(
            folder, gguf_file=gguf, local_files_only=True, trust_remote_code=False
        )
    except _raised_by_transformers() as error:
        line = " ".join(str(error).split())[:300] or type(error).__name__
        if not gguf and (culprit := _culprit(given)):
            value = str(given[culprit])[:80]
            raise UserError(
                f"{where}: {culprit}: {value!r} is not supported by transformers: {line} (mend it, "
                "or fetch the file again)"
            ) from None
        raise UserError(
            f"{where}: transformers can't read it: {line} (supported: "
            f"{', '.join(sorted(FAMILIES))})"
        ) from None
    values = config.to_dict()
    if not gguf:
        # transformers makes other values of some, such as a list of an object's keys.
        values["architectures"] = given.get("architectures")
    if gguf and not values.get("architectures"):
        values["architectures"] = [_ARCHITECTURE_OF.get(values["model_type"], "unknown")]
    return HfConfig(values, type(config)().to_dict(), str(where))


# A GGUF file names the model type alone.
_ARCHITECTURE_OF = {
    "gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "gemma2": "Gemma2ForCausalLM",
}  # fmt: skip
