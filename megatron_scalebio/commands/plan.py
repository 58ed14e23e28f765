"""The subcommand `plan`: will it fit, how long does a step take, which layout is best.

Runs on any machine, without a GPU and without the data: tensors have shapes only.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from megatron_scalebio import config_loader
from megatron_scalebio.compat import light_imports
from megatron_scalebio.config import Config
from megatron_scalebio.config.checks import require_at_least
from megatron_scalebio.config.data import SourceConfig, ValidationConfig
from megatron_scalebio.errors import EXIT_OK, UserError, disk_errors_named

NARROWEST = 80
USUAL = (
    "--config", "--gpus", "--gpu", "--search", "--dry-run", "--seq-length", "--micro-batch-size",
    "--lisa-layers", "--bf16", "--json",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `plan`, and every option of a run, which go over the file's."""
    group = parser.add_argument_group("plan")
    group.add_argument(
        "--gpus", type=int, metavar="N", help="devices of the whole run [TP x CP x PP]"
    )
    group.add_argument("--gpu", default="h100-80g", metavar="KIND",
        help="h100-80g, h200, b200, a100-80g, a100-40g or cpu [h100-80g]")  # fmt: skip
    group.add_argument("--mfu", type=float, default=0.4, metavar="X",
        help="share of peak FLOP/s that a micro-batch's arithmetic reaches [0.4]")  # fmt: skip
    group.add_argument("--json", metavar="FILE", help="write the plan, in bytes and seconds")
    group.add_argument("--dry-run", action="store_true",
        help="build every rank; check layers, shards, LISA draws, messages")  # fmt: skip
    group.add_argument("--search", action="store_true",
        help="propose the best layout, and the fewest GPUs that hold the model")  # fmt: skip
    config_loader.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Prints the plan; exit code 0 whether or not it fits.

    Raises:
        UserError: for a configuration, a layout or a file that cannot be.
    """
    require_at_least("--gpus", args.gpus, 1)
    if not 0 < args.mfu <= 1:
        raise UserError(f"--mfu: {args.mfu:g} is outside (0, 1] (try 0.4)")
    config = config_loader.config_from_args(args)
    if config.baseline.method != "scalebio":
        raise UserError(
            f"baseline.method: {config.baseline.method!r} can't be planned, only scalebio (drop it)"
        )
    if args.json and not Path(args.json).parent.is_dir():
        raise UserError(f"--json: {args.json}: no such folder (make it first)")
    _name_data(config)
    if config.model.vocab_size is None:
        raise UserError(
            "model.vocab_size: is not set (a plan does not open the data: set it to the "
            "tokenizer's)"
        )
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a plan computes nothing: not on a GPU either
    console = Console(width=max(NARROWEST, Console().width), highlight=False)
    content = _search(args, config, console) if args.search else _plan(args, config, console)
    if args.json:
        with disk_errors_named(Path(args.json)):
            Path(args.json).write_text(json.dumps(content, indent=2) + "\n")
    return EXIT_OK


def _name_data(config: Config) -> None:
    """A plan opens no data: where none is named, any will do."""
    if not config.data.sources:
        config.data.sources = [SourceConfig(name, name) for name in ("one", "another")]
    if not config.data.validation:
        config.data.validation = [ValidationConfig("goal", "goal")]


def _plan(args: argparse.Namespace, config: Config, console: Console) -> dict[str, Any]:
    with light_imports():
        from megatron_scalebio.plan import checks, table
        from megatron_scalebio.plan.hardware import gpu_named
        from megatron_scalebio.plan.layout import Layout
        from megatron_scalebio.plan.planner import make_plan

    gpu, gpus = gpu_named(args.gpu), args.gpus or config.parallel.model_parallel_size
    gpu.require_recipe(config)
    layout = Layout.of(config, gpus, gpu)
    with console.status("rehearsing a step") as status:
        plan = make_plan(
            config, layout, args.mfu,
            lambda stage: status.update(f"rehearsing stage {stage + 1} of {layout.pp}"),
        )  # fmt: skip
    table.show(console, plan)
    content = plan.as_json()
    if args.dry_run:
        with console.status("building every rank"):
            ranks = checks.build_ranks(config, layout)
            found = checks.problems(config, plan, ranks)
        if found:
            raise UserError(f"dry run: {'; '.join(found)}")
        console.print(
            f"dry run: built {len(ranks)} of {gpus} ranks (replicas are alike): layers, shards, "
            "LISA draws and messages agree"
        )
        content["dry_run"] = {"ranks": len(ranks), "problems": found}
    return content


def _search(args: argparse.Namespace, config: Config, console: Console) -> dict[str, Any]:
    with light_imports():
        from megatron_scalebio.plan import search, table
        from megatron_scalebio.plan.hardware import gpu_named

    gpu = gpu_named(args.gpu)
    gpu.require_recipe(config)
    gpus = args.gpus or gpu.node_gpus
    with console.status("searching") as status:
        found = search.search(
            config, gpus, gpu, args.mfu, lambda layout: status.update(f"rehearsing {layout}")
        )
    best = found.best
    console.print(
        "Layouts, estimated: those that fit, fastest first (within 5 %: simplest first)"
        if best
        else "Layouts, estimated: none fits, smallest first"
    )
    console.print(search.ranking(found))
    if best is None:
        raise UserError(
            f"no layout of {gpus} x {gpu.name} holds the model"
            + (f"; {found.fewest} hold it" if found.fewest else ""),
            where="--search", fix="more GPUs, fewer lisa_layers or a shorter seq_length",
        )  # fmt: skip
    table.show(console, best)
    lisa = found.best_config.lisa.lisa_layers
    if lisa != config.lisa.lisa_layers:
        console.print(
            f"no layout trains all layers at once: proposed with lisa_layers {lisa}, which is "
            "another training, not only another layout"
        )
    console.print(f"fewest {gpu.name} that hold it: {found.fewest}")
    console.print("these sections, whole, take the place of the file's:\n")
    sections = search.sections(found.best_config)
    console.print(yaml.safe_dump(sections, sort_keys=False))
    return {**best.as_json(), "fewest_gpus": found.fewest, "sections": sections}
