"""The files of a tokenizer on disk, or from the hub: read as data, and known by their content."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_scalebio.errors import UserError

# The files that decide how text becomes ids; the first set that is present is the fingerprint.
CONTENT_FILES = (
    ("tokenizer.json",),
    ("tokenizer.model",),
    ("spiece.model",),
    ("vocab.json", "merges.txt", "added_tokens.json"),
    ("vocab.txt", "added_tokens.json"),
)


def load_hugging_face(path: Path) -> Any:
    # Silences a warning about forks, and keeps one worker to one core.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    json_file = path / "tokenizer.json" if path.is_dir() else path
    if json_file.exists():
        _check_tokenizer_json(json_file)
    try:
        if json_file.exists() and (path.is_file() or not (path / "tokenizer_config.json").exists()):
            return PreTrainedTokenizerFast(tokenizer_file=str(json_file))
        return AutoTokenizer.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the tokenizers library raises a bare one at a damaged file
        raise UserError(
            f"{path}: cannot load a tokenizer: {(str(error).splitlines() or ['it is damaged'])[0]} "
            "(the directory needs tokenizer.json, or tokenizer_config.json with vocabulary)"
        ) from error


def _check_tokenizer_json(path: Path) -> None:
    try:
        content = json.loads(path.read_bytes())
    except (RecursionError, ValueError) as error:
        raise UserError(f"{path}: malformed JSON ({error})") from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise UserError(f"{path}: not a tokenizer.json: it has no field 'model'")


def download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["tokenizer*", "*.model", "vocab.*", "merges.txt", "*.jinja", "added_tokens.json"]
    try:
        return Path(snapshot_download(name, allow_patterns=[*patterns, "special_tokens_map.json"]))
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: cannot download the tokenizer: {error}") from error


def content_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    for names in CONTENT_FILES:
        if (path / names[0]).exists():
            return [path / name for name in names if (path / name).exists()]
    return sorted(entry for entry in path.iterdir() if entry.is_file())


def hash_files(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()
