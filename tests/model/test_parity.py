"""Every family equals transformers: logits, loss and the gradient of every tensor, in fp32.

The reference is the eager implementation of a tiny random model with awkward shapes. Ours is
imported by `convert`, so its rules are tested by the same numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.gather import global_tensors, merged, relative
from tests.distributed.harness import next_layout, run_distributed

pytestmark = pytest.mark.distributed

BATCH, LENGTH = 3, 40
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
# Both were first trained on 16 tokens; a base of 100 puts a channel on yarn's ramp.
YARN = {
    "rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 4.0],
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 3.0}
SHAPE = {
    "vocab_size": 101, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
NEOX = {**{k: v for k, v in SHAPE.items() if k != "num_key_value_heads"}, "hidden_size": 64}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20}
LATENT = {"kv_lora_rank": 18, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 7}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}

# name: (transformers' class prefix, configuration)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": (
        "GPT2",
        {"vocab_size": 101, "n_embd": 48, "n_layer": 4, "n_head": 4, "n_positions": 64},
    ),
    "gpt-neox": ("GPTNeoX", {**NEOX, "hidden_act": "gelu"}),
    "gpt-neox-sequential": ("GPTNeoX", {**NEOX, "use_parallel_residual": False, **TIED}),
    "llama-3-rope": ("Llama", {**SHAPE, **UNTIED, "rope_parameters": LLAMA3}),
    "llama-9-heads-3-groups": (
        "Llama",
        {**SHAPE, **TIED, "hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3},
    ),
    "llama-mqa-linear-rope": (
        "Llama",
        {**SHAPE, **UNTIED, "num_key_value_heads": 1, "rope_parameters": LINEAR, "head_dim": 16},
    ),
    "llama-longrope": ("Llama", {**SHAPE, **UNTIED, "rope_parameters": LONGROPE}),
    "qwen2-yarn": (
        "Qwen2", {**SHAPE, **UNTIED, "max_position_embeddings": 16, "rope_parameters": YARN},
    ),
    "mistral-window": ("Mistral", {**SHAPE, **UNTIED, "sliding_window": 7}),
    "qwen2-tied": ("Qwen2", {**SHAPE, **TIED}),
    "qwen2-window": (
        "Qwen2",
        {
            **SHAPE, **UNTIED, "use_sliding_window": True, "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "smollm3-yarn": (
        "SmolLM3",
        {**SHAPE, **TIED, "max_position_embeddings": 16, "rope_parameters": YARN,
         "no_rope_layers": [1, 0, 1, 0, 1], "pad_token_id": None},
    ),
    "phi3-partial-longrope": (
        "Phi3",
        {**SHAPE, **TIED, "original_max_position_embeddings": 16, "sliding_window": 35,
         "rope_parameters": {**LONGROPE, "partial_rotary_factor": 0.5, "long_factor": [1.5, 3, 4],
                             "short_factor": [1.0, 1.1, 1.2]},
         "pad_token_id": None},
    ),
    "qwen3": ("Qwen3", {**SHAPE, **UNTIED, "head_dim": 16}),
    "qwen3-moe": (
        "Qwen3Moe",
        {**SHAPE, **EXPERTS, **UNTIED, "head_dim": 16, "norm_topk_prob": True,
         "mlp_only_layers": [1]},
    ),
    "qwen3-moe-all-scores": (
        "Qwen3Moe", {**SHAPE, **EXPERTS, **TIED, "head_dim": 16, "norm_topk_prob": False},
    ),
    "glm4-moe": (
        "Glm4Moe",
        {**SHAPE, **UNTIED, "head_dim": 16, "n_routed_experts": 6, "num_experts_per_tok": 3,
         "moe_intermediate_size": 20, "n_shared_experts": 2, "first_k_dense_replace": 1,
         "routed_scaling_factor": 1.7, "use_qk_norm": True, "attention_bias": True},
    ),
    "deepseek2-groups": (
        "DeepseekV2",
        {**SHAPE, **LATENT, **UNTIED, "num_key_value_heads": 4, "q_lora_rank": None,
         "moe_intermediate_size": 20, "first_k_dense_replace": 0, "n_routed_experts": 6,
         "num_experts_per_tok": 2, "n_group": 3, "topk_group": 2, "n_shared_experts": 1,
         "topk_method": "group_limited_greedy", "norm_topk_prob": False,
         "routed_scaling_factor": 1.3, "rms_norm_eps": 1e-3},
    ),
    "deepseek3-yarn": (
        "DeepseekV3",
        {**SHAPE, **LATENT, **UNTIED, "num_key_value_heads": 4, "q_lora_rank": 14,
         "moe_intermediate_size": 20, "first_k_dense_replace": 1, "n_routed_experts": 12,
         "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "n_shared_experts": 2,
         "rope_parameters": {**YARN, "mscale": 0.8, "mscale_all_dim": 1.3}},
    ),
    "mixtral": (
        "Mixtral",
        {**SHAPE, **UNTIED, "intermediate_size": 20, "num_local_experts": 4, "sliding_window": 7},
    ),
    "gpt-oss": (
        "GptOss",
        {**SHAPE, **UNTIED, "head_dim": 10, "intermediate_size": 20, "num_local_experts": 6,
         "num_experts_per_tok": 3, "sliding_window": 7, "swiglu_limit": 0.4,
         "rope_parameters": {**YARN, "truncate": False}},
    ),
    "olmo2": ("Olmo2", {**SHAPE, **UNTIED, "pad_token_id": None}),
    "olmo3-yarn": (
        "Olmo3",
        {
            **SHAPE, **UNTIED, "pad_token_id": None, "sliding_window": 7,
            "rope_parameters": {
                "full_attention": {**YARN, "attention_factor": 1.2},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
    "gemma3": (
        "Gemma3Text",
        {
            **SHAPE, "head_dim": 16, "sliding_window": 7, "query_pre_attn_scalar": 20,
            "num_hidden_layers": 4, "sliding_window_pattern": 2, "pad_token_id": None,
            "rope_parameters": {
                "full_attention": {**LINEAR, "rope_theta": 50000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
    "gemma2": (
        "Gemma2",
        {
            **SHAPE, "head_dim": 16, "sliding_window": 7, "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
            # transformers gives the padding token no gradient as an input.
            "pad_token_id": None,
        },
    ),
}  # fmt: skip
TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2": (2, TP2),
    "tp2-sequence-parallel": (2, {**TP2, "sequence_parallel": True}),
    "pp2": (2, PP2),
    "vpp": (2, {**PP2, "num_layers_per_virtual_pipeline_stage": 1}),
    "cp2": (2, {"context_parallel_size": 2}),
    "recompute": (1, {"recompute_granularity": "full"}),
    "tp2-pp2": (4, {**TP2, **PP2}),
    "ep2": (2, EP2),
    "ep2-tp2": (4, {**EP2, **TP2, "sequence_parallel": True}),
}
OF_EXPERTS = ("one", "pp2", "ep2", "ep2-tp2")
WITH_EXPERTS = (
    "qwen3-moe",
    "qwen3-moe-all-scores",
    "glm4-moe",
    "mixtral",
    "gpt-oss",
    "deepseek2-groups",
    "deepseek3-yarn",
)
# Its experts' biases are no part of an expert that ranks share.
WITH = {("gpt-oss", "ep2-tp2"): {"expert_tensor_parallel_size": 1}}
NOT_DIVISIBLE_BY_2 = ("llama-9-heads-3-groups", "llama-mqa-linear-rope")
# One of each way to know positions and to mask: learned, part of a head turned, windows, caps.
UNDER_CP = (
    "gpt2",
    "gpt-neox",
    "llama-mqa-linear-rope",
    "qwen2-window",
    "gemma2",
    "olmo3-yarn",
    "smollm3-yarn",
)
# Positions are what can differ between these, and the whole sequence's length.
OF_STRETCHED = ("one", "tp2-sequence-parallel", "cp2", "recompute")
STRETCHED = ("llama-longrope", "qwen2-yarn")


def cases(ranks: int | None = None) -> list[tuple[str, str]]:
    return [
        (model, layout)
        for layout, (world_size, _) in LAYOUTS.items()
        for model in MODELS
        if ranks in (None, world_size)
        and (layout in OF_EXPERTS if model in WITH_EXPERTS else "ep2" not in layout)
        and not (model in NOT_DIVISIBLE_BY_2 and "tp2" in layout)
        and (layout in OF_STRETCHED if model in STRETCHED else layout != "recompute")
        and (model in UNDER_CP + STRETCHED or layout != "cp2")
    ]


def as_in_files(name: str, tensor: torch.Tensor, prefix: str) -> dict[str, torch.Tensor]:
    """What a tensor of transformers' module is in its files: another name, a matrix an expert."""
    if prefix == "GPTNeoX":
        name = name.replace("lm_head.", "embed_out.")
    gate, up, down = "gate_proj", "up_proj", "down_proj"
    if prefix == "Mixtral":
        name, (gate, up, down) = name.replace(".mlp.", ".block_sparse_moe."), ("w1", "w3", "w2")
    if prefix == "GptOss" and ".experts." in name:
        return {f"{name}[{expert}]": part for expert, part in enumerate(tensor)}
    block, _, last = name.rpartition(".")
    names = {"gate_up_proj": (gate, up), "down_proj": (down,)}.get(last)
    if names is None:
        return {name: tensor}
    return {
        f"{block}.{expert}.{each}.weight": part
        for expert, matrix in enumerate(tensor)
        for each, part in zip(names, matrix.chunk(len(names)), strict=True)
    }


