"""Fields that are right alone and do not go together, or not on so many ranks."""

from __future__ import annotations

import pytest

from megatron_scalebio.config_loader import load_config
from megatron_scalebio.errors import UserError
from tests.test_config import DATA

LATENT = {"multi_latent_attention": True, "qk_layernorm": True}
# (sections over DATA, ranks, words of the answer)
DISAGREEING = [
    (
        {"parallel": {"overlap_param_gather": True, "overlap_grad_reduce": True,
                      "use_distributed_optimizer": True}},
        1, "leaves weights to be gathered",
    ),
    ({"data": {"sources": DATA["sources"][:1]}}, 1, "is not a mixture (name two"),
    ({"bilevel": {"prior": {"a": 0.5, "b": 0.5}}}, 1, "has no effect without kl_to_prior"),
    ({"data": {"validation": []}}, 1, "data.validation: [] is empty"),
    ({"parallel": {"tensor_model_parallel_size": 4}}, 2, "world size: 2 is not divisible by TP 4"),
    ({"parallel": {"tensor_model_parallel_size": 3}}, 3, "3 does not divide the 4 attention heads"),
    ({"parallel": {"pipeline_model_parallel_size": 3}}, 3, "does not divide num_layers 4"),
    ({"train": {"micro_batch_size": 5}}, 1, "global_batch_size: 32 is not divisible"),
    ({"train": {"validation_batch_size": 6}}, 2, "validation_batch_size: 6 is not divisible"),
    ({"lisa": {"lisa_layers": 5}}, 1, "lisa.lisa_layers: 5 is above num_layers 4"),
    ({"parallel": {"recompute_granularity": "full", "recompute_num_layers": 5}}, 1,
     "recompute_num_layers: 5 is above the 4 layers"),
    ({"parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
      "data": {"seq_length": 17}}, 2, "data.seq_length: 17 is not divisible by TP 2"),
    ({"parallel": {"context_parallel_size": 2}}, 1, "not divisible by TP 1 x PP 1 x CP 2"),
    ({"parallel": {"context_parallel_size": 2}, "train": {"packing": True}}, 2,
     "train.packing: True with parallel.context_parallel_size 2 is not supported"),
    ({"model": {"num_experts": 4, "moe_router_load_balancing_type": "seq_aux_loss"},
      "train": {"packing": True}}, 1, "train.packing: True with model.moe_router_load_balancing"),
    ({"parallel": {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1},
      "model": {"num_layers": 4},
      "train": {"packing": True, "micro_batch_size": 1, "global_batch_size": 5,
                "validation_batch_size": 4}}, 2,
     "train.global_batch_size: 5 is not divisible by the 2 stages of the interleaved pipeline"),
    ({"parallel": {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1},
      "train": {"packing": True, "micro_batch_size": 1, "global_batch_size": 6,
                "validation_batch_size": 4}}, 4,
     "pipeline x data-parallel size 2, which packing needs (use a multiple of 4)"),
    ({"parallel": {"context_parallel_size": 2}, "data": {"seq_length": 18}}, 2,
     "data.seq_length: 18 is not divisible by 2 x CP 2"),
    ({"parallel": {"context_parallel_size": 2, "tensor_model_parallel_size": 2,
                   "sequence_parallel": True}, "data": {"seq_length": 20}}, 4,
     "data.seq_length: 20 is not divisible by 2 x CP 2 x TP 2"),
    ({"parallel": {"context_parallel_size": 2}, "train": {"validation_batch_size": 6}}, 4,
     "validation_batch_size: 6 is not divisible by micro_batch_size 4 x data-parallel size 2"),
    ({"parallel": {"bf16": True, "fp8_format": "hybrid", "context_parallel_size": 2},
      "data": {"seq_length": 48}}, 2, "data.seq_length: 48 is not divisible by 16 x TP 1 x CP 2"),
    ({"model": {"max_position_embeddings": 8}}, 1, "8 is below data.seq_length 1024"),
    ({"model": {"max_position_embeddings": 1023, "rope_scaling": {"rope_type": "dynamic",
                                                                  "factor": 2}}}, 1,
     "model.rope_scaling.rope_type: 'dynamic' has other frequencies for each length above "
     "max_position_embeddings 1023"),
    ({"model": {"max_position_embeddings": 256, "rope_scaling": {
        "rope_type": "yarn", "factor": 3, "original_max_position_embeddings": 256}}}, 1,
     "max_position_embeddings: 256 is below data.seq_length 1024"),
    ({"model": {"full_attention_length": 1023}}, 1,
     "model.full_attention_length: 1023 is below data.seq_length 1024: beyond it the model attends "
     "in chunks (attention_chunk_size) or at other scales (floor_scale)"),
    ({"lisa": {"lisa_layers": 2, "lisa_train_routers": True}}, 1,
     "lisa.lisa_train_routers: True needs model.num_experts"),
    ({"lisa": {"lisa_layers": 2, "lisa_interval": 1}}, 1,
     "lisa.lisa_interval: 1 leaves u no step to depart from w"),
    ({"model": {"ffn_hidden_size": 33}, "parallel": {"tensor_model_parallel_size": 2}}, 2,
     "ffn_hidden_size: 33 is not divisible by TP 2"),
    ({"parallel": {"bf16": True, "fp8_format": "hybrid"}, "model": {"hidden_size": 120}}, 1,
     "hidden_size: 120 makes a matrix of 120 on each TP rank"),
    ({"parallel": {"bf16": True, "fp8_format": "hybrid"}, "data": {"seq_length": 40}}, 1,
     "data.seq_length: 40 is not divisible by 16 x TP 1"),
    ({"parallel": {"bf16": True, "fp8_format": "hybrid"},
      "model": {"num_experts": 4, "moe_ffn_hidden_size": 40}}, 1,
     "model.moe_ffn_hidden_size: 40 makes a matrix of 40 on each TP rank"),
    ({"parallel": {"bf16": True, "fp8_format": "hybrid"},
      "model": {"num_experts": 4, "moe_shared_expert_intermediate_size": 24}}, 1,
     "model.moe_shared_expert_intermediate_size: 24 makes a matrix of 24 on each TP rank"),
    ({"parallel": {"bf16": True, "fp8_format": "hybrid"}, "model": {**LATENT, "q_lora_rank": 40}},
     1, "model.q_lora_rank: 40 makes a matrix of 40 on each TP rank"),
    ({"parallel": {"bf16": True, "fp8_format": "hybrid"},
      "model": {**LATENT, "qk_pos_emb_head_dim": 8}}, 1,
     "model.qk_pos_emb_head_dim: 8 makes a matrix of 520 on each TP rank"),
    ({"parallel": {"bf16": True, "fp8_format": "hybrid", "fp8_recipe": "mxfp8"},
      "data": {"seq_length": 48}}, 1, "data.seq_length: 48 is not divisible by 32 x TP 1, which "
     "fp8_format with recipe mxfp8 needs"),
    ({"parallel": {"bf16": True, "fp4_format": "e2m1"}, "model": {"hidden_size": 112}}, 1,
     "112 on each TP rank, which fp4_format with recipe nvfp4 needs divisible by 32"),
    ({"parallel": {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 2}},
     2, "does not split 4 layers over 2 stages"),
]  # fmt: skip


@pytest.mark.parametrize(("sections", "ranks", "words"), DISAGREEING)
def test_fields_that_disagree_are_refused(sections: dict, ranks: int, words: str) -> None:
    config = load_config(None, {**sections, "data": {**DATA, **sections.get("data", {})}})
    with pytest.raises(UserError) as refusal:
        config.validate(ranks)
    assert words in str(refusal.value), refusal.value
    assert str(refusal.value).endswith(")"), "says how to fix it"


def test_fields_that_agree_pass() -> None:
    load_config(None, {"data": DATA}).validate(1)
    load_config(None, {"data": DATA, "parallel": {"tensor_model_parallel_size": 2}}).validate(8)
    each_step = {
        "lisa": {"lisa_layers": 2, "lisa_interval": 1},
        "bilevel": {"resync_interval": None},
    }
    load_config(None, {"data": DATA, **each_step}).validate(1)
    yarn = {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 256}
    model = {"max_position_embeddings": 256, "rope_scaling": yarn}
    load_config(None, {"data": DATA, "model": model}).validate(1)  # 1024 tokens
    load_config(None, {"data": DATA, "model": {"full_attention_length": 1024}}).validate(1)
