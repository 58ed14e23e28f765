"""Hugging Face → Megatron: one pass over the shards, one tensor in memory at a time."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_scalebio.checkpoint.folder import COMMON, TRACKER
from megatron_scalebio.checkpoint.integrity import hash_written, seal
from megatron_scalebio.checkpoint.megatron_args import megatron_args
from megatron_scalebio.config import Config
from megatron_scalebio.config_loader import load_config
from megatron_scalebio.convert.megatron_writer import (
    ChunkWriter,
    common_state,
    finish,
    objects,
)
from megatron_scalebio.convert.output import new_folder, refuse_existing
from megatron_scalebio.convert.ranks import Ranks, joined
from megatron_scalebio.convert.source import open_source
from megatron_scalebio.convert.stacked import ByExpert, unpacked
from megatron_scalebio.convert.table import Table, Whole
from megatron_scalebio.errors import UserError
from megatron_scalebio.families import read_family

Progress = Callable[[int, int], None]
RELEASE = "release"  # what Megatron-LM calls a checkpoint of no iteration
_BLOCK_ROWS = 4096


def import_checkpoint(
    hf: Path,
    save: Path,
    *,
    make_vocab_size_divisible_by: int = 128,
    tensor_model_parallel_size: int = 1,
    on_progress: Progress | None = None,
) -> None:
    """Writes a Megatron checkpoint, which loads under any TP × PP, from a Hugging Face folder.

    The dtype stays the source's. Rows that pad the vocabulary are zero.

    Args:
        hf: the folder, or a GGUF file (which transformers holds in memory as a whole).
        save: a new folder; gets the tracker file and `release/`.
        make_vocab_size_divisible_by: the vocabulary is padded to a multiple of this × TP.
        tensor_model_parallel_size: the TP size that will load it, for the padding.
        on_progress: is told bytes done and bytes in all of this rank's share.

    Raises:
        UserError: naming the file and the tensor or option at fault; nothing is left behind.
    """
    with joined() as ranks:
        ranks.main(lambda: refuse_existing(save))
        plan = ranks.each(
            lambda: ImportPlan(hf, make_vocab_size_divisible_by, tensor_model_parallel_size)
        )
        with new_folder(save, sum(map(plan.nbytes, plan.table.wholes)), ranks) as temporary:
            _write(plan, temporary, ranks, on_progress or (lambda done, total: None))


def _write(plan: ImportPlan, folder: Path, ranks: Ranks, on_progress: Progress) -> None:
    release = folder / RELEASE
    ranks.main(release.mkdir)
    results = ranks.gather(ranks.each(partial(_write_share, plan, release, ranks, on_progress)))

    def complete() -> None:
        finish(release, plan.table.wholes, plan.shapes, plan.dtypes, results)
        seal(release)
        (folder / TRACKER).write_text(RELEASE)

    ranks.main(complete)


def _write_share(plan: ImportPlan, release: Path, ranks: Ranks, on_progress: Progress) -> list:
    writer = ChunkWriter(release, ranks.rank)
    share = ranks.share(plan.in_file_order(), plan.nbytes)
    done, total = 0, sum(map(plan.nbytes, share))
    try:
        for whole in share:
            writer.write(whole, plan.read(whole))
            done += plan.nbytes(whole)
            on_progress(done, total)
        if ranks.is_main:
            for key in objects(plan.table.wholes):
                writer.write_object(key)
            writer.write_object(COMMON, common_state(plan.args))
        writer.close()
        hash_written(release, ranks.rank)
    finally:
        writer.abandon()
    return writer.results


class ImportPlan:
    """What is read and what it becomes; all that can be known to be wrong is refused here.

    Args:
        shapes: of each tensor as written, padded, by its key, without the axes of layers and
            experts.
        dtypes: by key.
    """

    def __init__(self, hf: Path, divisible_by: int, tp: int) -> None:
        family, _ = read_family(hf)
        options: dict[str, dict[str, Any]] = {
            "model": {"hf": str(hf), "make_vocab_size_divisible_by": divisible_by},
            "parallel": {"tensor_model_parallel_size": tp},
        }
        config = load_config(None, options)
        self.table = Table(family, config.model)
        self.source = ByExpert(unpacked(open_source(hf)), self.table.parts)
        files = {name: info.file for name, info in self.source.tensors.items()}
        self._names = self.table.names_in(self.source.tensors, files)
        self.dtypes: dict[str, torch.dtype] = {}
        for whole in self.table.wholes:
            self._check(whole)
        self._check_head()
        self.args = _arguments(config, self.dtypes)
        self.shapes = {
            whole.key: (
                (self.args.padded_vocab_size, *whole.shape[1:]) if whole.map.vocab else whole.shape
            )
            for whole in self.table.wholes
        }

    def nbytes(self, whole: Whole) -> int:
        """Bytes of a tensor as written."""
        key = whole.key
        return math.prod(self.shapes[key]) * self.dtypes[key].itemsize

    def in_file_order(self) -> list[Whole]:
        """The tensors in the order in which their first parts lie on the disk."""
        place = {name: number for number, name in enumerate(self.source.tensors)}
        return sorted(self.table.wholes, key=lambda w: place[self._names[w.parts[0].name]])

    def read(self, whole: Whole) -> Tensor:
        """One tensor of Megatron, padded."""
        names = [self._names[part.name] for part in whole.parts]
        shape = self.shapes[whole.key]
        if shape == whole.shape:
            return whole.to_megatron([self.source.read(name) for name in names])
        assert len(names) == 1 and whole.map.rule == "copy", "a padded tensor is read in place"
        padded = torch.zeros(shape, dtype=self.dtypes[whole.key])
        self.source.read(names[0], padded[: whole.shape[0]])
        return padded

    def _check(self, whole: Whole) -> None:
        for part in whole.parts:
            info = self.source.tensors[self._names[part.name]]
            if info.shape != part.shape:
                raise UserError(
                    f"{info.file}: {self._names[part.name]} has shape {list(info.shape)}, "
                    f"config.json asks for {list(part.shape)} (take both from the same model)"
                )
            if self.dtypes.setdefault(whole.key, info.dtype) != info.dtype:
                raise UserError(
                    f"{info.file}: {self._names[part.name]} is {info.dtype}, its like in another "
                    f"layer or part {self.dtypes[whole.key]} (save the model in one dtype)"
                )

    def _check_head(self) -> None:
        """A head that is written although it is tied must be the embedding."""
        head, embedding = (self._names.get(name) for name in self.table.tied or ("", ""))
        if head is None or embedding is None or head == embedding:
            return
        info, other = self.source.tensors[head], self.source.tensors[embedding]
        same = info.shape == other.shape and all(
            torch.equal(
                *(
                    self.source.rows(name, n, min(n + _BLOCK_ROWS, info.shape[0]))
                    for name in (head, embedding)
                )
            )
            for n in range(0, info.shape[0], _BLOCK_ROWS)
        )
        if not same:
            raise UserError(
                f"{info.file}: {head} is not {embedding}, although tie_word_embeddings says so "
                "(set tie_word_embeddings to false in config.json)"
            )


def _arguments(config: Config, dtypes: dict[str, torch.dtype]) -> argparse.Namespace:
    """What Megatron-LM looks for in a checkpoint; the dtype is that of the linear layers."""
    assert config.model.vocab_size is not None, "a family sets it"
    tokenizer = {"type": "HuggingFaceTokenizer", "model": config.model.hf}
    args = megatron_args(config, config.model.vocab_size, tokenizer)
    linear = next(key for key in dtypes if key.endswith("self_attention.linear_proj.weight"))
    args.params_dtype = dtypes[linear]
    args.bf16 = args.params_dtype == torch.bfloat16
    args.fp16 = args.params_dtype == torch.float16
    return args
