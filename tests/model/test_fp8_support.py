"""FP8 is refused where the GPU can't, and what never trains has no delayed scales."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest

from megatron_scalebio.config import Config, ParallelConfig
from megatron_scalebio.errors import UserError
from megatron_scalebio.model import settings

CHECKS = {
    "tensorwise": "is_fp8_available", "delayed": "is_fp8_available",
    "blockwise": "is_fp8_block_scaling_available", "mxfp8": "is_mxfp8_available",
    "nvfp4": "is_nvfp4_available",
}  # fmt: skip


@pytest.mark.parametrize("recipe", CHECKS)
def test_a_gpu_that_cannot_is_named(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = types.ModuleType("transformer_engine.pytorch")
    for check in CHECKS.values():
        setattr(module, check, lambda return_reason: (True, ""))
    package: Any = types.ModuleType("transformer_engine")
    package.pytorch = module
    monkeypatch.setitem(sys.modules, "transformer_engine", package)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", module)
    monkeypatch.setattr(settings, "HAVE_TRANSFORMER_ENGINE", True)
    monkeypatch.setattr(settings.runtime, "on_cuda", lambda: True)
    parallel = ParallelConfig(bf16=True)
    if recipe == "nvfp4":
        parallel.fp4_format = "e2m1"
    else:
        parallel.fp8_format, parallel.fp8_recipe = "hybrid", recipe
    config = Config(parallel=parallel)
    assert settings.uses_transformer_engine(config)
    setattr(module, CHECKS[recipe], lambda return_reason: (False, "Needs\n compute 9.0."))
    with pytest.raises(UserError, match=f"recipe {recipe}: Needs compute 9.0. \\(drop it"):
        settings.uses_transformer_engine(config)
    parallel.fp8_format = parallel.fp4_format = None
    assert settings.uses_transformer_engine(config)


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "blockwise"])
def test_a_model_that_only_scores_has_no_delayed_scales(recipe: str) -> None:
    trained: Any = types.SimpleNamespace(fp8_recipe=recipe, hidden_size=64)
    scoring = settings.scoring_config(trained)
    assert scoring.fp8_recipe == ("tensorwise" if recipe == "delayed" else recipe)
    assert scoring.hidden_size == 64 and trained.fp8_recipe == recipe
