"""Published sizes: every tensor of the Hugging Face model maps, with its shape.

Both models are built on the meta device from published config.json values. Of those with experts
Megatron-Core builds the first two layers alone: each expert is a module of its own there, and
12,000 of them take minutes (with `LAYERS = 200` all pass). What `launch/configs/models` has of
them says the same.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.distributed.harness import run_distributed
from tests.model.test_parity import as_in_files

pytestmark = pytest.mark.distributed
PUBLISHED = Path(__file__).with_name("published")
CONFIGS = Path(__file__).resolve().parents[2] / "launch" / "configs" / "models"
NAMES = sorted(path.name for path in PUBLISHED.iterdir())
SHIPPED = [name for name in NAMES if (CONFIGS / f"{name}.yaml").is_file()]
# Of a router's losses and numerics config.json says nothing that a run takes.
FREE = {"moe_aux_loss_coeff", "moe_router_dtype"}
LAYERS = 2  # of models with experts


def write_configs(folder: Path) -> None:
    """Writes every published config.json, whole and, in `cut`, with fewer layers of experts."""
    for name in NAMES:
        values = json.loads((PUBLISHED / name / "config.json").read_text())
        values.pop("quantization_config", None)  # transformers would unpack
        shorter = dict(values)
        if "num_experts_per_tok" in values:
            whole = values["num_hidden_layers"]
            for key, value in values.items():
                if isinstance(value, list) and len(value) == whole:
                    shorter[key] = value[:LAYERS]
            shorter["num_hidden_layers"] = min(LAYERS, whole)
        for place, config in ((folder / "whole", values), (folder / "cut", shorter)):
            (place / name).mkdir(parents=True)
            (place / name / "config.json").write_text(json.dumps(config))


def build_all(folder: str) -> None:
    """Global shapes by checkpoint name (and how often: layers, experts) of each model."""
    from megatron_scalebio import runtime
    from megatron_scalebio.config_loader import load_config
    from megatron_scalebio.model.provider import build_chunk
    from megatron_scalebio.model.settings import transformer_config

    for name in NAMES:
        hf = {"hf": f"{folder}/{name}", "make_vocab_size_divisible_by": 1}
        config = load_config(None, {"model": hf})
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
    write_configs(folder)
    run_distributed(build_all, 1, str(folder / "cut"))
    return folder


def of_hugging_face(folder: Path) -> tuple[dict[str, tuple[int, ...]], int]:
    """Shape of every tensor as in its files, and how many parameters those have."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        hf = AutoModelForCausalLM.from_config(config)
    kind = config.architectures[0].removesuffix("ForCausalLM")
    biases = [(n, b) for n, b in hf.named_buffers() if n.endswith("e_score_correction_bias")]
    shapes = {
        n: tuple(part.shape)
        for name, tensor in [*hf.named_parameters(), *biases]
        for n, part in as_in_files(name, tensor, kind).items()
    }
    return shapes, sum(p.numel() for p in hf.parameters())


def wholes_of(folder: Path) -> list[Any]:
    """The table's tensors of our checkpoints, each with its parts in Hugging Face's files."""
    from megatron_scalebio.config_loader import load_config
    from megatron_scalebio.convert.table import Table
    from megatron_scalebio.families import read_family

    family, _ = read_family(folder)
    return Table(family, load_config(None, {"model": {"hf": str(folder)}}).model).wholes


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_maps(built: Path, name: str) -> None:
    wholes = wholes_of(built / "whole" / name)
    parts = [(part.name, part.shape) for whole in wholes for part in whole.parts]
    theirs, _ = of_hugging_face(built / "whole" / name)
    assert len(parts) == len(theirs) and dict(parts) == theirs


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_is_one_of_the_model(built: Path, name: str) -> None:
    ours = torch.load(built / "cut" / f"{name}.pt", weights_only=True)
    wholes = wholes_of(built / "cut" / name)
    assert Counter((whole.key, whole.shape) for whole in wholes) == ours["shapes"]
    _, parameters = of_hugging_face(built / "cut" / name)
    assert ours["parameters"] == parameters


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configuration_is_the_published_one(name: str) -> None:
    from megatron_scalebio.config_loader import load_config

    shipped = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["model"]
    ours = {key: value for key, value in shipped.items() if key not in FREE}
    want = load_config(None, {"model": {"hf": str(PUBLISHED / name)}}).model
    want.hf = None
    assert load_config(None, {"model": ours}).model == want
