"""A Hugging Face folder as evaluation takes it: checked, and opened without the network."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from megatron_scalebio.errors import UserError

_END_BYTES = 1 << 20


class HfModel(NamedTuple):
    """A model with its tokenizer, on its device. ``max_length``: of a sequence, in tokens."""

    model: Any
    tokenizer: Any
    max_length: int


def use_network(allowed: bool) -> None:
    """Keeps the Hugging Face libraries off the network; to be called before they are imported."""
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        os.environ[variable] = "0" if allowed else "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def check_folder(folder: Path) -> None:
    """Refuses what can't be evaluated, before seconds go into imports.

    Raises:
        UserError: it is not a folder with a model and a tokenizer.
    """
    fix = "give a Hugging Face folder, such as `convert export` writes"
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder ({fix})")
    names = {path.name for path in folder.iterdir()}
    for needed in (("config.json",), ("tokenizer.json", "tokenizer.model", "vocab.json")):
        if not names & set(needed):
            raise UserError(f"{folder}: holds no {' or '.join(needed)} ({fix})")
    if not any(name.endswith((".safetensors", ".bin")) for name in names):
        raise UserError(f"{folder}: holds no weights ({fix})")
    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{folder / 'config.json'}: malformed JSON ({error})") from None


def fingerprint(folder: Path) -> str:
    """Tells models apart: of the small files, and of both ends of the weight files."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            digest.update(file.read(_END_BYTES))
            file.seek(max(0, size - _END_BYTES))
            digest.update(file.read(_END_BYTES))
    return digest.hexdigest()


def open_folder(folder: Path) -> HfModel:
    """Loads the model in the precision it is stored in, on the GPU where there is one.

    Raises:
        UserError: the folder is no model's, or of an architecture that transformers does not know.
    """
    check_folder(folder)
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        first = str(error).splitlines()[0] if str(error) else repr(error)
        raise UserError(f"{folder}: cannot load the model: {first}") from None
    # The object's attribute: in GPT-2's file it is n_positions.
    length = int(getattr(model.config, "max_position_embeddings", None) or 2048)
    return HfModel(model.to(device).eval(), tokenizer, length)
