"""Which Hugging Face tensor goes into which file: as in a reference checkpoint."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_scalebio.convert.safetensors_file import build_header
from megatron_scalebio.convert.source import SafetensorsSource, Source, read_index

_METADATA = {"format": "pt"}  # transformers looks for it
_FILE_BYTES = 5 * 10**9  # of a file, where the reference has none to go by


@dataclass(frozen=True)
class OutTensor:
    """A tensor to write."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class OutFile:
    """A safetensors file to write: its tensors in order, and the bytes before them."""

    name: str
    tensors: tuple[OutTensor, ...]
    header: bytes

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class Layout:
    """All files of weights, and the index of shards (name, content) if there are shards."""

    files: tuple[OutFile, ...]
    index: tuple[str, str] | None

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)


def layout_of(source: Source, dtype_of: Callable[[OutTensor], torch.dtype]) -> Layout:
    """The reference's own scheme; `.bin` files become safetensors files of the same number.

    Args:
        dtype_of: the dtype to write, for a tensor of the reference.
    """
    held: dict[Path, list[OutTensor]] = {file: [] for file in source.files}
    for name, info in source.tensors.items():
        held[info.file].append(OutTensor(name, info.dtype, info.shape))
    files, changed = [], False
    for file, before in held.items():
        tensors = [replace(tensor, dtype=dtype_of(tensor)) for tensor in before]
        metadata: dict[str, str] | None = _METADATA
        header = None
        if isinstance(source, SafetensorsSource):
            metadata = source.headers[file].metadata
            header = source.headers[file].raw if tensors == before else None
        changed |= header is None
        header = header or build_header(((t.name, t.dtype, t.shape) for t in tensors), metadata)
        files.append(OutFile(_renamed(file.name), tuple(tensors), header))
    return Layout(tuple(files), _index(source.files[0].parent, files, changed))


def fresh_layout(tensors: list[OutTensor]) -> Layout:
    """A scheme of its own, in files of at most 5 GB, for a reference without weights."""
    groups: list[list[OutTensor]] = [[]]
    for tensor in tensors:
        if groups[-1] and sum(t.nbytes for t in groups[-1]) + tensor.nbytes > _FILE_BYTES:
            groups.append([])
        groups[-1].append(tensor)
    files = []
    for number, group in enumerate(groups, 1):
        suffix = f"-{number:05d}-of-{len(groups):05d}" if len(groups) > 1 else ""
        header = build_header(((t.name, t.dtype, t.shape) for t in group), _METADATA)
        files.append(OutFile(f"model{suffix}.safetensors", tuple(group), header))
    name = "model.safetensors.index.json"
    return Layout(tuple(files), (name, _index_text(files, {})) if len(files) > 1 else None)


def _renamed(name: str) -> str:
    return name.replace("pytorch_model", "model").replace(".bin", ".safetensors")


def _index(folder: Path, files: list[OutFile], changed: bool) -> tuple[str, str] | None:
    for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / name).is_file():
            before = read_index(folder / name)
            if not changed:
                return name, (folder / name).read_text()
            return _renamed(name), _index_text(files, before.get("metadata") or {})
    return None


def _index_text(files: list[OutFile], metadata: dict[str, str]) -> str:
    total = sum(tensor.nbytes for file in files for tensor in file.tensors)
    placed = {tensor.name: file.name for file in files for tensor in file.tensors}
    content = {"metadata": {**metadata, "total_size": total}, "weight_map": placed}
    return json.dumps(content, indent=2, sort_keys=True) + "\n"
