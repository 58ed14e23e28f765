"""Every option: its default, and that flag and file alike set it, it alone, to another value."""

from __future__ import annotations

import argparse
import typing
from dataclasses import asdict, fields
from typing import Any

import pytest

from megatron_scalebio.config import SECTIONS, Config
from megatron_scalebio.config_loader import add_arguments, config_from_args, load_config

A, B = {"name": "a", "path": "x/a"}, {"name": "b", "path": "x/b"}
FREE_SET = {
    "weight": 1.0, "reference_loss": None, "max_loss": None, "max_loss_rise": None
}  # fmt: skip
FREE = dict.fromkeys(("initial_weight", "min_weight", "max_weight", "fixed_weight"))

# section: {option: (its default, another value)}
OPTIONS: dict[str, dict[str, tuple[Any, Any]]] = {
    "data": {
        "sources": ([], [{**FREE, **A}, {**FREE, **B}]),
        "validation": ([], [{**FREE_SET, **A}]),
        "test": ([], [{**FREE_SET, **A}, {**FREE_SET, **B}]),
        "weights": (None, "x/weights.json"),
        "blend_schedule": (None, "x/blend_schedule.json"),
        "new_share": (None, 0.2),
        "keep_ratios": (False, True),
        "target_tokens": (None, 3e9),
        "target_examples": (None, 2e6),
        "max_epochs": (None, 2.5),
        "matched_repetition": (False, True),
        "seq_length": (1024, 96),
        "loss_mean": ("sample", "token"),
        "known_weights": (None, {"a": 0.25, "b": 0.75}),
    },
    "model": {
        "num_layers": (4, 6),
        "hidden_size": (128, 96),
        "num_attention_heads": (4, 8),
        "num_query_groups": (None, 2),
        "kv_channels": (None, 24),
        "ffn_hidden_size": (None, 80),
        "max_position_embeddings": (None, 2048),
        "position_embedding_type": ("rope", "learned_absolute"),
        "rotary_base": (10000, 500),
        "window_rotary_base": (None, 700),
        "rotary_percent": (1.0, 0.5),
        "rotary_interleaved": (False, True),
        "no_rope_freq": (None, [0, 1, 1, 0]),
        "normalization": ("RMSNorm", "LayerNorm"),
        "norm_epsilon": (1e-5, 1e-6),
        "apply_layernorm_1p": (False, True),
        "pre_norms": (True, False),
        "post_norms": (False, True),
        "qk_layernorm": (False, True),
        "qk_layernorm_whole": (False, True),
        "qk_l2_norm": (False, True),
        "parallel_residual": (False, True),
        "swiglu": (True, False),
        "activation": ("gelu", "geglu_tanh"),
        "activation_func_clamp_value": (None, 7.0),
        "glu_linear_offset": (0.0, 1.0),
        "num_experts": (None, 4),
        "moe_layer_freq": (None, [0, 1, 1, 0]),
        "moe_ffn_hidden_size": (None, 48),
        "moe_shared_expert_intermediate_size": (None, 56),
        "moe_shared_expert_gate": (False, True),
        "moe_router_topk": (2, 3),
        "moe_router_score_function": ("softmax", "sigmoid"),
        "moe_router_pre_softmax": (False, True),
        "moe_router_num_groups": (None, 2),
        "moe_router_group_topk": (None, 2),
        "moe_router_topk_scaling_factor": (None, 2.5),
        "moe_router_dtype": (None, "fp32"),
        "moe_router_enable_expert_bias": (False, True),
        "moe_apply_probs_on_input": (False, True),
        "moe_router_bias_update_rate": (1e-3, 0.01),
        "moe_router_load_balancing_type": ("aux_loss", "seq_aux_loss"),
        "moe_aux_loss_coeff": (0.0, 0.01),
        "moe_z_loss_coeff": (None, 1e-3),
        "moe_enable_routing_replay": (False, True),
        "moe_token_dispatcher_type": ("alltoall", "flex"),
        "multi_latent_attention": (False, True),
        "q_lora_rank": (None, 48),
        "kv_lora_rank": (512, 40),
        "qk_head_dim": (128, 24),
        "qk_pos_emb_head_dim": (64, 8),
        "v_head_dim": (128, 20),
        "add_bias_linear": (False, True),
        "add_qkv_bias": (False, True),
        "window_size": (None, [6, 0]),
        "window_attn_skip_freq": (None, 3),
        "full_attention_length": (None, 4000),
        "softmax_scale": (None, 0.3),
        "softmax_type": ("vanilla", "learnable"),
        "attn_logit_softcapping": (None, 50.0),
        "final_logit_softcapping": (None, 30.0),
        "scale_embedding": (False, True),
        "untie_embeddings_and_output_weights": (False, True),
        "vocab_size": (None, 61),
        "make_vocab_size_divisible_by": (128, 16),
        "init_method_std": (0.02, 0.1),
        "hidden_dropout": (0.0, 0.1),
        "attention_dropout": (0.0, 0.2),
        "transformer_impl": ("auto", "local"),
        "pretrained_checkpoint": (None, "x/pretrained"),
    },
    "parallel": {
        "tensor_model_parallel_size": (1, 2),
        "pipeline_model_parallel_size": (1, 4),
        "context_parallel_size": (1, 3),
        "expert_model_parallel_size": (1, 2),
        "expert_tensor_parallel_size": (None, 2),
        "num_layers_per_virtual_pipeline_stage": (None, 2),
        "sequence_parallel": (False, True),
        "use_distributed_optimizer": (False, True),
        "overlap_grad_reduce": (False, True),
        "overlap_param_gather": (False, True),
        "bf16": (False, True),
        "fp8_format": (None, "e4m3"),
        "fp8_recipe": ("tensorwise", "delayed"),
        "fp4_format": (None, "e2m1"),
        "recompute_granularity": (None, "selective"),
        "recompute_method": (None, "block"),
        "recompute_num_layers": (None, 2),
        "distributed_timeout_minutes": (10, 3),
    },
    "optimizer": {
        "lr": (3e-4, 1e-3),
        "lr_u": (None, 2e-3),
        "min_lr": (3e-4 / 10, 1e-6),
        "lr_decay_style": ("cosine", "linear"),
        "lr_warmup_fraction": (0.03, 0.2),
        "weight_decay": (0.0, 0.1),
        "adam_beta1": (0.9, 0.8),
        "adam_beta2": (0.95, 0.99),
        "adam_eps": (1e-8, 1e-5),
        "clip_grad": (1.0, 0.5),
    },
    "bilevel": {
        "preset": (None, "paper"),
        "objective": ("mean", "worst_case"),
        "interactions": (False, True),
        "group_sources": (None, 2),
        "level": ("source", "example"),
        "alpha": (10.0, 7.0),
        "alpha_growth": (1.0, 2.0),
        "outer_rounds": (1, 4),
        "mixture_optimizer": ("eg", "adamw"),
        "lr_lambda": (0.1, 0.03),
        "lr_lambda_decay_style": ("constant", "cosine"),
        "resync_interval": (10, 5),
        "memory_growth": (0.5, 0.25),
        "floor_share": (0.25, 0.5),
        "average_fraction": (0.5, 0.2),
        "confidence": (0.95, 0.8),
        "tolerance": (0.05, 0.1),
        "kl_to_prior": (0.0, 0.3),
        "prior": (None, "initial"),
        "final_train_iters": (None, 300),
        "final_check": (True, False),
        "early_stop": (False, True),
        "blend_floor": (1e-3, 0.01),
    },
    "baseline": {
        "method": ("scalebio", "doge"),
        "reference_iters": (None, 11),
        "proxies": (None, 12),
        "proxy_iters": (None, 13),
        "swarm": (None, "finished"),
        "domain_lr": (None, 0.7),
        "select_fraction": (0.05, 0.2),
        "less_checkpoints": (4, 3),
        "less_warmup_fraction": (0.05, 0.3),
        "less_dimensions": (8192, 64),
        "rho_online": (True, False),
        "rho_batch_share": (0.1, 0.4),
    },
    "lisa": {
        "lisa_layers": (None, 2),
        "lisa_interval": (20, 7),
        "lisa_train_embedding": (True, False),
        "lisa_train_norm": (True, False),
        "lisa_train_routers": (False, True),
    },
    "train": {
        "output": ("run", "x/out"),
        "train_iters": (800, 9),
        "train_epochs": (None, 1.5),
        "micro_batch_size": (4, 2),
        "global_batch_size": (32, 48),
        "validation_batch_size": (32, 16),
        "eval_interval": (100, 11),
        "packing": (False, True),
        "eval_examples": (None, 37),
        "seed": (1234, 5),
        "skip_limit": (5, 3),
    },
    "checkpoint": {
        "save": (None, "x/save"),
        "load": (None, "x/load"),
        "save_interval": (100, 8),
        "keep_last": (2, 3),
        "async_save": (False, True),
    },
    "logging": {
        "log_interval": (10, 4),
        "tensorboard_dir": (None, "x/tb"),
        "tensorboard_log_interval": (1, 3),
        "wandb_project": (None, "mixtures"),
        "wandb_exp_name": (None, "first"),
        "mlflow_experiment": (None, "mixtures"),
        "record_memory_history": (False, True),
    },
}
# In files alone, or naming a folder that has to be there: tests of their own; or refused.
ELSEWHERE = {
    ("model", "rope_scaling"), ("model", "hf"), ("parallel", "fp8_param_gather"),
    ("data", "data_args_path"), ("data", "groups"),
}  # fmt: skip
# Neither of which is anything without the other: tests/test_experts_config.py.
PAIR = {"moe_router_num_groups", "moe_router_group_topk"}

