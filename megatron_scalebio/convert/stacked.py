"""gpt-oss's files: a tensor has a matrix of every expert, and may be packed as MXFP4.

    name (E, …)                 is read as name[0] … name[E − 1]
    name_blocks, name_scales    are read as name, in bfloat16

A block is 16 bytes, two numbers of four bits in each, the lower half first. They are multiplied by
2^(scale − 127), a scale a block. Blocks (E, R, G, 16) are a tensor (E, 32·G, R).
"""

import math
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from megatron_scalebio.convert.source import Info, Source

_BLOCKS, _SCALES = "_blocks", "_scales"
# A sign, two bits of exponent, one of mantissa.
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_NUMBERS = torch.tensor([*_MAGNITUDES, *(-value for value in _MAGNITUDES)])


def tensor_of(name: str) -> str:
    """The tensor in the files that `name[3]` is a part of."""
    return name.partition("[")[0]


class ByExpert(Source):
    """Another source, its tensors of all experts given one expert at a time.

    Args:
        names: those to be found, `name[3]` and others.
    """

    def __init__(self, source: Source, names: Iterable[str]) -> None:
        stacked = {tensor_of(name) for name in names if "[" in name}
        tensors: dict[str, Info] = {}
        for name, info in source.tensors.items():
            if name not in stacked:
                tensors[name] = info
                continue
            for expert in range(info.shape[0]):
                tensors[f"{name}[{expert}]"] = replace(info, shape=info.shape[1:])
        super().__init__(source.files, tensors)
        self._source = source

    def read(self, name: str, out: Tensor | None = None) -> Tensor:
        if name in self._source.tensors:
            return self._source.read(name, out)
        stacked, expert = name.removesuffix("]").split("[")
        part = self._source.rows(stacked, int(expert), int(expert) + 1)[0]
        return part if out is None else out.copy_(part)

    def rows(self, name: str, first: int, last: int) -> Tensor:
        return self._source.rows(name, first, last)


def unpacked(source: Source) -> Source:
    """The source, or what gives its MXFP4 tensors as plain ones."""
    packed = any(name.endswith(_BLOCKS) for name in source.tensors)
    return Unpacked(source) if packed else source


class Unpacked(Source):
    """Another source, its MXFP4 tensors as plain ones in bfloat16."""

    def __init__(self, source: Source) -> None:
        tensors: dict[str, Info] = {}
        for name, info in source.tensors.items():
            stem = name.removesuffix(_BLOCKS)
            if name.endswith(_BLOCKS) and stem + _SCALES in source.tensors:
                experts, rows, *blocks = info.shape
                shape = (experts, 2 * math.prod(blocks), rows)
                tensors[stem] = replace(info, dtype=torch.bfloat16, shape=shape)
            elif name.removesuffix(_SCALES) + _BLOCKS not in source.tensors:
                tensors[name] = info
        super().__init__(source.files, tensors)
        self._source = source

    def read(self, name: str, out: Tensor | None = None) -> Tensor:
        if name in self._source.tensors:
            return self._source.read(name, out)
        whole = self.rows(name, 0, self.tensors[name].shape[0])
        return whole if out is None else out.copy_(whole)

    def rows(self, name: str, first: int, last: int) -> Tensor:
        if name in self._source.tensors:
            return self._source.rows(name, first, last)
        parts = (self._source.rows(name + kind, first, last) for kind in (_BLOCKS, _SCALES))
        return torch.stack([_numbers(*expert) for expert in zip(*parts, strict=True)])


def _numbers(blocks_RGB: Tensor, scales_RG: Tensor) -> Tensor:
    """One expert's matrix (32·G, R)."""
    halves = torch.stack((blocks_RGB & 15, blocks_RGB >> 4), dim=-1).flatten(-2)
    exponents_RG1 = scales_RG.to(torch.int32)[..., None] - 127
    return torch.ldexp(_NUMBERS[halves.int()], exponents_RG1).flatten(1).to(torch.bfloat16).t()
