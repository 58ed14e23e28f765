"""FP8 is refused where the GPU can't, and what never trains has no delayed scales."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest

from megatron_scalebio.config import Config, ParallelConfig
from megatron_scalebio.errors import UserError
from megatron_scalebio.model import settings


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "blockwise"])
def test_a_gpu_that_cannot_is_named(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    can: dict[str, tuple[bool, str]] = {"": (True, ""), "block_scaling_": (True, "")}
    module: Any = types.ModuleType("transformer_engine.pytorch")
    module.is_fp8_available = lambda return_reason: can[""]
    module.is_fp8_block_scaling_available = lambda return_reason: can["block_scaling_"]
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", module)
    monkeypatch.setattr(settings, "HAVE_TRANSFORMER_ENGINE", True)
    monkeypatch.setattr(settings.runtime, "on_cuda", lambda: True)
    config = Config(parallel=ParallelConfig(bf16=True, fp8_format="hybrid", fp8_recipe=recipe))
    assert settings.uses_transformer_engine(config)
    can["block_scaling_" if recipe == "blockwise" else ""] = (False, "Needs\n compute 9.0.")
    with pytest.raises(UserError, match=f"fp8_recipe {recipe}: Needs compute 9.0. \\(drop it"):
        settings.uses_transformer_engine(config)
    config.parallel.fp8_format = None
    assert settings.uses_transformer_engine(config)


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "blockwise"])
def test_a_model_that_only_scores_has_no_delayed_scales(recipe: str) -> None:
    trained: Any = types.SimpleNamespace(fp8_recipe=recipe, hidden_size=64)
    scoring = settings.scoring_config(trained)
    assert scoring.fp8_recipe == ("tensorwise" if recipe == "delayed" else recipe)
    assert scoring.hidden_size == 64 and trained.fp8_recipe == recipe
