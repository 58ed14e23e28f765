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
from tests.model.parity_models import BATCH, LAYOUTS, LENGTH, MODELS, WITH, cases

pytestmark = pytest.mark.distributed


def as_in_files(name: str, tensor: torch.Tensor, prefix: str) -> dict[str, torch.Tensor]:
    """What a tensor of transformers' module is in its files: another name, a matrix an expert."""
    if prefix == "GPTNeoX":
        name = name.replace("lm_head.", "embed_out.")
    gate, up, down = "gate_proj", "up_proj", "down_proj"
    if prefix == "Mixtral":
        name, (gate, up, down) = name.replace(".mlp.", ".block_sparse_moe."), ("w1", "w3", "w2")
    if prefix.removesuffix("Text") in ("GptOss", "Llama4") and ".experts." in name:
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
    saver.load_pretrained(chunks, folder / f"{name}-megatron", config.model.vocab_size)
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
