"""gpt-oss as it is published, its experts' matrices packed: in as plain numbers, out as such."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_scalebio.convert.exporter import export_checkpoint
from megatron_scalebio.convert.importer import import_checkpoint
from tests.convert.models import content, convert, edit_json, make

SIZES = {"hidden_size": 64, "intermediate_size": 32}  # blocks are 32 numbers


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """A folder with MXFP4 matrices; beside it, `plain` has what transformers makes of them."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    hf, plain = make(tmp_path / "hf", "gpt-oss", torch.bfloat16, **SIZES), tmp_path / "plain"
    make(plain, "gpt-oss", torch.bfloat16, **SIZES)
    tensors = load_file(hf / "model.safetensors")
    unpacked = dict(tensors)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        blocks = torch.randint(256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
        scales = torch.randint(110, 140, (experts, rows, columns // 32), dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        unpacked[name] = convert_moe_packed_tensors(blocks, scales)
    save_file(tensors, hf / "model.safetensors", {"format": "pt"})
    save_file(unpacked, plain / "model.safetensors", {"format": "pt"})
    edit_json(hf / "config.json", quantization_config={"quant_method": "mxfp4"})
    return hf


def test_weights_go_in_as_transformers_unpacks_them(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    megatron, plain = tmp_path / "megatron", packed.with_name("plain")
    assert convert("import", "--hf", packed, "--save", megatron) == 0
    assert "MXFP4" in capsys.readouterr().err
    export_checkpoint(megatron, plain, tmp_path / "as-plain")
    assert content(tmp_path / "as-plain") == content(plain)


def test_weights_come_out_plain_and_config_json_says_so(packed: Path, tmp_path: Path) -> None:
    import_checkpoint(packed, tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", packed, tmp_path / "back")
    folders = tmp_path / "back", tmp_path / "plain"
    back, plain = (load_file(folder / "model.safetensors") for folder in folders)
    assert back.keys() == plain.keys()
    assert all(torch.equal(back[name], plain[name]) for name in plain)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"


def test_other_packings_are_refused(packed: Path, tmp_path: Path, capsys) -> None:
    edit_json(packed / "config.json", quantization_config={"quant_method": "fp8"})
    assert convert("import", "--hf", packed, "--save", tmp_path / "megatron") == 2
    assert "quantization_config" in capsys.readouterr().err
