"""A Hugging Face checkpoint as named tensors that are read one at a time.

safetensors  one file, or shards with an index: plain reads
.bin         one file, or shards with an index: torch.load(weights_only=True), memory-mapped,
             one shard open at a time
GGUF         through transformers, which holds the whole model in memory
"""

import json
import pickle
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from megatron_scalebio.convert.safetensors_file import Header, Info, read_header, read_into
from megatron_scalebio.errors import UserError

_INCOMPLETE = "the download is incomplete: fetch it again"


class Source:
    """A checkpoint's tensors.

    Args:
        files: the files that hold weights, in their order.
        tensors: what they hold, in the order of its bytes.
    """

    def __init__(self, files: list[Path], tensors: dict[str, Info]) -> None:
        self.files = files
        self.tensors = tensors

    def read(self, name: str, out: Tensor | None = None) -> Tensor:
        """One tensor, into `out` if given (contiguous, of its dtype and shape).

        Raises:
            UserError: if the file is cut short.
        """
        tensor = self._tensor(name)
        return tensor.contiguous() if out is None else out.copy_(tensor)

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows first … last of a tensor, last not included."""
        return self._tensor(name)[first:last]

    def _tensor(self, name: str) -> Tensor:
        raise NotImplementedError


class SafetensorsSource(Source):
    """Safetensors files; `headers` are those of `files`."""

    def __init__(self, files: list[Path]) -> None:
        self.headers: dict[Path, Header] = {file: read_header(file) for file in files}
        tensors: dict[str, Info] = {}
        for file, header in self.headers.items():
            for name, info in header.entries.items():
                _refuse_twice(name, tensors, file)
                tensors[name] = info
        super().__init__(files, tensors)
        self._open: dict[Path, FileIO] = {}

    def read(self, name: str, out: Tensor | None = None) -> Tensor:
        info = self.tensors[name]
        out = torch.empty(info.shape, dtype=info.dtype) if out is None else out
        assert out.shape == info.shape and out.dtype == info.dtype
        read_into(self._stream(info.file), info.begin, out)
        return out

    def rows(self, name: str, first: int, last: int) -> Tensor:
        info = self.tensors[name]
        out = torch.empty((last - first, *info.shape[1:]), dtype=info.dtype)
        row_bytes = out[:1].nbytes
        read_into(self._stream(info.file), info.begin + first * row_bytes, out)
        return out

    def _stream(self, file: Path) -> FileIO:
        if file not in self._open:
            self._open[file] = file.open("rb", buffering=0)
        return self._open[file]


class BinSource(Source):
    """PyTorch's pickled files. Only tensors are unpickled, never code."""

    def __init__(self, files: list[Path]) -> None:
        self._file: Path | None = None
        self._held: dict[str, Tensor] = {}
        tensors: dict[str, Info] = {}
        for file in files:
            for number, (name, tensor) in enumerate(self._load(file).items()):
                _refuse_twice(name, tensors, file)
                tensors[name] = Info(file, tensor.dtype, tuple(tensor.shape), number)
        super().__init__(files, tensors)

    def _tensor(self, name: str) -> Tensor:
        return self._load(self.tensors[name].file)[name]

    def _load(self, file: Path) -> dict[str, Tensor]:
        if self._file != file:
            self._file, self._held = None, {}  # unmaps the shard before the next is mapped
            self._held = _load_bin(file)
            self._file = file
        return self._held


class StateSource(Source):
    """Tensors that are in memory."""

    def __init__(self, file: Path, state: dict[str, Tensor]) -> None:
        described = {
            name: Info(file, tensor.dtype, tuple(tensor.shape), number)
            for number, (name, tensor) in enumerate(state.items())
        }
        super().__init__([file], described)
        self._state = state

    def _tensor(self, name: str) -> Tensor:
        return self._state[name]


def has_weights(hf: Path) -> bool:
    """True if a Hugging Face folder holds weights that `open_source` reads, or an index of them."""
    return any(
        (hf / name).is_file()
        for stem in ("model.safetensors", "pytorch_model.bin")
        for name in (stem, f"{stem}.index.json")
    )


def open_source(hf: Path) -> Source:
    """The weights of a Hugging Face folder, or of a GGUF file.

    Raises:
        UserError: naming the file that is missing or damaged.
    """
    if hf.suffix == ".gguf":
        return _open_gguf(hf)
    for stem, suffix, kind in (
        ("model", ".safetensors", SafetensorsSource),
        ("pytorch_model", ".bin", BinSource),
    ):
        single, index = hf / f"{stem}{suffix}", hf / f"{stem}{suffix}.index.json"
        if single.is_file():
            return kind([single])
        if index.is_file():
            return _open_shards(index, kind)
    raise UserError(
        f"{hf}: holds no model.safetensors, pytorch_model.bin or index of shards (point to a "
        "Hugging Face folder with weights)"
    )


def _open_shards(index: Path, kind: type[SafetensorsSource] | type[BinSource]) -> Source:
    placed = read_index(index)["weight_map"]
    files = [index.parent / name for name in sorted(set(placed.values()))]
    for file in files:
        if not file.is_file():
            name = next(n for n, shard in placed.items() if shard == file.name)
            raise UserError(f"{file}: missing, and with it tensor {name} ({_INCOMPLETE})")
    source = kind(files)
    for name, shard in placed.items():
        if name not in source.tensors or source.tensors[name].file.name != shard:
            raise UserError(
                f"{index.parent / shard}: lacks tensor {name}, which {index.name} places there "
                f"({_INCOMPLETE})"
            )
    return source


def read_index(index: Path) -> dict[str, dict[str, str]]:
    """An index of shards: `weight_map`, tensor → file in the same folder, and `metadata`.

    Raises:
        UserError: if it is damaged, or places tensors in another folder.
    """
    try:
        content = json.loads(index.read_text())
        for name, shard in content["weight_map"].items():
            if Path(shard).name != shard or shard.startswith("."):
                raise ValueError(f"{name} is placed in {shard!r}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{index}: no index of shards: {error or type(error).__name__} ({_INCOMPLETE})"
        ) from None
    return content


def _refuse_twice(name: str, tensors: dict[str, Info], file: Path) -> None:
    if name in tensors:
        raise UserError(f"{file}: holds {name}, as {tensors[name].file.name} does")


def _load_bin(file: Path) -> dict[str, Tensor]:
    try:
        try:
            state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            state = torch.load(file, map_location="cpu", weights_only=True)  # PyTorch < 1.6
        if not all(isinstance(tensor, Tensor) for tensor in state.values()):
            raise ValueError
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, AttributeError):
        raise UserError(
            f"{file}: is damaged, or holds more than plain tensors (fetch it again, or use the "
            "model's safetensors)"
        ) from None
    return state


def _open_gguf(file: Path) -> Source:
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, local_files_only=True, trust_remote_code=False,
            dtype=torch.float32,
        )  # fmt: skip
    except (ValueError, KeyError, OSError, ImportError, RuntimeError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{file}: transformers can't read it: {line} (GGUF needs `pip install gguf accelerate`)"
        ) from None
    return StateSource(file, {name: t.detach() for name, t in model.state_dict().items()})
