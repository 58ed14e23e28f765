"""Three parts of gpu_check: other commands and options, model families, two ranks on one card."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from gpu_tools import ROOT, run

sys.path.insert(0, str(ROOT))

from tests.commands import metrics, write_config
from tests.markov import write_problem

EXPERTS = ["--num-experts", "4", "--moe-ffn-hidden-size", "64", "--moe-aux-loss-coeff", "0.01"]
SHARDED = ["--use-distributed-optimizer", "--overlap-grad-reduce"]
# name: (command, flags), on layers of each kind. A run of each is compared with the CPU's.
RUNS: dict[str, tuple[str, list[str]]] = {
    "packing": ("reweight", ["--packing"]),
    "packing-lisa": ("reweight", ["--packing", "--lisa-layers", "1", "--lisa-interval", "5"]),
    "experts": ("reweight", EXPERTS),
    "experts-lisa": ("reweight", [*EXPERTS, "--lisa-layers", "1", "--lisa-interval", "5"]),
    "routing-replay": ("reweight", [*EXPERTS, "--moe-enable-routing-replay"]),
    "group-sources": ("reweight", ["--group-sources", "2"]),
    "sharded": ("reweight", SHARDED),
    "async-save": ("reweight", ["--async-save"]),
    "train": ("train", []),
    "train-packing": ("train", ["--packing"]),
    **{
        name: ("reweight", ["--method", name]) for name in ("doge", "fastmix", "doremi", "rho_loss")
    },
}
KINDS = {"local": ["--transformer-impl", "local"], "te": [], "te-bf16": ["--bf16"]}
FAMILY_KINDS = {"local": ("local", False), "te": ("auto", False), "te-bf16": ("auto", True)}
# Megatron's groups have the backend that is asked for here; NCCL wants a card for each rank. Of
# tensors on a card gloo can't reduce several at a time, nor send one to a pipeline's next stage.
ON_ONE_CARD = """
import contextlib
import sys
import torch.distributed as dist
from megatron.core.distributed import param_and_grad_buffer
joined = dist.init_process_group
dist.init_process_group = lambda backend, **more: joined(backend.replace("nccl", "gloo"), **more)
param_and_grad_buffer._coalescing_manager = lambda group, async_ops: contextlib.nullcontext()
if __name__ == "__main__":  # the processes that write checkpoints import this file
    from megatron_scalebio.cli import main
    sys.exit(main(sys.argv[1:]))
"""
LAYOUTS = {
    "dp2": [], "dp2-lisa": ["--lisa-layers", "1", "--lisa-interval", "5"],
    "tp2": ["--tensor-model-parallel-size", "2"],
}  # fmt: skip


def runs(check: Any) -> None:
    """Ten steps of each on the CPU in fp32, and on the GPU on layers of each kind."""
    _write(check.folder)
    kinds = {"local": KINDS["local"]} if check.rehearse else KINDS
    cpu: dict[str, Any] = {}

    def one(name: str) -> dict[str, float]:
        run_name, kind = name.rsplit(":", 1)
        if kind == "cpu":
            cpu[run_name] = numbers(check.folder, *RUNS[run_name], f"{run_name}-cpu", False)
            return {}
        flags = [*RUNS[run_name][1], *kinds[kind]]
        folder = name.replace(":", "-")
        return furthest(numbers(check.folder, RUNS[run_name][0], flags, folder), cpu[run_name])

    check.each(one, [f"{name}:cpu" for name in RUNS])
    check.each(one, [f"{name}:{kind}" for kind in kinds for name in RUNS])


def families(check: Any) -> None:
    """Logits and gradients of tiny models against transformers' on the CPU, relative to theirs."""
    import torch

    from megatron_scalebio import runtime
    from megatron_scalebio.config_loader import load_config
    from tests.distributed.harness import next_layout
    from tests.model import test_parity as parity
    from tests.model.parity_models import LENGTH, MODELS

    parity.write_references(check.folder)
    kinds = {"local": FAMILY_KINDS["local"]} if check.rehearse else FAMILY_KINDS
    torch.backends.cuda.matmul.allow_tf32 = False
    for kind, (layers, bf16) in kinds.items():
        for name in MODELS:
            model = {"hf": str(check.folder / name), "make_vocab_size_divisible_by": 8}
            config = load_config(None, {
                "model": {**model, "transformer_impl": layers},
                "data": {"seq_length": LENGTH}, "parallel": {"bf16": bf16},
            })  # fmt: skip
            try:
                runtime.start(config)
                parity.run_model(config, check.folder, name, "one")
                found: Any = parity.differences(check.folder, name, "one")
                found["gradients"] = max(found["gradients"].values())
            except Exception as error:  # noqa: BLE001  the others go on
                found = f"failed: {error!r}"[:600]
            check.results.add(f"{kind}:{name}", found)
            next_layout()


def shared_card(check: Any) -> None:
    """Two ranks on one card, which talk by gloo, against one rank."""
    _write(check.folder)
    words = ["reweight", "--config", str(check.folder / "x.yaml"), "--transformer-impl", "local"]
    script = check.folder / "on_one_card.py"
    script.write_text(ON_ONE_CARD)
    one: dict[str, Any] = {}

    def two(name: str) -> dict[str, float]:
        of = "lisa" if "lisa" in name else "plain"
        if of not in one:
            lisa = LAYOUTS["dp2-lisa"] if of == "lisa" else []
            one[of] = numbers(check.folder, "reweight", [*KINDS["local"], *lisa], f"one-{of}")
        output = check.folder / name
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        run([*launcher, str(script), *words, *LAYOUTS[name], "--output", str(output)])
        return furthest(metrics(output), one[of])

    for name in LAYOUTS:
        check.each(two, [name])


def numbers(
    folder: Path, command: str, flags: list[str], name: str, gpu: bool = True
) -> list[dict[str, Any]]:
    """The steps of a run, and the weights that it ends with."""
    words = ["-m", "megatron_scalebio", command, "--config", str(folder / "x.yaml")]
    hidden = {} if gpu else {"CUDA_VISIBLE_DEVICES": ""}
    run([*words, "--output", str(folder / name), *flags], hidden)
    return metrics(folder / name)


def furthest(got: Any, want: Any) -> dict[str, float]:
    """The largest difference of the numbers of each field, relative where they are above 1."""
    found: dict[str, float] = {}

    def look(field: str, a: Any, b: Any) -> None:
        if isinstance(b, dict):
            for key in b:
                look(str(key), a[key], b[key])
        elif isinstance(b, list):
            for x, y in zip(a, b, strict=True):
                look(field, x, y)
        elif isinstance(b, float):
            found[field] = max(found.get(field, 0.0), abs(a - b) / max(1.0, abs(b)))

    look("", got, want)
    return {key: value for key, value in found.items() if value > 0}


def _write(folder: Path) -> None:
    """Examples of uneven length, a part of whose tokens are targets."""
    problem = write_problem(
        folder / "data", [0.5, 0.3, 0.2], 0, length=33, examples=200, validation=200, even=False
    )
    write_config(
        folder / "x.yaml", *problem,
        data={"seq_length": 32},
        model={"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4,
               "ffn_hidden_size": 128, "make_vocab_size_divisible_by": 32},
        # Equal counts: those that follow the weights would turn a last bit into other examples.
        bilevel={"floor_share": 1.0},
        optimizer={"lr": 1e-3}, checkpoint={"save_interval": 6},
        train={"train_iters": 10, "micro_batch_size": 4, "global_batch_size": 16},
    )  # fmt: skip