def write_reference(folder: Path, name: str) -> None:
    """A random model in Hugging Face's format, and what transformers computes with it."""
    import transformers

    prefix, options = MODELS[name]
    torch.manual_seed(3)
    config = getattr(transformers, f"{prefix}Config")(
        **options, attn_implementation="eager", initializer_range=0.2,
        attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0,
    )  # fmt: skip
    suffix = "LMHeadModel" if prefix == "GPT2" else "ForCausalLM"
    model = getattr(transformers, prefix.removesuffix("Text") + suffix)(config)
    with torch.no_grad():  # norms and biases away from one and zero
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
        for key, buffer in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.2)
    model.save_pretrained(folder / name)
    tokens = torch.randint(config.vocab_size, (BATCH, LENGTH + 1))
    logits = model(tokens[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    gradients = {
        key: part
        for n, p in model.named_parameters() for key, part in as_in_files(n, p.grad, prefix).items()
    }  # fmt: skip
    content = {"tokens": tokens, "logits": logits.detach(), "gradients": gradients}
    torch.save({**content, "loss": loss.item()}, folder / f"{name}.pt")


def on_ranks(folder_name: str, cases: list[tuple[str, str]]) -> None:
    from megatron_scalebio import runtime
    from megatron_scalebio.config_loader import load_config

    for name, layout in cases:
        folder = Path(folder_name)
        settings = {
            "model": {"hf": str(folder / name), "make_vocab_size_divisible_by": 8},
            "data": {"seq_length": LENGTH},
            "parallel": {**LAYOUTS[layout][1], **WITH.get((name, layout), {})},
        }
        config = load_config(None, settings)
        runtime.start(config)
        run_model(config, folder, name, layout)
        next_layout()


def run_model(config, folder: Path, name: str, layout: str) -> None:
    """Logits without labels, then loss and gradients, through Megatron's schedule and DDP."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_scalebio import runtime
    from megatron_scalebio.checkpoint import saver
    from megatron_scalebio.data.batch import context_positions
    from megatron_scalebio.model.provider import build_model
    from megatron_scalebio.model.settings import transformer_config

    megatron = transformer_config(config)
    chunks = build_model(config, megatron, config.model.vocab_size)
    saver.load_pretrained(chunks, folder / f"{name}-megatron")
    megatron.finalize_model_grads_func = finalize_model_grads
    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    ddp = [DistributedDataParallel(megatron, settings, chunk) for chunk in chunks]
    tokens = torch.load(folder / f"{name}.pt", weights_only=True)["tokens"].to(runtime.device())
    held = torch.from_numpy(context_positions(LENGTH, runtime.cp_rank(), runtime.cp_size()))
    positions = held.to(runtime.device()).expand(BATCH, -1)
    passes = 2  # the interleaved schedule needs as many as there are stages

    def run(labels, use_output, forward_only):
        def forward_step(data, model):
            return model(tokens[:, held], positions, None, labels=labels), use_output

        return get_forward_backward_func()(
            forward_step_func=forward_step, data_iterator=[iter([])] * len(ddp), model=ddp,
            num_microbatches=passes, seq_length=LENGTH, micro_batch_size=BATCH,
            forward_only=forward_only,
        )  # fmt: skip

    def mean(loss_BS):
        loss = loss_BS.sum() / (BATCH * LENGTH * passes * runtime.dp_size())
        part = loss.item() * passes * runtime.dp_size()
        return loss, torch.tensor(0, dtype=torch.int), {"loss": part}

    def keep(logits_BSV):
        return (
            logits_BSV.sum(),
            torch.tensor(0, dtype=torch.int),
            {"logits": logits_BSV.detach().float()},
        )

    outputs = run(None, keep, forward_only=True)
    losses = run(tokens[:, held + 1], mean, forward_only=False)
    content = {
        "gradients": global_tensors(chunks, lambda p: p.main_grad.cpu().clone()),
        "logits": outputs[0]["logits"].cpu() if outputs else None,
        "held": held,
        "replica": runtime.dp_rank(),
        "loss": losses[0]["loss"] if losses else None,
    }
    rank = torch.distributed.get_rank()
    torch.save(content, folder / f"{name}-{layout}-{rank}.pt")


def write_references(folder: Path) -> Path:
    """Every model as transformers has it, and imported."""
    from megatron_scalebio.convert.importer import import_checkpoint

    for name in MODELS:
        write_reference(folder, name)
        import_checkpoint(folder / name, folder / f"{name}-megatron")
    return folder


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_references(tmp_path_factory.mktemp("parity"))
    for ranks in (1, 2, 4):
        run_distributed(on_ranks, ranks, str(folder), cases(ranks))
    return folder


@pytest.mark.parametrize(("name", "layout"), cases())
def test_equals_transformers(results: Path, name: str, layout: str) -> None:
    compare(results, name, layout)


def compare(results: Path, name: str, layout: str) -> None:
    """What the ranks left of a case with what transformers computed."""
    found = differences(results, name, layout)
    assert found["logits"] <= 1e-4
    assert found["loss"] <= 1e-5
    assert max(found["gradients"].values()) <= 1e-4, found["gradients"]


def differences(results: Path, name: str, layout: str) -> dict[str, Any]:
    """Largest difference of logits, that of losses, and of each tensor's gradient the relative."""
    from megatron_scalebio.config_loader import load_config
    from megatron_scalebio.convert.table import Table
    from megatron_scalebio.families import read_family

    want = torch.load(results / f"{name}.pt", weights_only=True)
    paths = sorted(results.glob(f"{name}-{layout}-[0-9].pt"))
    parts = [torch.load(path, weights_only=True) for path in paths]
    vocab = want["logits"].shape[-1]
    # Data-parallel ranks, which experts are shared by, have the same logits.
    last = [p for p in parts if p["logits"] is not None and p["replica"] == 0]
    if layout == "cp2":
        logits = torch.zeros(BATCH, LENGTH, last[0]["logits"].shape[-1])
        for part in last:
            logits[:, part["held"]] = part["logits"]
        loss = sum(part["loss"] for part in last)
    else:
        logits, loss = torch.cat([p["logits"] for p in last], dim=-1), last[0]["loss"]
    gradients = merged(parts, "gradients")
    family, _ = read_family(results / name)
    model = load_config(None, {"model": {"hf": str(results / name)}}).model
    of_tensors: dict[str, float] = {}
    for whole in Table(family, model).wholes:
        if whole.map.megatron.endswith("expert_bias"):
            continue  # no parameter: logits tell whether it is right
        got = gradients[whole.key][whole.place_in(whole.key)[0]]
        for key, part in whole.to_hf(got[:vocab] if whole.map.vocab else got).items():
            of_tensors[key] = float(relative(part, want["gradients"][key]))
    assert set(of_tensors) == set(want["gradients"]), "every tensor has its gradient compared"
    return {
        "logits": (logits[..., :vocab] - want["logits"]).abs().max().item(),
        "loss": abs(loss - want["loss"]),
        "gradients": of_tensors,
    }
