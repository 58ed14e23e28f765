"""The sizes of the paper: every tensor of the Hugging Face model maps, with its shape.

Both models are built on the meta device from published config.json values, and
`launch/configs/models` says the same.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml

from tests.distributed.harness import run_distributed

pytestmark = pytest.mark.distributed
PUBLISHED = Path(__file__).with_name("published")
CONFIGS = Path(__file__).resolve().parents[2] / "launch" / "configs" / "models"
NAMES = sorted(path.name for path in PUBLISHED.iterdir())


def build_all(folder: str) -> None:
    """Global shapes by checkpoint name (and how often: layers) of each model."""
    from megatron_scalebio import runtime
    from megatron_scalebio.config_loader import load_config
    from megatron_scalebio.model.provider import build_chunk
    from megatron_scalebio.model.settings import transformer_config

    for name in NAMES:
        config = load_config(str(CONFIGS / f"{name}.yaml"))
        config.model.make_vocab_size_divisible_by = 1
        runtime.start(config)
        with torch.device("meta"):
            gpt = build_chunk(
                config, transformer_config(config), config.model.vocab_size, True, True
            )
        entries = [e for e in gpt.sharded_state_dict().values() if hasattr(e, "key")]
        # A gated MLP's first layer is two shards of one tensor; the factory holds it whole.
        shapes = Counter((e.key, tuple(e.data.shape)) for e in entries if e.data is not None)
        parameters = sum(p.numel() for p in gpt.parameters())
        torch.save({"shapes": dict(shapes), "parameters": parameters}, f"{folder}/{name}.pt")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    run_distributed(build_all, 1, str(folder))
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_maps(built: Path, name: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from megatron_scalebio.config_loader import load_config
    from megatron_scalebio.convert.table import Table
    from megatron_scalebio.families import read_family

    with torch.device("meta"):
        config = AutoConfig.from_pretrained(PUBLISHED / name, local_files_only=True)
        hf = AutoModelForCausalLM.from_config(config)
    # GPT-NeoX's output head has one name in transformers' module, another in its files.
    head = "embed_out." if config.model_type == "gpt_neox" else "lm_head."
    theirs = {n.replace("lm_head.", head): tuple(p.shape) for n, p in hf.named_parameters()}
    ours = torch.load(built / f"{name}.pt", weights_only=True)
    family, _ = read_family(PUBLISHED / name)
    table = Table(family, load_config(str(CONFIGS / f"{name}.yaml")).model)
    parts = [(part.name, part.shape) for whole in table.wholes for part in whole.parts]
    assert len(parts) == len(theirs) and dict(parts) == theirs
    assert Counter((w.stacked_key, w.shape) for w in table.wholes) == ours["shapes"]
    assert ours["parameters"] == sum(p.numel() for p in hf.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_shipped_configuration_is_the_published_one(name: str) -> None:
    from megatron_scalebio.families import read_family

    shipped = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    assert shipped == {"model": read_family(PUBLISHED / name)[1]}
