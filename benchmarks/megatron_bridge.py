"""Does Megatron-Bridge read a run's checkpoint, into the same model?

Takes an unpacked wheel of Megatron-Bridge, a run's checkpoints and what `convert export` made of
them. Bridge loads the checkpoint with the arguments saved in it; logits on random tokens are
compared with transformers' on the export. It wants a GPU: on a CPU, packages that are for GPUs only
are stood in for; none of them is called.

Last run with Megatron-Bridge 0.6.2 on Megatron-Core 0.19.2. That Megatron-LM reads a checkpoint is
`tests/checkpoint/test_megatron_lm.py`.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.machinery
import os
import sys
import types
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import common  # noqa: F401  imports Megatron-Core, which then has decided what there is
import megatron
import torch

from megatron_scalebio.compat import cpu

LENGTH = 64


def found_beside_core(unpacked: Path) -> None:
    """Has `megatron.bridge` found in an unpacked wheel, without all that its `__init__` imports."""
    megatron.__path__ = [*megatron.__path__, str(unpacked / "megatron")]
    package: Any = types.ModuleType("megatron.bridge")
    package.__path__ = [str(unpacked / "megatron" / "bridge")]
    sys.modules["megatron.bridge"] = package


def megatron_bridge(unpacked: Path, load: Path) -> torch.nn.Module:
    """By `load_megatron_model`, as a checkpoint of Megatron-LM."""
    found_beside_core(unpacked)
    import_with_stand_ins("megatron.bridge.training.post_training.checkpointing")
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
        except ImportError as error:
            missing = error.__cause__ if isinstance(error.__cause__, ImportError) else error
            assert missing.name
            print(f"stood in for: {missing.name}")
            stand_in(missing.name)
            for key in [key for key in sys.modules if key.startswith("megatron.bridge.")]:
                del sys.modules[key]


def compare(model: torch.nn.Module, hf: Path) -> None:
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32).eval()
    size = reference.config.vocab_size
    tokens = torch.randint(size, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.triu(torch.ones(LENGTH, LENGTH, dtype=torch.bool), 1)[None, None]
    with torch.no_grad():
        ours = model.eval()(tokens, torch.arange(LENGTH)[None], mask)[..., :size].float()
        theirs = reference(tokens).logits
    off = (ours - theirs).abs().max().item()
    print(f"Megatron-Bridge: logits differ by at most {off:.1e} of {theirs.abs().max().item():.1f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bridge", type=Path, required=True, help="unpacked wheel")
    parser.add_argument("--load", type=Path, required=True, help="checkpoints/ of a run")
    parser.add_argument("--hf", type=Path, required=True, help="its export")
    args = parser.parse_args()
    os.environ.update(
        RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29411",
        CUDA_DEVICE_MAX_CONNECTIONS="1",
    )  # fmt: skip
    if not torch.cuda.is_available():
        cpu.adapt()
    compare(megatron_bridge(args.bridge, args.load), args.hf)
    return 0


if __name__ == "__main__":
    sys.exit(main())
