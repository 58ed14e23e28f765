"""A family's table, written out for one model: every tensor of Megatron and what it is made of.

It decides which names a Hugging Face checkpoint must have, and which it may have besides:

    names without the family's prefix   checkpoints of the bare model (GPT-2 on the hub)
    an output head although it is tied  must equal the embedding
    computed buffers                    the family's `ignored`; left out
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_scalebio.config import ModelConfig
from megatron_scalebio.convert.rules import RULES
from megatron_scalebio.convert.shapes import heads_of, megatron_shape
from megatron_scalebio.errors import UserError
from megatron_scalebio.families import Family, TensorMap

_EMBEDDING, _HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
_UNTIED = "untie_embeddings_and_output_weights"


@dataclass(frozen=True)
class Part:
    """One Hugging Face tensor: its name in the table and its shape."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Whole:
    """One tensor of Megatron, of one layer where it belongs to a layer.

    Args:
        map: its row of the family's table.
        model: that it is of.
        layer: None outside the layers.
        expert: None but for an expert's own.
        shape: over all TP ranks, without the padding of the vocabulary.
        parts: what it is made of.
    """

    map: TensorMap
    model: ModelConfig
    layer: int | None
    expert: int | None
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def key(self) -> str:
        """Its name in a checkpoint that is written here."""
        layers_alike = self.model.moe_layer_freq is None
        return self.stacked_key if layers_alike else self.layer_key

    @property
    def stacked_key(self) -> str:
        """Its name where all layers are one tensor (layers, …)."""
        return self.map.megatron.replace(".{}", "")

    @property
    def layer_key(self) -> str:
        """Its name where each layer is a tensor of its own."""
        return self.map.megatron.format(self.layer)

    def place_in(self, key: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Where it is in a checkpoint's tensor of that name: index and sizes of the first axes."""
        axes = [(self.layer, self.model.num_layers)] if key == self.stacked_key else []
        axes.append((self.expert, self.model.num_experts or 0))
        held = [(at, size) for at, size in axes if at is not None]
        return tuple(at for at, _ in held), tuple(size for _, size in held)

    def to_megatron(self, parts: list[Tensor]) -> Tensor:
        return RULES[self.map.rule].to_megatron(parts, heads_of(self.model))

    def to_hf(self, whole: Tensor) -> dict[str, Tensor]:
        """Its parts by the table's names."""
        tensors = RULES[self.map.rule].to_hf(whole, heads_of(self.model))
        return {part.name: tensor for part, tensor in zip(self.parts, tensors, strict=True)}


class Table:
    """All tensors of a model.

    Args:
        wholes: the tensors of Megatron, in the table's order, layer by layer.
        parts: name of a Hugging Face tensor → the tensor that it is part of.
        tied: (the head's name, the embedding's), if the model has one tensor for both.
    """

    def __init__(self, family: Family, model: ModelConfig) -> None:
        self._family = family
        self._model = model
        rows = [row for row in family.tensors if row.when is None or getattr(model, row.when)]
        outer = [row for row in rows if "{}" not in row.megatron]
        inner = [row for row in rows if "{}" in row.megatron]
        pattern = model.moe_layer_freq or [1] * model.num_layers
        has_experts = [model.num_experts is not None and bool(each) for each in pattern]
        self.wholes = [self._whole(row, None) for row in outer if not row.megatron.startswith("d")]
        self.wholes += [
            self._whole(row, layer, expert)
            for layer, experts in enumerate(has_experts)
            for row in inner
            if row.layers is None or row.layers == ("experts" if experts else "dense")
            for expert in (range(model.num_experts or 0) if row.per_expert else [None])
        ]
        self.wholes += [self._whole(row, None) for row in outer if row.megatron.startswith("d")]
        self.parts = {part.name: whole for whole in self.wholes for part in whole.parts}
        names = {row.megatron: row.hf[0] for row in family.tensors}
        is_tied = not model.untie_embeddings_and_output_weights and _HEAD in names
        self.tied = (names[_HEAD], names[_EMBEDDING]) if is_tied else None

    def _whole(self, row: TensorMap, layer: int | None, expert: int | None = None) -> Whole:
        model = self._model
        shape = megatron_shape(row.megatron, model)
        shapes = RULES[row.rule].to_hf(torch.empty(shape, device="meta"), heads_of(model))
        parts = tuple(
            Part(name.format(layer, expert), tuple(part.shape))
            for name, part in zip(row.hf, shapes, strict=True)
        )
        return Whole(row, model, layer, expert, shape, parts)

    def ignores(self, name: str) -> bool:
        """True for what does not train: buffers, a layer after the last, parts for images."""
        if self._family.more_layers:
            layer = re.match(rf"{re.escape(self._family.prefix)}layers\.(\d+)\.", name)
            if layer and int(layer[1]) >= self._model.num_layers:
                return True
        return name.endswith(self._family.ignored) or name.startswith(self._family.beside)

    def names_in(self, held: Iterable[str], where: dict[str, Path]) -> dict[str, str]:
        """Finds the table's tensors among the names of a checkpoint.

        Args:
            held: the checkpoint's names.
            where: each name's file, for messages.

        Returns:
            name in the table → name in the checkpoint; with `tied`, both names may be there.

        Raises:
            UserError: naming a tensor that the model has no place for, or one that is missing.
        """
        known = set(self.parts) | set(self.tied or ())
        found: dict[str, str] = {}
        for name in held:
            full = next((n for n in (name, self._family.prefix + name) if n in known), None)
            if full is not None:
                if full in found:
                    raise UserError(f"{where[name]}: {found[full]} and {name} are the same tensor")
                found[full] = name
            elif not self.ignores(name):
                raise UserError(
                    f"{where[name]}: unexpected tensor {name} (config.json describes another model)"
                )
        if self.tied and self.tied[1] not in found and self.tied[0] in found:
            found[self.tied[1]] = found[self.tied[0]]
        missing = [name for name in self.parts if name not in found]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            files = sorted(set(where.values()))
            in_all = files[0].parent if len(files) > 1 else files[0] if files else "the checkpoint"
            raise UserError(
                f"{in_all}: lacks tensor {missing[0]}{more} (config.json describes another model, "
                "or the download is incomplete)"
            )
        return found
