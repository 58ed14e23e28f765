"""Do Megatron-LM and Megatron-Bridge read a run's checkpoint, into the same model?

Takes their sources (a checkout of Megatron-LM at core_v0.16.1, an unpacked wheel of Megatron-Bridge
0.3.1), a run's checkpoints and what `convert export` made of them. Each loads the checkpoint with
the arguments saved in it; logits on random tokens are compared with transformers' on the export.
Both want a GPU: on a CPU, packages that are for GPUs only are stood in for; none of them is called.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.machinery
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import common  # noqa: F401  imports Megatron-Core, which then has decided what there is
import megatron
import torch

from megatron_scalebio import cpu

LENGTH = 64


def megatron_lm(checkout: Path, load: Path, vocab_size: int) -> torch.nn.Module:
    """By `initialize_megatron --use-checkpoint-args` and `load_checkpoint(strict=True)`."""
    stand_in("megatron.core.transformer.custom_layers.batch_invariant_kernels")  # imports triton
    sys.path.insert(0, str(checkout))
    sys.argv = [
        "pretrain_gpt.py", "--use-checkpoint-args", "--load", str(load), "--finetune",
        "--no-use-tokenizer-model-from-checkpoint-args", "--tokenizer-type", "NullTokenizer",
        "--vocab-size", str(vocab_size - 1), "--transformer-impl", "local",
        "--distributed-backend", "gloo", "--use-cpu-initialization", "--micro-batch-size", "1",
        "--no-persist-layer-norm", "--no-masked-softmax-fusion", "--no-bias-dropout-fusion",
        "--no-gradient-accumulation-fusion", "--no-rope-fusion", "--attention-backend", "unfused",
    ]  # fmt: skip
    torch.cuda.device_count = lambda: 1
    from megatron.training import get_args, initialize

    initialize._compile_dependencies = lambda: None
    initialize.initialize_megatron(allow_no_cuda=True)
    from gpt_builders import gpt_builder
    from megatron.training.checkpointing import load_checkpoint

    model = gpt_builder(get_args(), True, True)
    load_checkpoint([model], None, None, strict=True)
    return model


def megatron_bridge(unpacked: Path, load: Path) -> torch.nn.Module:
    """By `load_megatron_model`, as a checkpoint of Megatron-LM."""
    # Its package imports every model it knows; the loader is wanted alone.
    package: Any = types.ModuleType("megatron.bridge")
    package.__path__ = [str(unpacked / "megatron" / "bridge")]
    sys.modules["megatron.bridge"] = package
    loader = import_with_stand_ins("megatron.bridge.training.model_load_save")
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    newest = max(load.glob("iter_*"))
    model = loader.load_megatron_model(str(newest), model_type="gpt", use_cpu_init=True)
    whole = model[0] if isinstance(model, list) else model
    return getattr(whole, "module", whole)


def stand_in(name: str) -> None:
    module = MagicMock()
    module.__path__, module.__name__ = [], name
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    sys.modules[name] = module


def import_with_stand_ins(name: str) -> Any:
    while True:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            assert error.name
            print(f"stood in for: {error.name}")
            stand_in(error.name)
            for key in [key for key in sys.modules if key.startswith("megatron.bridge.")]:
                del sys.modules[key]


def compare(reader: str, model: torch.nn.Module, hf: Path) -> None:
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32).eval()
    size = reference.config.vocab_size
    tokens = torch.randint(size, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.triu(torch.ones(LENGTH, LENGTH, dtype=torch.bool), 1)[None, None]
    with torch.no_grad():
        ours = model.eval()(tokens, torch.arange(LENGTH)[None], mask)[..., :size].float()
        theirs = reference(tokens).logits
    off = (ours - theirs).abs().max().item()
    print(f"{reader}: logits differ by at most {off:.1e} of {theirs.abs().max().item():.1f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megatron-lm", type=Path, help="checkout of Megatron-LM")
    parser.add_argument("--bridge", type=Path, help="unpacked wheel of Megatron-Bridge")
    parser.add_argument("--load", type=Path, required=True, help="checkpoints/ of a run")
    parser.add_argument("--hf", type=Path, required=True, help="its export")
    args = parser.parse_args()
    if args.megatron_lm and args.bridge:  # each wants a process of its own
        start = [sys.executable, __file__, "--load", str(args.load), "--hf", str(args.hf)]
        for reader in (["--megatron-lm", args.megatron_lm], ["--bridge", args.bridge]):
            subprocess.run([*start, *map(str, reader)], check=True)
        return 0
    os.environ.update(
        RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29411",
        CUDA_DEVICE_MAX_CONNECTIONS="1",
    )  # fmt: skip
    if not torch.cuda.is_available():
        cpu.adapt()
    checkout = args.megatron_lm or args.bridge
    megatron.__path__ = [*megatron.__path__, str(checkout / "megatron")]
    if args.megatron_lm:
        size = json.loads((args.hf / "config.json").read_text())["vocab_size"]
        compare("Megatron-LM", megatron_lm(checkout, args.load, size), args.hf)
    else:
        compare("Megatron-Bridge", megatron_bridge(checkout, args.load), args.hf)
    return 0


if __name__ == "__main__":
    sys.exit(main())
