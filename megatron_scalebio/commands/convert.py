"""The subcommand ``convert``: arguments, progress and the closing line.

convert import --hf DIR --save CKPT                          Hugging Face → Megatron
convert export --load CKPT --hf-reference DIR --save DIR     Megatron → Hugging Face
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from megatron_scalebio import launcher
from megatron_scalebio.checkpoint.folder import find_checkpoint
from megatron_scalebio.compat import light_imports
from megatron_scalebio.config.checks import require_at_least
from megatron_scalebio.convert.carry import has_tokenizer, is_packed
from megatron_scalebio.convert.output import refuse_existing
from megatron_scalebio.errors import EXIT_OK, EXIT_SIGNALLED, UserError, sigterm_interrupts
from megatron_scalebio.families import read_family

_LINE_EVERY_S = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds ``import`` and ``export`` with their options."""
    directions = parser.add_subparsers(dest="direction", required=True, metavar="DIRECTION")
    add = directions.add_parser(
        "import", help="Hugging Face to Megatron", allow_abbrev=False
    ).add_argument
    add("--hf", required=True, metavar="DIR", help="Hugging Face folder (safetensors or .bin), or "
        "a GGUF file, which is loaded into memory as a whole")  # fmt: skip
    add("--save", required=True, metavar="CKPT", help="new folder for the checkpoint")
    add("--make-vocab-size-divisible-by", type=int, default=128, metavar="N",
        help="pad the vocabulary to a multiple of this, times the TP size")  # fmt: skip
    add("--tensor-model-parallel-size", type=int, default=1, metavar="N",
        help="TP size to pad the vocabulary for; nothing else depends on it")  # fmt: skip
    add("--verify", action="store_true", help="compare the models' outputs layer by layer")
    add = directions.add_parser(
        "export", help="Megatron to Hugging Face", allow_abbrev=False
    ).add_argument
    add("--load", required=True, metavar="CKPT",
        help="checkpoint folder, or a run's `checkpoints`")  # fmt: skip
    add("--hf-reference", required=True, metavar="DIR", help="Hugging Face folder of the model: "
        "its config, tokenizer and division into files are kept")  # fmt: skip
    add("--save", required=True, metavar="DIR", help="new folder for the Hugging Face model")
    add("--which", choices=("w", "u"), default="w", help="model of a bilevel run")
    add("--dtype", choices=("checkpoint", "float32", "bfloat16"),
        help="data type of the weights [as in the reference]")  # fmt: skip
    add("--verify", action="store_true", help="compare the models' outputs layer by layer")


def run(args: argparse.Namespace) -> int:
    """Converts as the arguments say; returns an exit code.

    Raises:
        UserError: naming the file and the tensor or option at fault.
    """
    is_main = launcher.is_first_rank()
    console = Console(stderr=True, quiet=not is_main, highlight=False, markup=False)
    if args.verify and launcher.world_size_from_environment() > 1:
        raise UserError("--verify: runs in one process (start it without a launcher)")
    _refuse_wrong_paths(args)
    begin = time.monotonic()
    try:
        with sigterm_interrupts(), _display(console, args.direction) as on_progress:
            _convert(args, on_progress)
    except KeyboardInterrupt:
        console.print("convert: stopped; nothing was written")
        return EXIT_SIGNALLED
    console.print(f"convert: {args.save} in {time.monotonic() - begin:.0f} s")
    source = Path(args.hf if args.direction == "import" else args.hf_reference)
    if is_packed(source):
        console.print(f"convert: {source} has MXFP4 weights; those of {args.save} are bfloat16")
    if args.direction == "export" and not has_tokenizer(Path(args.save)):
        console.print(
            f"convert: warning: {args.hf_reference} holds no tokenizer, so {args.save} has none: "
            "add its files to use the model"
        )
    if args.verify:
        _verify(args, console)
    return EXIT_OK


@launcher.refuses_early
def _refuse_wrong_paths(args: argparse.Namespace) -> None:
    refuse_existing(Path(args.save))
    if args.direction == "export":
        find_checkpoint(Path(args.load))
    read_family(args.hf if args.direction == "import" else args.hf_reference)


def _convert(args: argparse.Namespace, on_progress: Callable[[int, int], None]) -> None:
    if args.direction == "import":
        with light_imports():
            from megatron_scalebio.convert.importer import import_checkpoint

        for name in ("make_vocab_size_divisible_by", "tensor_model_parallel_size"):
            require_at_least("--" + name.replace("_", "-"), getattr(args, name), 1)
        import_checkpoint(
            Path(args.hf),
            Path(args.save),
            make_vocab_size_divisible_by=args.make_vocab_size_divisible_by,
            tensor_model_parallel_size=args.tensor_model_parallel_size,
            on_progress=on_progress,
        )
    else:
        with light_imports():
            from megatron_scalebio.convert.exporter import export_checkpoint

        export_checkpoint(
            Path(args.load),
            Path(args.hf_reference),
            Path(args.save),
            which=args.which,
            dtype=args.dtype,
            on_progress=on_progress,
        )


def _verify(args: argparse.Namespace, console: Console) -> None:
    with light_imports():
        from megatron_scalebio.convert.verify import verify

    is_import = args.direction == "import"
    hf, load = (args.hf, args.save) if is_import else (args.save, args.load)
    steps = verify(Path(hf), Path(load), "w" if is_import else args.which)
    for step in steps:
        console.print(f"  {step.name:<12} differs by {step.difference:.1e}")
    console.print("convert: verified, no layer departs from transformers")


@contextmanager
def _display(console: Console, direction: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal; in logs, a line at most every few seconds."""
    if not console.is_terminal:
        shown = [time.monotonic()]

        def line(done: int, total: int) -> None:
            if time.monotonic() - shown[0] > _LINE_EVERY_S:
                shown[0] = time.monotonic()
                console.print(f"convert: {direction} {100 * done / total:.0f} %")

        yield line
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True),
        TransferSpeedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(direction, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
