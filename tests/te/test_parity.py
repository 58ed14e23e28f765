"""Every family on Transformer Engine's layers equals transformers, as tests/model has it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.model import test_parity as on_local_layers
from tests.model.parity_models import LAYOUTS, STRETCHED, cases
from tests.te.double import needs_transformer_engine, run_with_te

pytestmark = [needs_transformer_engine, pytest.mark.distributed, pytest.mark.slow]

# Context parallelism needs its fused attention, which has no double. A pipeline's stages are the
# same whatever a family's variant.
FAMILIES = (
    "gpt2", "gpt-neox", "llama-3-rope", "qwen2-window", "mistral-window", "qwen3", "gemma2",
    "gemma3", "olmo2", "olmo3-yarn", "phi3-partial-longrope", "smollm3-yarn", "qwen3-moe",
    "mixtral", "glm4-moe", "deepseek2-groups", "deepseek3-yarn", "llama4-some-layers", "gpt-oss",
)  # fmt: skip
CASES = [
    (name, layout) for name, layout in cases(1) + cases(2)
    if layout == "one" or (layout == "tp2-sequence-parallel" and name not in STRETCHED)
    or (layout in ("pp2", "vpp") and name in FAMILIES)
    or (layout == "ep2" and name in ("qwen3-moe", "gpt-oss"))
]  # fmt: skip


def on_ranks(folder_name: str, ranks: int) -> None:
    of_ranks = [case for case in CASES if LAYOUTS[case[1]][0] == ranks]
    on_local_layers.on_ranks(folder_name, of_ranks)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = on_local_layers.write_references(tmp_path_factory.mktemp("parity"))
    run_with_te(on_ranks, *((ranks, str(folder), ranks) for ranks in (1, 2)))
    return folder


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_equals_transformers(results: Path, name: str, layout: str) -> None:
    on_local_layers.compare(results, name, layout)