# Options that another one cannot be without.
EXPERTS = {"num_experts": 4}
LATENT = {"multi_latent_attention": True, "qk_layernorm": True}
LATENT_OPTIONS = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
NEEDS: dict[str, dict[str, dict[str, Any]]] = {
    **{name: {"model": EXPERTS} for name in OPTIONS["model"] if name.startswith("moe_")},
    "swarm": {"baseline": {"method": "olmix"}},
    "matched_repetition": {"data": {"target_examples": 1e6}},
    "multi_latent_attention": {"model": {"qk_layernorm": True}},
    **{name: {"model": LATENT} for name in LATENT_OPTIONS},
    "pre_norms": {"model": {"post_norms": True}},
    "qk_layernorm_whole": {"model": {"qk_layernorm": True}},
    "window_rotary_base": {"model": {"window_size": [6, 0]}},
    "moe_shared_expert_gate": {"model": {**EXPERTS, "moe_shared_expert_intermediate_size": 64}},
    "moe_router_enable_expert_bias": {"model": {**EXPERTS, "moe_router_score_function": "sigmoid"}},
    "moe_apply_probs_on_input": {
        "model": {**EXPERTS, "moe_router_topk": 1, "moe_router_pre_softmax": True}
    },
    "known_weights": {"data": {"sources": [A, B]}},
    "max_epochs": {"data": {"target_examples": 2e6}},
    "new_share": {"data": {"weights": "x/weights.json"}},
    "keep_ratios": {"data": {"weights": "x/weights.json"}},
    "window_attn_skip_freq": {"model": {"window_size": [6, 0]}},
    "num_layers_per_virtual_pipeline_stage": {"parallel": {"pipeline_model_parallel_size": 4}},
    "sequence_parallel": {"parallel": {"tensor_model_parallel_size": 2}},
    "overlap_param_gather": {
        "parallel": {"overlap_grad_reduce": True, "use_distributed_optimizer": True}
    },
    "fp8_format": {"parallel": {"bf16": True}},
    "fp4_format": {"parallel": {"bf16": True}},
}

