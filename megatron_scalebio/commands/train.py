"""The `train` command: refuses a wrong configuration before it loads Megatron, for seconds."""

import argparse

from megatron_scalebio import launcher
from megatron_scalebio.commands.early import refuse_missing_start, refuse_wrong_paths
from megatron_scalebio.compat import light_imports
from megatron_scalebio.config_loader import add_arguments, config_from_args

__all__ = ["USUAL", "add_arguments", "run"]

USUAL = (
    "--config", "--sources", "--validation", "--test", "--hf", "--seq-length", "--output",
    "--train-iters", "--lr", "--bf16",
)  # fmt: skip


def run(args: argparse.Namespace) -> int:
    config = config_from_args(args, refuse_wrong_paths)
    config.validate_training(launcher.world_size_from_environment())
    refuse_missing_start(config)
    with light_imports():
        from megatron_scalebio.methods import finetune

    return finetune.train(config)
