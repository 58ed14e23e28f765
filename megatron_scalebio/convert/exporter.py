"""Megatron → Hugging Face: one file of weights after the other, one tensor in memory at a time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from megatron_scalebio.checkpoint.folder import find_checkpoint
from megatron_scalebio.checkpoint.integrity import changed_file
from megatron_scalebio.config_loader import load_config
from megatron_scalebio.convert.carry import carry, files_to_carry
from megatron_scalebio.convert.layout import OutFile, OutTensor, fresh_layout, layout_of
from megatron_scalebio.convert.megatron_reader import (
    MegatronFolder,
    open_u,
    padding_multiple,
)
from megatron_scalebio.convert.output import new_folder, refuse_existing
from megatron_scalebio.convert.ranks import Ranks, joined
from megatron_scalebio.convert.safetensors_file import bytes_of, write_all, writing
from megatron_scalebio.convert.source import Source, has_weights, open_source
from megatron_scalebio.convert.stacked import ByExpert, Unpacked, tensor_of, unpacked
from megatron_scalebio.convert.table import Table, Whole
from megatron_scalebio.errors import UserError
from megatron_scalebio.families import read_family

Progress = Callable[[int, int], None]
Dtype = Literal["checkpoint", "float32", "bfloat16"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def export_checkpoint(
    load: Path,
    hf_reference: Path,
    save: Path,
    *,
    which: Literal["w", "u"] = "w",
    dtype: Dtype | None = None,
    on_progress: Progress | None = None,
) -> None:
    """Writes a Hugging Face folder like the reference, with the weights of a Megatron checkpoint.

    Args:
        load: a folder with a tracker file (a run's `checkpoints`), or of one checkpoint.
        hf_reference: gives architecture, names, files, dtypes, tokenizer and all else; without
            weights of its own, the files are this module's choice and the dtype the checkpoint's.
        save: a new folder.
        which: the model of a bilevel run.
        dtype: of the weights, if not that of the reference's.
        on_progress: is told bytes done and bytes in all of this rank's share.

    Raises:
        UserError: naming the file and the tensor at fault; nothing is left behind.
    """
    with joined() as ranks:
        ranks.main(lambda: refuse_existing(save))
        plan = ranks.each(lambda: ExportPlan(load, hf_reference, which, dtype))
        ranks.each(lambda: plan.refuse_changed(ranks))
        with new_folder(save, plan.layout.nbytes, ranks) as temporary:
            share = ranks.share(plan.layout.files, lambda file: file.nbytes)
            ranks.each(partial(_write_files, plan, share, temporary, on_progress))
            ranks.main(partial(_complete, plan, hf_reference, temporary))


def _complete(plan: ExportPlan, reference: Path, folder: Path) -> None:
    if plan.layout.index:
        name, content = plan.layout.index
        (folder / name).write_text(content)
    carry(reference, plan.carried, folder, plan.new_dtype)


def _write_files(
    plan: ExportPlan, files: list[OutFile], folder: Path, on_progress: Progress | None
) -> None:
    done, total = 0, sum(file.nbytes for file in files)
    for file in files:
        parts = Parts(plan, file)
        with writing(folder / file.name, file.header) as stream:
            for tensor in file.tensors:
                content = parts.take(tensor.name).to(tensor.dtype).contiguous()
                assert tuple(content.shape) == tensor.shape
                write_all(stream, bytes_of(content))
                done += tensor.nbytes
                if on_progress:
                    on_progress(done, total)


class ExportPlan:
    """What is read and what is written; all that can be known to be wrong is refused here.

    Args:
        layout: the files to write.
        carried: files of the reference that are copied.
        new_dtype: what config.json must say instead of what it says, if anything.
        pieces: name to write → itself, or of what holds all experts, `name[0]` and so on.
        wholes: piece → the tensor of Megatron that it is part of; None for a buffer.
        names: piece → name in the family's table.
    """

    def __init__(
        self, load: Path, reference: Path, which: str, dtype: Dtype | None, carries: bool = True
    ) -> None:
        family, _ = read_family(reference)
        self.carried = files_to_carry(reference) if carries else []
        self.table = Table(family, load_config(None, {"model": {"hf": str(reference)}}).model)
        folder = find_checkpoint(load)
        self._w = MegatronFolder(folder)
        self._u = open_u(folder) if which == "u" else None
        self._check(family.architectures[0])
        has_any = reference.suffix == ".gguf" or has_weights(reference)
        self.source: Source | None = unpacked(open_source(reference)) if has_any else None
        if family.beside and not has_any:
            raise UserError(
                f"{reference}: has no weights, of which those of {', '.join(family.beside)} are "
                "needed, which do not train (use the whole folder)"
            )
        self.names, self.wholes = self._names()
        self.pieces: dict[str, list[str]] = {}
        for piece in self.wholes:
            self.pieces.setdefault(tensor_of(piece), []).append(piece)
        self._dtype = dtype
        if self.source:
            self.layout = layout_of(self.source, self._dtype_of)
        else:
            self.layout = fresh_layout(self._fresh_tensors())
        self.new_dtype = self._new_dtype(dtype)

    def refuse_changed(self, ranks: Ranks) -> None:
        """Raises UserError if a file of this rank's share is not what was saved."""
        for checkpoint in (self._w, self._u):
            problem = checkpoint and changed_file(checkpoint.folder, ranks.rank, ranks.size)
            if problem:
                raise UserError(f"{problem} (the checkpoint is damaged: use another)")

    def checkpoint_of(self, whole: Whole) -> MegatronFolder:
        """u's own part of the checkpoint where u is asked for and departed from w."""
        return self._u if self._u is not None and self._u.holds(whole) else self._w

    def read(self, whole: Whole) -> dict[str, Tensor]:
        """The parts of a tensor of Megatron, without the padding of the vocabulary."""
        return whole.to_hf(self.checkpoint_of(whole).read(whole, whole.shape[0]))

    def read_rounded(self, whole: Whole) -> Tensor:
        """A tensor of Megatron in the dtype in which it is written, without padding."""
        dtypes = {t.name: t.dtype for file in self.layout.files for t in file.tensors}
        tensor = self.checkpoint_of(whole).read(whole, whole.shape[0])
        return tensor.to(next(dtypes[tensor_of(n)] for n, w in self.wholes.items() if w is whole))

    def _check(self, architecture: str) -> None:
        for whole in self.table.wholes:
            if not self._w.holds(whole):
                raise UserError(
                    f"{self._w.folder}: lacks tensor {whole.stacked_key}, which {architecture} "
                    f"needs ({_FIX})"
                )
            shape = self.checkpoint_of(whole).shape(whole)
            if shape != whole.shape and not self._is_padded(whole, shape):
                raise UserError(
                    f"{self._w.folder}: {whole.stacked_key} has shape {list(shape)}, the "
                    f"reference's config.json asks for {list(whole.shape)} ({_FIX})"
                )
        unknown = self._w.unknown(self.table.wholes)
        if unknown:
            raise UserError(
                f"{self._w.folder}: holds tensor {unknown[0]}, for which {architecture} has no "
                f"place ({_FIX})"
            )

    def _is_padded(self, whole: Whole, shape: tuple[int, ...]) -> bool:
        """True if a shape is the reference's and rows that pad the vocabulary."""
        multiple = padding_multiple(self._w.folder) or shape[0]
        rows = math.ceil(whole.shape[0] / multiple) * multiple
        return whole.map.vocab and shape == (rows, *whole.shape[1:])

    def _names(self) -> tuple[dict[str, str], dict[str, Whole | None]]:
        if self.source is None:
            return {name: name for name in self.table.parts}, dict(self.table.parts)
        tensors = ByExpert(self.source, self.table.parts).tensors
        files = {name: info.file for name, info in tensors.items()}
        found = self.table.names_in(tensors, files)
        head, embedding = self.table.tied or ("", "")
        names = {held: embedding if name == head else name for name, held in found.items()}
        wholes = {name: self.table.parts.get(names.get(name, "")) for name in tensors}
        for name, whole in wholes.items():
            part = whole and next(part for part in whole.parts if part.name == names[name])
            if part and part.shape != tensors[name].shape:
                raise UserError(
                    f"{tensors[name].file}: {name} has shape "
                    f"{list(tensors[name].shape)}, config.json asks for "
                    f"{list(part.shape)} (fetch the reference again)"
                )
        return names, wholes

    def _dtype_of(self, tensor: OutTensor) -> torch.dtype:
        """The dtype in which to write a tensor of the reference."""
        whole = self.wholes[self.pieces[tensor.name][0]]
        if whole is None or self._dtype is None:
            return tensor.dtype
        return self._asked_dtype(whole)

    def _asked_dtype(self, whole: Whole) -> torch.dtype:
        held = self.checkpoint_of(whole).dtype(whole)
        return _DTYPES.get(self._dtype or "checkpoint", held)

    def _fresh_tensors(self) -> list[OutTensor]:
        tensors = []
        for name, pieces in self.pieces.items():
            whole = self.table.parts[pieces[0]]
            shape = next(part.shape for part in whole.parts if part.name == pieces[0])
            stacked = () if pieces == [name] else (len(pieces),)
            tensors.append(OutTensor(name, self._asked_dtype(whole), (*stacked, *shape)))
        return tensors

    def _new_dtype(self, dtype: Dtype | None) -> torch.dtype | None:
        if self.source is not None and dtype is None:
            return torch.bfloat16 if isinstance(self.source, Unpacked) else None
        whole = next(w for w in self.table.wholes if "linear_proj.weight" in w.map.megatron)
        return self._asked_dtype(whole)


_FIX = "use the Hugging Face folder of the model that the checkpoint came from"


class Parts:
    """The tensors of one file. What was read for one is kept until the file's others took theirs.

    (q, k and v are one tensor of Megatron.)
    """

    def __init__(self, plan: ExportPlan, file: OutFile) -> None:
        self._plan = plan
        pieces = (piece for tensor in file.tensors for piece in plan.pieces[tensor.name])
        self._wanted = Counter(map(plan.names.get, pieces))
        self._kept: dict[str, Tensor] = {}

    def take(self, name: str) -> Tensor:
        pieces = self._plan.pieces[name]
        if pieces == [name]:
            return self._take(name)
        return torch.stack([self._take(piece) for piece in pieces])

    def _take(self, name: str) -> Tensor:
        whole = self._plan.wholes[name]
        if whole is None:
            assert self._plan.source is not None
            return self._plan.source.read(name)
        part = self._plan.names[name]
        if part not in self._kept:
            parts = self._plan.read(whole)
            self._kept.update({n: tensor for n, tensor in parts.items() if self._wanted[n]})
        self._wanted[part] -= 1
        return self._kept[part] if self._wanted[part] else self._kept.pop(part)
