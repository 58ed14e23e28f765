"""Hugging Face → Megatron → Hugging Face changes no byte of any file, for every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing import load_common_state_dict
from megatron.core.safe_globals import register_safe_globals
from safetensors.torch import load_file, save_file

from megatron_scalebio.convert.exporter import export_checkpoint
from megatron_scalebio.convert.importer import import_checkpoint
from megatron_scalebio.errors import UserError
from tests.convert.models import MODELS, content, make
from tests.smollm2 import smollm2_folder


def there_and_back(hf: Path, folder: Path, **options: int) -> dict[str, bytes]:
    import_checkpoint(hf, folder / "megatron", **options)
    export_checkpoint(folder / "megatron", hf, folder / "back")
    return content(folder / "back")


@pytest.mark.parametrize("name", MODELS)
def test_every_family_in_fp32_and_one_file(tmp_path: Path, name: str) -> None:
    hf = make(tmp_path / "hf", name)
    assert there_and_back(hf, tmp_path) == content(hf)


@pytest.mark.parametrize("name", ["glm4-moe", "deepseek3"])
def test_a_layer_for_multi_token_prediction_is_kept(tmp_path: Path, name: str) -> None:
    hf = make(tmp_path / "hf", name)
    path = hf / "model.safetensors"
    more = {"model.layers.3.eh_proj.weight": torch.randn(24, 48)}
    save_file({**load_file(path), **more}, path, {"format": "pt"})
    assert there_and_back(hf, tmp_path) == content(hf)


def test_parts_for_images_are_the_references(tmp_path: Path) -> None:
    hf = make(tmp_path / "hf", "llama4-images")
    import_checkpoint(hf, tmp_path / "megatron")
    (hf / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"hf: has no weights, of which those of vision_model\."):
        export_checkpoint(tmp_path / "megatron", hf, tmp_path / "back")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["gpt2", "neox", "llama", "qwen2-tied", "gemma2"])
def test_half_precision_in_shards(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    hf = make(tmp_path / "hf", name, dtype, shards="8KB")
    assert len(list(hf.glob("*.safetensors"))) > 3
    assert there_and_back(hf, tmp_path) == content(hf)
    register_safe_globals()
    told = load_common_state_dict(tmp_path / "megatron" / "release")["args"]
    assert (told.params_dtype, told.bf16) == (dtype, dtype is torch.bfloat16)
    assert told.fp16 == (dtype is torch.float16)


@pytest.mark.parametrize("divisible_by", [1, 8, 128])
def test_any_padding(tmp_path: Path, divisible_by: int) -> None:
    hf = make(tmp_path / "hf", "llama")
    options = {"make_vocab_size_divisible_by": divisible_by, "tensor_model_parallel_size": 2}
    assert there_and_back(hf, tmp_path, **options) == content(hf)


def test_numbers_that_arithmetic_would_change(tmp_path: Path) -> None:
    """NaN payloads, negative zero and subnormal numbers are copied, not computed with."""
    hf = make(tmp_path / "hf", "llama", torch.bfloat16)
    path = hf / "model.safetensors"
    bits = bytearray(path.read_bytes())
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (4000,), generator=generator, dtype=torch.uint8)
    bits[-4000:] = noise.numpy().tobytes()
    path.write_bytes(bits)
    assert there_and_back(hf, tmp_path) == content(hf)


@pytest.mark.slow
def test_a_pretrained_model(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    hf = smollm2_folder(tmp_path_factory.getbasetemp())
    before = {name: held for name, held in content(hf).items() if not name.endswith(".py")}
    assert there_and_back(hf, tmp_path) == before
