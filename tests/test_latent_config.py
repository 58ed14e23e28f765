"""Options of latent attention that do not fit together, or a layout, are refused in one line."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_scalebio.config import Config
from megatron_scalebio.config_loader import load_config
from megatron_scalebio.errors import UserError

LATENT = {"multi_latent_attention": True, "qk_layernorm": True}
YARN = {"rope_type": "yarn", "factor": 2}


def config(model: dict[str, Any], parallel: dict[str, Any] | None = None) -> Config:
    entry = [{"name": "a", "path": "data/a"}]
    data = {"sources": [*entry, {"name": "b", "path": "data/b"}], "validation": entry}
    return load_config(None, {"data": data, "model": model, "parallel": parallel or {}})


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"q_lora_rank": 8}, "q_lora_rank: 8 needs multi_latent_attention"),
        ({"multi_latent_attention": True}, "needs qk_layernorm"),
        ({**LATENT, "v_head_dim": 0}, "v_head_dim: 0 must be above 0"),
        ({**LATENT, "num_query_groups": 2}, "num_query_groups: 2 is not num_attention_heads 4"),
        ({**LATENT, "add_qkv_bias": True}, "add_qkv_bias: True does not go with"),
        ({**LATENT, "rotary_interleaved": True}, "rotary_interleaved: True does not go with"),
        ({**LATENT, "qk_l2_norm": True}, "qk_l2_norm: True does not go with qk_layernorm"),
        ({**LATENT, "rotary_percent": 0.5}, "needs rope, on all of qk_pos_emb_head_dim"),
        ({**LATENT, "qk_pos_emb_head_dim": 7}, "rope turn 7 channels"),
        ({**LATENT, "rope_scaling": {"rope_type": "linear", "factor": 2}}, "'linear' with multi"),
        ({**LATENT, "rope_scaling": {**YARN, "attention_factor": 1.5}}, "'yarn' with multi_latent"),
        ({**LATENT, "rope_scaling": {**YARN, "mscale": 0.7}}, "both or none of mscale"),
    ],
)
def test_options_that_do_not_fit_are_refused(model: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as refusal:
        config(model)
    assert said in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("model", "parallel", "said"),
    [
        (LATENT, {}, "needs sequence_parallel with multi_latent_attention"),
        ({**LATENT, "kv_lora_rank": 9}, {"sequence_parallel": True}, "model.kv_lora_rank: makes a"),
        ({**LATENT, "q_lora_rank": 9}, {"sequence_parallel": True}, "model.q_lora_rank: makes a"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(
    model: dict[str, Any], parallel: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError) as refusal:
        config(model, {"tensor_model_parallel_size": 2, **parallel}).validate(2)
    assert said in str(refusal.value) and "\n" not in str(refusal.value)
