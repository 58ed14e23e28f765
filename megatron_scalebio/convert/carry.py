"""What is carried from the reference folder as it is: configuration, tokenizer, chat template."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_scalebio.errors import UserError

if TYPE_CHECKING:
    import torch  # its import takes seconds

# Weights in any format; an index names them; code is not carried.
_LEFT_OUT = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".ot",
    ".npz", ".npy", ".distcp", ".tflite", ".py", ".pyc", ".so", ".lock",
}  # fmt: skip
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_TEMPLATES = "additional_chat_templates"


def files_to_carry(reference: Path) -> list[Path]:
    """The files of a Hugging Face folder that are not weights or code, relative to it.

    Raises:
        UserError: if a file links out of the folder.
    """
    if not reference.is_dir():
        raise UserError(f"{reference}: is not a folder (point to a Hugging Face folder)")
    names = [
        path.relative_to(reference)
        for path in sorted([*reference.iterdir(), *(reference / _TEMPLATES).glob("*")])
        if path.suffix not in _LEFT_OUT
        and not path.name.endswith(".index.json")
        and not path.name.startswith(".")
        and not path.is_dir()
    ]
    for name in names:
        _refuse_foreign(reference, reference / name)
    return names


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _TOKENIZERS)


def is_packed(folder: Path) -> bool:
    """True if a model's config.json says that its weights are (which only MXFP4 can be here)."""
    config = folder / "config.json"
    return config.is_file() and bool(json.loads(config.read_text()).get("quantization_config"))


def carry(reference: Path, names: list[Path], save: Path, dtype: torch.dtype | None) -> None:
    """Copies the files.

    Args:
        dtype: what config.json is to say, if that is not what it says.
    """
    for name in names:
        (save / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(reference / name, save / name)
    if dtype is not None:
        path = save / "config.json"
        config = json.loads(path.read_text())
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        config[key] = str(dtype).removeprefix("torch.")
        config.pop("quantization_config", None)  # of MXFP4 files, whose weights are plain now
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _refuse_foreign(reference: Path, path: Path) -> None:
    """A link may lead within the folder, or to the blobs of the hub's cache that it is part of."""
    target, folder = path.resolve(), reference.resolve()
    roots = [folder, *([folder.parents[1] / "blobs"] if folder.parent.name == "snapshots" else [])]
    if not target.is_file():
        raise UserError(f"{path}: is a broken link, or no file (fetch it again)")
    if not any(target.is_relative_to(root) for root in roots):
        raise UserError(f"{path}: links out of the folder, to {target} (copy the file there)")
