"""Do Megatron-Bridge's tables make the same Megatron tensors of a Hugging Face model as ours?

Takes an unpacked wheel of Megatron-Bridge. For the tiny models of tests/model that it knows, each
tensor that `convert import` writes is compared, bit for bit, with what Bridge's mapping makes of
the same files, and the options of the model with those that Bridge reads from config.json. Nothing
is run: on a CPU, Bridge's models lack Transformer Engine.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import common
import torch
from megatron_bridge import found_beside_core, import_with_stand_ins

from megatron_scalebio.compat import cpu
from megatron_scalebio.config_loader import load_config
from megatron_scalebio.convert.importer import ImportPlan
from megatron_scalebio.convert.table import Whole
from megatron_scalebio.model.settings import transformer_config
from tests.model.parity_models import MODELS
from tests.model.test_parity import write_reference

# Options of a model that both write as Megatron-Core does.
OPTIONS = [
    "num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size",
    "normalization", "layernorm_epsilon", "gated_linear_unit", "add_bias_linear", "add_qkv_bias",
    "qk_layernorm", "softmax_type", "activation_func_clamp_value", "glu_linear_offset",
    "no_rope_freq", "num_moe_experts", "moe_layer_freq", "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size", "moe_router_topk", "moe_router_score_function",
    "moe_router_pre_softmax", "moe_router_enable_expert_bias", "moe_router_topk_scaling_factor",
    "moe_router_num_groups", "moe_router_group_topk", "q_lora_rank", "kv_lora_rank",
    "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim",
]  # fmt: skip


def name_in_bridge(whole: Whole) -> str:
    """Of a tensor in Transformer Engine's model, whose experts are numbered at the end."""
    if whole.layer is None:
        return whole.map.megatron
    name = whole.layer_key.replace(".experts.experts.", ".experts.")
    return name if whole.expert is None else f"{name}{whole.expert}"


def module_of(config: Any, name: str, like: torch.Tensor) -> torch.nn.Module:
    """What a mapping asks of the module that holds a tensor."""
    module = torch.nn.Module()
    module.config, module.tensor_model_parallel = config, False
    for each in ("weight", re.sub(r"\d+$", "0", name.rpartition(".")[2])):
        setattr(module, each, torch.nn.Parameter(torch.empty_like(like)))
    return module


def compare(auto_bridge: Any, folder: Path) -> tuple[int, list[str], list[str]]:
    """Tensors that are equal; those that are not; options that differ."""
    pretrained = auto_bridge.from_hf_pretrained(str(folder), torch_dtype=torch.float32)
    bridge = pretrained._model_bridge
    bridge.hf_pretrained = pretrained.hf_pretrained
    theirs = bridge.provider_bridge(pretrained.hf_pretrained)
    mappings, plan = bridge.mapping_registry(), ImportPlan(folder, 1, 1)
    others: list[str] = []
    for whole in plan.table.wholes:
        name, ours = name_in_bridge(whole), plan.read(whole)
        mapping = mappings.megatron_to_hf_lookup(name)
        if mapping is not None:
            given = bridge.maybe_modify_loaded_hf_weight(
                mapping.hf_param, pretrained.hf_pretrained.state
            )
            made = mapping.hf_to_megatron(given, module_of(theirs, name, ours))
        if mapping is None or not torch.equal(made, ours):
            others.append(name)
    ours = transformer_config(load_config(None, {"model": {"hf": str(folder)}}))
    differ = [
        f"{name} {getattr(ours, name)}, {getattr(theirs, name)}"
        for name in OPTIONS
        if hasattr(theirs, name) and getattr(theirs, name) != getattr(ours, name)
    ]
    return len(plan.table.wholes) - len(others), others, differ


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bridge", type=Path, required=True, help="unpacked wheel")
    args = parser.parse_args()
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": "29412", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}  # fmt: skip
    cpu.adapt()
    found_beside_core(args.bridge)
    auto_bridge = import_with_stand_ins("megatron.bridge.models.conversion.auto_bridge").AutoBridge
    import_with_stand_ins("megatron.bridge.models")
    from megatron.core import parallel_state

    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    known, rows = set(auto_bridge.list_supported_models()), []
    with tempfile.TemporaryDirectory() as folder:
        for name, (prefix, _) in MODELS.items():
            if f"{prefix.removesuffix('Text')}ForCausalLM" in known:
                write_reference(Path(folder), name)
                equal, others, differ = compare(auto_bridge, Path(folder) / name)
                rows.append([name, equal, ", ".join(others) or "-", "; ".join(differ) or "-"])
    print(common.table(["model", "equal", "not", "options (ours, Bridge's)"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
