"""Compares a Megatron checkpoint with a Hugging Face folder, layer by layer, on fixed tokens.

Both models run in fp32, one after the other, so that one of them is in memory at a time.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_scalebio.config_loader import load_config
from megatron_scalebio.convert.exporter import ExportPlan
from megatron_scalebio.errors import UserError

_PROMPTS, _LENGTH = 4, 64  # sequences, tokens
# Rounding in fp32 gives about 1e-6 a layer; a wrong tensor or option gives far more.
TOLERANCE = 1e-3
# An expert's number in the names of its weights, one by one or grouped.
_EXPERT = re.compile(r"local_experts\.(\d+)\.|experts\.linear_fc\d\.weight(\d+)$")


@dataclass(frozen=True)
class Step:
    """One place in the model, and the models' difference there: of any token's vector, the largest
    difference over the largest value."""

    name: str
    difference: float


def verify(hf: Path, load: Path, which: str = "w") -> list[Step]:
    """Runs both models on the same tokens.

    Args:
        hf: Hugging Face folder with weights, a tokenizer not needed, or a GGUF file.
        load: Megatron checkpoint.

    Returns:
        The embedding, every layer, the final norm and the logits, in this order.

    Raises:
        UserError: naming the first of them that departs by more than `TOLERANCE`.
    """
    plan = ExportPlan(load, hf, which, None, carries=False)
    config = load_config(None, {"model": {"hf": str(hf)}})
    assert config.model.vocab_size is not None
    generator = torch.Generator().manual_seed(0)
    limits = config.model.max_position_embeddings, config.model.full_attention_length
    length = min(_LENGTH, *(limit for limit in limits if limit))
    config.data.seq_length = length  # longrope's frequencies go by it
    tokens_BS = torch.randint(config.model.vocab_size, (_PROMPTS, length), generator=generator)
    theirs = _run_transformers(hf, tokens_BS)
    ours = _run_megatron(config, plan, tokens_BS)
    assert list(ours) == list(theirs)
    steps = [Step(name, _difference(ours[name], theirs[name])) for name in ours]
    for step in steps:
        if not step.difference <= TOLERANCE:
            raise UserError(
                f"{load}: {step.name} departs from transformers by {step.difference:.1e} of the "
                f"largest value (up to {TOLERANCE:.0e} is rounding) (do not use the conversion, "
                "and report it with the model)"
            )
    return steps


def _difference(ours_BSH: Tensor, theirs_BSH: Tensor) -> float:
    # Token by token: the first tokens of a sequence often have values a thousandfold of the others.
    relative_BS = (ours_BSH - theirs_BSH).abs().amax(-1) / theirs_BSH.abs().amax(-1)
    return relative_BS.max().item()


@torch.no_grad()
def _run_transformers(hf: Path, tokens_BS: Tensor) -> dict[str, Tensor]:
    from transformers import AutoModelForCausalLM

    gguf = {"gguf_file": hf.name} if hf.suffix == ".gguf" else {}
    # Its grouped products ask for experts of certain widths.
    model = AutoModelForCausalLM.from_pretrained(
        hf.parent if gguf else hf, dtype=torch.float32, attn_implementation="eager",
        experts_implementation="eager", local_files_only=True, trust_remote_code=False, **gguf,
    ).eval()  # fmt: skip
    body = getattr(model, "model", model.base_model)
    layers = body.h if hasattr(body, "h") else body.layers
    with _outputs_of(dict(_named(layers)), lambda output: output) as held:
        result = model(tokens_BS, output_hidden_states=True, use_cache=False)
    return {
        "embedding": result.hidden_states[0],
        **held,
        "final norm": result.hidden_states[-1],
        "logits": result.logits,
    }


@torch.no_grad()
def _run_megatron(config: Any, plan: ExportPlan, tokens_BS: Tensor) -> dict[str, Tensor]:
    from megatron_scalebio import runtime
    from megatron_scalebio.model.provider import build_model
    from megatron_scalebio.model.settings import transformer_config

    runtime.start(config)
    try:
        vocab = config.model.vocab_size
        model: Any = build_model(config, transformer_config(config), vocab)[0]
        _fill(model, plan)
        model.eval()
        places = {
            "embedding": model.embedding,
            **_named(model.decoder.layers),
            "final norm": model.decoder.final_layernorm,
        }
        tokens_BS = tokens_BS.to(runtime.device())
        positions_BS = torch.arange(tokens_BS.shape[1], device=tokens_BS.device).expand_as(
            tokens_BS
        )
        with _outputs_of(places, lambda output_SBH: output_SBH.transpose(0, 1)) as held:
            logits_BSV = model(tokens_BS, positions_BS, None)
        return {**held, "logits": logits_BSV[..., :vocab].float().cpu()}
    finally:
        runtime.stop_model_parallel()


def _named(layers: Any) -> dict[str, Any]:
    return {f"layer {number}": layer for number, layer in enumerate(layers)}


@contextmanager
def _outputs_of(
    places: dict[str, Any], change: Callable[[Tensor], Tensor]
) -> Iterator[dict[str, Tensor]]:
    """Collects what modules give, B × S × H."""
    held: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            held[name] = change(hidden).float().cpu()

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in places.items()]
    try:
        yield held
    finally:
        for handle in handles:
            handle.remove()


def _fill(model: Any, plan: ExportPlan) -> None:
    """Loads the checkpoint's tensors, rounded as they are in the Hugging Face folder."""
    wholes = {(whole.layer_key, whole.expert): whole for whole in plan.table.wholes}
    filled = set()
    state = model.sharded_state_dict(metadata={"non_homogeneous_layers": True})
    for name, entry in state.items():
        expert = _EXPERT.search(name)
        key = (entry.key, int(expert[1] or expert[2]) if expert else None)
        whole = wholes.get(key)
        if whole is not None:
            entry.data[: whole.shape[0]].copy_(plan.read_rounded(whole))
            filled.add(key)
    assert filled == set(wholes), filled ^ set(wholes)
