"""Hugging Face folders as evaluation opens them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from megatron_scalebio.errors import UserError
from megatron_scalebio.evaluate.hf_folder import fingerprint, open_folder


def test_the_longest_sequence_of_gpt2_is_its_own(tmp_path: Path, hf_folder: Path) -> None:
    """Its config.json says n_positions, and not max_position_embeddings."""
    shutil.copytree(hf_folder, tmp_path, dirs_exist_ok=True)
    config = GPT2Config(vocab_size=259, n_positions=64, n_embd=8, n_layer=1, n_head=1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    assert "max_position_embeddings" not in (tmp_path / "config.json").read_text()
    assert open_folder(tmp_path).max_length == 64


def test_a_model_is_opened_as_it_is_stored_and_without_dropout(
    tmp_path: Path, hf_folder: Path
) -> None:
    shutil.copytree(hf_folder, tmp_path, dirs_exist_ok=True)
    stored = open_folder(hf_folder).model
    assert stored.dtype == torch.float32 and not stored.training
    stored.to(torch.bfloat16).save_pretrained(tmp_path)
    opened = open_folder(tmp_path)
    assert opened.model.dtype == torch.bfloat16 and not opened.model.training
    assert opened.max_length == 2048


def test_models_are_told_apart_by_either_end_of_their_weights(tmp_path: Path) -> None:
    found = set()
    for changed in (None, 0, -1):
        weights = bytearray(3 << 20)
        if changed is not None:
            weights[changed] = 1
        (tmp_path / "model.safetensors").write_bytes(weights)
        found.add(fingerprint(tmp_path))
    assert len(found) == 3


def test_code_of_a_folder_is_never_run(
    tmp_path: Path, hf_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left to itself transformers asks at the terminal."""
    shutil.copytree(hf_folder, tmp_path, dirs_exist_ok=True)
    mapped = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "model_type": "own", "auto_map": mapped})
    )
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda question: "y")
    with pytest.raises(UserError, match="cannot load the model"):
        open_folder(tmp_path)
    assert not (tmp_path / "was_run").exists()
