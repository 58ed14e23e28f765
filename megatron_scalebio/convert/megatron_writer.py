"""Writes a Megatron `torch_dist` checkpoint a tensor at a time.

    .metadata       every tensor's global shape, dtype and chunks, and where each chunk lies
    __R_0.distcp    the chunks that rank R wrote, one after the other, each as by torch.save
    metadata.json   the format's name

Tensors of layers are one global tensor (layers, …) with a chunk for each layer, and those of
experts (layers, experts, …), as Megatron-Core saves them; where only some layers have experts, each
layer's tensors are their own. It also expects an (empty) object `._extra_state` for each module
that might hold FP8 scales.
"""

import argparse
import json
import os
import pickle
import uuid
from collections.abc import Iterable
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from megatron_scalebio.checkpoint.folder import COMMON
from megatron_scalebio.convert.safetensors_file import write_all
from megatron_scalebio.convert.shapes import LAYER
from megatron_scalebio.convert.table import Whole
from megatron_scalebio.errors import UserError

Shape = tuple[int, ...]


class ChunkWriter:
    """One rank's file of chunks. `results` says where each of them lies."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._path = folder / f"__{rank}_0.distcp"
        self._stream = _Blocks(self._path)
        self.results: list[WriteResult] = []

    def write(self, whole: Whole, tensor: Tensor) -> None:
        """Appends one tensor; of a layer's or expert's, its chunk (1, …) of the global tensor.

        Raises:
            UserError: if the disk refuses.
        """
        place, _ = whole.place_in(whole.key)
        offset = (*place, *(0,) * tensor.dim())
        tensor = tensor[(None,) * len(place)].contiguous()
        if tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone()  # torch.save writes the storage
        self._append(MetadataIndex(whole.key, offset), tensor)

    def write_object(self, key: str, content: Any = None) -> None:
        self._append(MetadataIndex(key), [content])

    def close(self) -> None:
        """Sends the file to the disk."""
        os.fsync(self._stream.fileno())
        self._stream.close()

    def abandon(self) -> None:
        """Closes the file as it is."""
        self._stream.close()

    def _append(self, index: MetadataIndex, content: Tensor | list[Any]) -> None:
        begin = self._stream.tell()
        try:
            torch.save(content, self._stream)
        except (OSError, RuntimeError) as error:
            line = str(error).strip().splitlines()[0]
            raise UserError(
                f"{self._path}: could not write {index.fqn}: {line} (free space)"
            ) from None
        length = self._stream.tell() - begin
        info = _StorageInfo(self._path.name, begin, length)
        self.results.append(WriteResult(index=index, size_in_bytes=length, storage_data=info))


class _Blocks(FileIO):
    """A new unbuffered file, to which torch.save writes a whole tensor at once."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "x")

    def write(self, content: Any) -> int:
        view = memoryview(content)
        write_all(self, view)
        return len(view)


def objects(wholes: Iterable[Whole]) -> list[str]:
    """The keys of the `_extra_state` objects that Megatron-Core's modules may look for."""
    keys: dict[str, None] = {}
    for whole in wholes:
        if whole.key.startswith("decoder."):
            place, sizes = (".".join(map(str, each)) for each in whole.place_in(whole.key))
            shard = f"_extra_state/shard_{place or 0}_{sizes or 1}"
            module = _module(whole.key)
            keys[f"{module}.{shard}"] = None
            if whole.map.megatron == f"{LAYER}self_attention.linear_proj.weight":
                attention = module.removesuffix("linear_proj") + "core_attention"
                keys[f"{attention}.{shard}"] = None
    return list(keys)


def common_state(args: argparse.Namespace) -> dict[str, Any]:
    """The object `COMMON`: what Megatron-LM looks for beside the tensors."""
    return {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": 0,
        "content_metadata": {"singleton_local_shards": False},
    }


def _module(key: str) -> str:
    """The module of a tensor; Transformer Engine's linear layers hold the norm before them."""
    module, _, name = key.rpartition(".")
    known = (
        "weight", "bias", "layer_norm_weight", "layer_norm_bias", "expert_bias", "gate_weight",
        "softmax_offset",
    )  # fmt: skip
    assert name in known, key
    return module


def finish(
    folder: Path,
    wholes: Iterable[Whole],
    shapes: dict[str, Shape],
    dtypes: dict[str, torch.dtype],
    results: list[list[WriteResult]],
) -> None:
    """Completes a checkpoint whose chunks all ranks have written.

    Args:
        shapes: of each tensor as written, by key, without the axes of layers and experts.
        dtypes: by key.
        results: each rank's.
    """
    described: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    for whole in wholes:
        key, shape = whole.key, shapes[whole.key]
        place, sizes = whole.place_in(key)
        size, offset = (*sizes, *shape), (*place, *(0,) * len(shape))
        chunk = (*(1,) * len(place), *shape)
        if key not in described:
            described[key] = TensorStorageMetadata(
                TensorProperties(dtype=dtypes[key]), torch.Size(size), []
            )
        described[key].chunks.append(  # type: ignore[union-attr]
            ChunkStorageMetadata(torch.Size(offset), torch.Size(chunk))
        )
    for key in (*objects(wholes), COMMON):
        described[key] = BytesStorageMetadata()
    written = sum(len(part) for part in results)
    assert written == sum(len(getattr(entry, "chunks", "1")) for entry in described.values())
    _write_metadata(folder / ".metadata", described, results)
    names = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (folder / "metadata.json").write_text(json.dumps(names))


def _write_metadata(
    path: Path, described: dict[str, Any], results: list[list[WriteResult]]
) -> None:
    metadata = Metadata(
        state_dict_metadata=described,
        storage_data={written.index: written.storage_data for part in results for written in part},
        storage_meta=StorageMeta(save_id=str(uuid.uuid4())),
    )
    metadata.version = "1.0.0"  # of torch.distributed.checkpoint's format
    with path.open("wb") as stream:
        pickle.dump(metadata, stream)
        stream.flush()
        os.fsync(stream.fileno())
