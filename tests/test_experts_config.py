"""Options of a mixture of experts that do not go together are refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_scalebio.config import Config, ModelConfig
from megatron_scalebio.config_loader import load_config
from megatron_scalebio.errors import UserError

SIGMOID = {"moe_router_score_function": "sigmoid"}
GROUPS = {"moe_router_num_groups": 4, "moe_router_group_topk": 2}
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
ENTRY = {"name": "a", "path": "x"}
ETP = "expert_tensor_parallel_size"


def config(model: dict[str, Any], parallel: dict[str, Any] | None = None) -> Config:
    tree = {
        "data": {"sources": [ENTRY, {**ENTRY, "name": "b"}], "validation": [ENTRY]},
        "model": model, "parallel": parallel or {},
    }  # fmt: skip
    return load_config(None, tree)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"num_experts": 0}, "num_experts: 0 must be above 0"),
        ({"num_experts": 4, "moe_router_topk": 5}, "moe_router_topk: 5 is above num_experts 4"),
        ({"num_experts": 4, "moe_router_topk": 1}, "moe_router_topk: 1 gives every token"),
        ({"num_experts": 4, "moe_apply_probs_on_input": True}, "needs moe_router_topk 1, not 2"),
        ({"num_experts": 4, "moe_router_enable_expert_bias": True}, "needs moe_router_score_func"),
        (
            {"num_experts": 4, "add_bias_linear": True, "moe_shared_expert_intermediate_size": 64},
            "add_bias_linear: True does not go with moe_shared_expert_intermediate_size",
        ),
        ({"num_experts": 4, "parallel_residual": True}, "parallel_residual: True does not go"),
        ({"num_experts": 4, "moe_shared_expert_gate": True}, "needs moe_shared_expert_inter"),
        ({"num_experts": 4, "moe_aux_loss_coeff": -1.0}, "moe_aux_loss_coeff: -1.0 must be"),
        ({"num_experts": 8, "moe_router_num_groups": 4}, "moe_router_num_groups: 4 and moe_rou"),
        ({"num_experts": 6, **GROUPS}, "moe_router_num_groups: 4 groups, of which 2 are chosen"),
        ({"num_experts": 8, **GROUPS, "moe_router_topk": 3}, "moe_router_topk: 3 experts cannot"),
        ({"num_experts": 4, "moe_layer_freq": [1, 0]}, "moe_layer_freq: [1, 0] must have a 1 or a"),
        ({"num_experts": 4, "moe_layer_freq": [0, 0, 0, 0]}, "moe_layer_freq: [0, 0, 0, 0] must"),
        ({"moe_ffn_hidden_size": 64}, "moe_ffn_hidden_size: 64 needs num_experts (set it)"),
    ],
)
def test_a_model_that_cannot_be_is_refused(model: dict, said: str) -> None:
    with pytest.raises(UserError) as refusal:
        config(model)
    assert said in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("model", "parallel", "ranks", "said"),
    [
        ({"num_experts": 6}, {"expert_model_parallel_size": 4}, 4, "4 does not divide num_experts"),
        ({"num_experts": 4}, {"expert_model_parallel_size": 4}, 2, "4 x PP 1 x expert TP 1 does"),
        ({}, {"expert_model_parallel_size": 2}, 2, "need model.num_experts (set it)"),
        ({"num_experts": 4}, {**TP2, "sequence_parallel": False}, 2, "2 needs sequence_parallel"),
        ({"num_experts": 4, "add_bias_linear": True}, TP2, 2, "2 does not go with add_bias_linear"),
        ({"num_experts": 4, "moe_ffn_hidden_size": 15}, TP2, 2, "moe_ffn_hidden_size: 15 is not"),
        (
            {"num_experts": 4, "moe_shared_expert_intermediate_size": 9}, {**TP2, ETP: 1}, 2,
            "moe_shared_expert_intermediate_size: 9 is not divisible by the 2 ranks",
        ),
    ],
)  # fmt: skip
def test_a_layout_that_experts_do_not_fit_is_refused(
    model: dict, parallel: dict, ranks: int, said: str
) -> None:
    with pytest.raises(UserError) as refusal:
        config(model, parallel).validate(ranks)
    assert said in str(refusal.value) and "\n" not in str(refusal.value)


def test_what_goes_together_is_taken() -> None:
    config({"num_experts": 4, "moe_router_topk": 1, "moe_router_pre_softmax": True}).validate(1)
    config({"num_experts": 8, **GROUPS, **SIGMOID, "moe_router_topk": 4}).validate(1)
    config({"num_experts": 4, "moe_ffn_hidden_size": 15}, {**TP2, ETP: 1}).validate(4)


def test_layers_with_experts_are_named_or_counted() -> None:
    def layers(freq: Any) -> Any:
        return ModelConfig(num_layers=4, num_experts=2, moe_layer_freq=freq).moe_layer_freq

    assert layers([2]) == [1, 0, 1, 0] == layers([1, 0, 1, 0])
    assert layers([1]) is None is layers([1, 1, 1, 1])
    assert layers([0, 1, 1, 1]) == [0, 1, 1, 1]


def test_losses_of_routers_are_the_users_beside_a_hugging_face_model(tmp_path: Path) -> None:
    from transformers import Qwen3MoeConfig

    published = Qwen3MoeConfig(architectures=["Qwen3MoeForCausalLM"], num_experts=8)
    published.save_pretrained(tmp_path)
    hf = {"hf": str(tmp_path), "moe_z_loss_coeff": 0.01}
    model = config({**hf, "moe_aux_loss_coeff": 0.1, "num_experts": 8}).model
    assert (model.num_experts, model.moe_router_topk, model.moe_layer_freq) == (8, 8, None)
    assert (model.moe_aux_loss_coeff, model.moe_z_loss_coeff) == (0.1, 0.01)
    with pytest.raises(UserError, match=r"moe_router_topk: 2 is not 8, as in .* \(remove moe_rou"):
        config({**hf, "moe_router_topk": 2})
