"""Flags that bear the names of Megatron-LM's mean what they mean there.

Megatron-LM's parser is the one of the installed `megatron.training`. Every flag of `reweight` that
it knows, too, is tried with words that both take, and read the same. What a checkpoint keeps of
them, it keeps under Megatron's name, with Megatron's value; of model and layout that is all.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator
from typing import Any

import pytest

from tests.distributed.harness import run_distributed

pytestmark = pytest.mark.distributed

# What Megatron's parser does not take after a flag that both have, and why ours does.
OURS_ALONE = {"--transformer-impl": {"auto"}}  # Transformer Engine where CUDA has it, else local
# What a checkpoint does not keep of model and layout: how a run computes and begins.
NOT_KEPT = {
    "--vocab-size",  # kept as padded_vocab_size
    "--init-method-std", "--pretrained-checkpoint", "--sequence-parallel", "--overlap-grad-reduce",
    "--overlap-param-gather", "--recompute-granularity", "--recompute-method",
    "--recompute-num-layers", "--distributed-timeout-minutes",
}  # fmt: skip
# Such that each of the flags alone, after these, makes a valid configuration.
COMPANIONS = [
    "--num-layers", "16", "--hidden-size", "128", "--num-attention-heads", "8",
    "--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "4",
    "--bf16", "--use-distributed-optimizer", "--overlap-grad-reduce",
    "--window-size", "9,0", "--lr", "0.5",
]  # fmt: skip
OF_EXPERTS = [
    "--num-experts", "64", "--sequence-parallel", "--moe-router-num-groups", "4",
    "--moe-router-group-topk", "2", "--moe-router-score-function", "sigmoid",
    "--moe-shared-expert-intermediate-size", "64",
]  # fmt: skip
OF_ONE_EXPERT = ["--moe-router-topk", "1", "--moe-router-group-topk", "1"]
OF_LATENT_ATTENTION = ["--multi-latent-attention", "--qk-layernorm"]
LATENT = {
    "--multi-latent-attention", "--q-lora-rank", "--kv-lora-rank", "--qk-head-dim",
    "--qk-pos-emb-head-dim", "--v-head-dim",
}  # fmt: skip
WORDS = {int: ["2", "4", "64"], float: ["0.25"], str: ["a/folder"]}


def test_shared_flags_read_alike_and_are_kept_under_megatrons_names() -> None:
    run_distributed(compare, 1)


def compare() -> None:
    from megatron_scalebio.compat import cpu

    cpu.adapt()
    from megatron.training.arguments import add_megatron_arguments

    from megatron_scalebio.checkpoint import megatron_args as module
    from megatron_scalebio.cli import COMMANDS

    module.uses_transformer_engine = lambda config: config.model.transformer_impl != "local"
    ours, theirs = (
        argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False) for _ in range(2)
    )
    importlib.import_module(COMMANDS["reweight"][0]).add_arguments(ours)
    add_megatron_arguments(theirs)
    known = theirs._option_string_actions
    shared = [flag for flag in ours._option_string_actions if flag in known]
    # One is refused, the other names a file that has to be there.
    apart = ("-h", "--help", "--fp8-param-gather", "--data-args-path")
    shared = [flag for flag in shared if flag not in apart]
    assert len(shared) > 50
    wrong = [line for flag in shared for line in differences(flag, ours, theirs)]
    assert not wrong, "\n".join(wrong)


def differences(
    flag: str, ours: argparse.ArgumentParser, theirs: argparse.ArgumentParser
) -> Iterator[str]:
    """What is wrong with a flag, a line each."""
    name = ours._option_string_actions[flag].dest
    megatrons = theirs._option_string_actions[flag].dest
    if flag != "--" + name.partition(".")[2].replace("_", "-"):
        yield f"{flag}: sets {name}"
    before = COMPANIONS + (OF_EXPERTS if "-expert" in flag or "--moe" in flag else [])
    before = [*before, *(["--fp8-format", "e4m3"] if flag != "--fp4-format" else [])]
    before += OF_LATENT_ATTENTION if flag in LATENT else []
    before += OF_ONE_EXPERT if flag == "--moe-apply-probs-on-input" else []
    tried = 0
    for words in words_after(ours._option_string_actions[flag]):
        if set(words) & OURS_ALONE.get(flag, set()):
            continue
        read = getattr(ours.parse_args([flag, *words]), name)
        meant = getattr(theirs.parse_args([flag, *words]), megatrons)
        if isinstance(meant, list) and len(meant) == 1:  # as Megatron's own checks make it
            meant = meant[0]
        if not same(read, meant):
            yield f"{flag} {words}: {read!r}, Megatron reads {meant!r}"
        kept = arguments_kept(ours, [*before, flag, *words])
        if kept is None:
            continue
        tried += 1
        shows = megatrons in kept or kept != arguments_kept(ours, before)
        wanted = name.startswith(("model.", "parallel.")) and flag not in NOT_KEPT
        if (shows or wanted) and not same(kept.get(megatrons, "nothing"), meant):
            yield f"{flag} {words}: a checkpoint has {kept.get(megatrons)!r} as {megatrons}"
    if not tried:
        yield f"{flag}: no configuration takes it"


def words_after(action: argparse.Action) -> list[list[str]]:
    """What a flag may be followed by: each of its choices, or a few values of its type."""
    if action.nargs == 0:
        return [[]]
    if action.dest in ("model.moe_layer_freq", "model.no_rope_freq"):
        return [["[" + ",".join("0" + "1" * 15) + "]"]]
    values = action.choices or WORDS.get(action.type, ["7,0"])  # type: ignore[call-overload]
    return [[str(value)] for value in values]


def same(ours: Any, theirs: Any) -> bool:
    return (list(ours) if isinstance(theirs, tuple) and ours is not None else ours) == (
        list(theirs) if isinstance(theirs, tuple) else theirs
    )


def arguments_kept(parser: argparse.ArgumentParser, words: list[str]) -> dict[str, Any] | None:
    """What a checkpoint keeps of a configuration; None if that is refused."""
    from megatron_scalebio.checkpoint.megatron_args import megatron_args
    from megatron_scalebio.config_loader import config_from_args
    from megatron_scalebio.errors import UserError

    try:
        config = config_from_args(parser.parse_args(words))
    except UserError:
        return None
    return vars(megatron_args(config, vocab_size=100))
