"""Records to prepare, a configuration for them, and what was written."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from megatron_scalebio.data.prepare import PrepareConfig, SourceInput

DIALOGUES = [
    {"instruction": "Say hi", "input": "", "output": "Hi there"},
    {"instruction": "Say nothing", "input": "", "output": ""},
    {"instruction": "", "input": "", "output": " "},
    {"instruction": "Count", "input": "to 3", "output": "1 2 3"},
    {"instruction": "Long answer", "input": "", "output": "word " * 90},
    {"instruction": "Long prompt " * 90, "input": "", "output": "short"},
]


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def config(out: Path, tokenizer: Path, *files: Path, **options: Any) -> PrepareConfig:
    sources = (SourceInput("src", files),)
    options = {"seq_length": 64, "workers": 1, **options}
    return PrepareConfig(out=out, sources=sources, tokenizer=str(tokenizer), **options)


def digests(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