# What an option's value decides besides, where nothing else is given.
DECIDES: dict[str, dict[str, Any]] = {
    "lr": {"optimizer.min_lr": 1e-3 / 10},
    "mixture_optimizer": {"bilevel.lr_lambda": 0.01},
    "global_batch_size": {"train.validation_batch_size": 48},
    "preset": {
        "bilevel.alpha": 100.0, "bilevel.mixture_optimizer": "adamw", "bilevel.lr_lambda": 0.01,
        "bilevel.lr_lambda_decay_style": "cosine", "bilevel.resync_interval": None,
        "bilevel.floor_share": 1.0, "lisa.lisa_layers": 4,
        "train.train_epochs": 1.0,
    },
}  # fmt: skip
CASES = [(section, name) for section, options in OPTIONS.items() for name in options]


def from_flags(words: list[str]) -> Config:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return config_from_args(parser.parse_args(words))


def words_of(name: str, value: Any) -> list[str]:
    """The flag that gives an option a value."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    if isinstance(value, list) and isinstance(value[0], int):
        return [f"--{flag}", ",".join(map(str, value))]
    if isinstance(value, list):
        return [f"--{flag}", *(f"{entry['name']}={entry['path']}" for entry in value)]
    if isinstance(value, dict):
        return [f"--{flag}", *(f"{key}={number}" for key, number in value.items())]
    return [f"--{flag}", str(value)]


def flat(config: Config) -> dict[str, Any]:
    tree = asdict(config)
    return {f"{s}.{name}": value for s, options in tree.items() for name, value in options.items()}


def test_the_table_holds_every_option() -> None:
    hints = typing.get_type_hints(Config)
    every = {(name, spec.name) for name in SECTIONS for spec in fields(hints[name])}
    assert every == set(CASES) | ELSEWHERE


def test_defaults_are_those_that_are_told() -> None:
    told = {f"{s}.{name}": OPTIONS[s][name][0] for s, name in CASES}
    elsewhere = {
        "model.rope_scaling": None, "model.hf": None, "parallel.fp8_param_gather": False,
        "data.data_args_path": None, "data.groups": {},
    }  # fmt: skip
    assert flat(Config()) == {**told, **elsewhere}


@pytest.mark.parametrize(("section", "name"), [case for case in CASES if case[1] not in PAIR])
def test_flag_and_file_set_the_option_and_nothing_else(section: str, name: str) -> None:
    default, value = OPTIONS[section][name]
    assert value != default
    tree = {part: dict(options) for part, options in NEEDS.get(name, {}).items()}
    words = [w for options in tree.values() for k, v in options.items() for w in words_of(k, v)]
    without = flat(load_config(None, tree))
    tree.setdefault(section, {})[name] = value
    config = load_config(None, tree)
    expected = {**without, f"{section}.{name}": value, **DECIDES.get(name, {})}
    assert flat(config) == expected
    assert from_flags([*words, *words_of(name, value)]) == config
    assert type(asdict(config)[section][name]) is type(value)


@pytest.mark.parametrize("name", ["swiglu", "rho_online", "bf16", "async_save"])
def test_a_switch_can_be_turned_back_on_the_command_line(name: str) -> None:
    [section] = [section for section, options in OPTIONS.items() if name in options]
    for value in (True, False):
        words = words_of(name, not value) + words_of(name, value)
        assert getattr(getattr(from_flags(words), section), name) is value


def test_weights_of_sources_and_validation_sets_are_kept() -> None:
    data = {
        "sources": [{**A, "initial_weight": 3}, {**B, "initial_weight": 0.5}],
        "validation": [{**A, "weight": 2}, B],
        "test": [{**B, "weight": 4}],
    }
    config = load_config(None, {"data": data})
    assert [source.initial_weight for source in config.data.sources] == [3.0, 0.5]
    assert [entry.weight for entry in config.data.validation] == [2.0, 1.0]
    assert [entry.weight for entry in config.data.test] == [4.0]


def test_full_recompute_is_of_one_layer_at_a_time_unless_told() -> None:
    given = {"recompute_granularity": "full", "recompute_method": "block"}
    for parallel, method, layers in (
        ({"recompute_granularity": "full"}, "uniform", 1),
        ({**given, "recompute_num_layers": 3}, "block", 3),
    ):
        found = load_config(None, {"parallel": parallel}).parallel
        assert (found.recompute_method, found.recompute_num_layers) == (method, layers)


def test_the_preset_is_the_method_as_published() -> None:
    """ScaleBiO, section 5 and its code: AdamW on λ at 1e-2 and α 100, LISA, cosine, no resets."""
    others = {
        "optimizer": {"lr_decay_style": "constant", "lr_warmup_fraction": 0.2, "clip_grad": 3.0},
        "lisa": {"lisa_interval": 50},
    }
    config = load_config(None, {"bilevel": {"preset": "paper"}})
    optimizer = config.optimizer
    assert (optimizer.lr_decay_style, optimizer.lr_warmup_fraction) == ("cosine", 0.03)
    assert (optimizer.clip_grad, config.lisa.lisa_interval) == (1.0, 20)
    mine = load_config(None, {"bilevel": {"preset": "paper"}, **others})
    assert mine.optimizer.lr_decay_style == "constant" and mine.optimizer.clip_grad == 3.0
    assert (mine.optimizer.lr_warmup_fraction, mine.lisa.lisa_interval) == (0.2, 50)
    assert load_config(None, {"bilevel": {"preset": "paper"}}) == config, (
        "a preset is never altered"
    )


def test_epochs_are_passes_over_the_examples_rounded_up_to_steps() -> None:
    for examples, steps in ((31, 10), (29, 10)):  # 77.5 / 8 = 9.69, 72.5 / 8 = 9.06
        train = load_config(None, {"train": {"train_epochs": 2.5, "global_batch_size": 8}}).train
        train.resolve_epochs(examples)
        assert (train.train_iters, train.train_epochs) == (steps, None)
