"""The `megatron-scalebio` command: a subcommand a stage; one line and exit code 2 for mistakes."""

from __future__ import annotations

import argparse
import difflib
import importlib
import logging
import os
import re
import select
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from megatron_scalebio import __version__, launcher
from megatron_scalebio.errors import EXIT_OK, EXIT_USER_ERROR, RankLost, UserError

EXIT_UNREAD = 1  # rich's, where it prints
# Imported when used: `report` must not wait for Megatron.
COMMANDS = {
    "init": ("megatron_scalebio.commands.init", "write a commented run.yaml for a folder of data"),
    "prepare": ("megatron_scalebio.commands.prepare", "tokenize records into sources"),
    "show": (
        "megatron_scalebio.commands.show",
        "print prepared examples and mark the tokens that train",
    ),
    "convert": (
        "megatron_scalebio.commands.convert",
        "convert checkpoints between Hugging Face and Megatron",
    ),
    "reweight": ("megatron_scalebio.commands.reweight", "learn the mixture"),
    "sample": ("megatron_scalebio.commands.sample", "draw a training set in learned proportions"),
    "train": ("megatron_scalebio.commands.train", "train on a sample or a weighted mixture"),
    "evaluate": ("megatron_scalebio.commands.evaluate", "held-out losses, benchmarks, MT-Bench"),
    "compare": ("megatron_scalebio.commands.compare", "methods of choosing data side by side"),
    "plan": ("megatron_scalebio.commands.plan", "what a run takes: memory, time, layout"),
    "status": ("megatron_scalebio.commands.status", "how far a run is, and how to continue it"),
    "report": ("megatron_scalebio.report.html", "write the HTML report of a run"),
    "completion": ("megatron_scalebio.commands.completion", "print a shell's completion script"),
}
WELCOME = f"""\
megatron-scalebio {__version__}: the shares in which to train a language model on your data

  megatron-scalebio init DATA --hf MODEL   a folder of data (one file per source, and one named
                                           like goal.jsonl) and a Hugging Face folder: writes
                                           run.yaml, and prints the commands that follow
  megatron-scalebio reweight --config run.yaml
  megatron-scalebio status RUN             how far it is
  megatron-scalebio --help                 every command

An example without data of your own: make demo, in the checkout.
"""

# Modules of the extra `cli`: the library does without them.
OPTIONAL = {
    "jinja2", "markupsafe", "matplotlib", "pyarrow", "regex", "rich", "safetensors",
    "sentencepiece", "shtab", "tensorboard", "tokenizers", "transformers", "yaml",
}  # fmt: skip


class _Parser(argparse.ArgumentParser):
    """Refuses in one line, where argparse would print the usage of a hundred flags first.

    `usual` are the flags that --help shows, with --help-all for the rest; empty: --help shows all.
    """

    usual: Sequence[str] = ()

    def error(self, message: str) -> NoReturn:
        choice = re.fullmatch(r"argument (\S+): invalid choice: (.*) \(choose from (.*)\)", message)
        if choice:
            flag, value, known = choice.groups()
            raise UserError(f"{flag}: {value} is not a choice (choose from {known})")
        raise UserError(f"{message} (see {self.prog} --help)")

    def format_help(self) -> str:
        if not self.usual:
            return super().format_help()
        shown = {*self.usual, "--help", "--help-all"}
        rare = [a for a in self._actions if a.option_strings and not shown & {*a.option_strings}]
        texts = [action.help for action in rare]
        for action in rare:
            action.help = argparse.SUPPRESS
        text = super().format_help()
        for action, help_text in zip(rare, texts, strict=True):
            action.help = help_text
        return f"{text}\nand {len(rare)} more options: {self.prog} --help-all\n"


class _HelpAll(argparse.Action):
    def __call__(self, parser: Any, *_: Any) -> None:
        parser.usual = ()
        parser.print_help()
        parser.exit()


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        print(WELCOME, end="")
        return EXIT_OK
    launcher.set_defaults()
    try:
        with _missing_packages_named():
            args = _parse(argv)
            code = args.run_stage(args)
            sys.stdout.flush()
            return code
    except UserError as error:
        if launcher.is_first_rank():
            print(f"megatron-scalebio: error: {error}", file=sys.stderr)
            launcher.tell_torchrun(f"megatron-scalebio: error: {error}")
        launcher.give_way()
        return EXIT_USER_ERROR
    except RankLost:
        sys.stdout.flush()
        launcher.end_lost()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        return EXIT_UNREAD


def _nobody_reads() -> bool:
    """Whether what was reading the output has ended, as `head` does; the rest then goes nowhere."""
    output = select.poll()
    output.register(sys.stdout, 0)
    if not any(event & select.POLLERR for _, event in output.poll(0)):
        return False
    # Or Python would try to write the rest when it ends, and complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="megatron-scalebio",
        description="Learns data mixtures for large-model training by bilevel optimization.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _quieten()
    asked = next((word for word in argv if word in COMMANDS), "")
    if not asked and not argv[0].startswith("-"):
        raise UserError(f"{argv[0]!r} is not a command ({_nearest(argv[0], list(COMMANDS))})")
    parser.set_defaults(parser=parser)
    for name, (module, help_text) in COMMANDS.items():
        sub = commands.add_parser(name, help=help_text, allow_abbrev=False)
        if asked in (name, "completion"):
            stage = importlib.import_module(module)
            stage.add_arguments(sub)
            sub.set_defaults(run_stage=stage.run)
            sub.usual = getattr(stage, "USUAL", ())
            if sub.usual:
                sub.add_argument("--help-all", action=_HelpAll, nargs=0, help="every option")
    known = ["--"]
    if asked:
        known += _flags(commands.choices[asked])
        # Before argparse misses the flag that one of these was meant to be.
        flags = [word for word in argv[argv.index(asked) + 1 :] if word.startswith("--")]
        _refuse([flag for flag in flags if flag.partition("=")[0] not in known], known)
        _refuse_empty(argv[argv.index(asked) :])
    args, unknown = parser.parse_known_args(argv)
    _refuse(unknown, known)
    return args


def _flags(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Those of a command, and of what it does by another word, as `convert import`."""
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action.choices, dict):  # parsers, by the other word
            for each in action.choices.values():
                yield from _flags(each)


def _refuse(unknown: list[str], known: list[str]) -> None:
    if unknown:
        raise UserError(f"unknown argument {unknown[0]!r} ({_nearest(unknown[0], known)})")


def _refuse_empty(words: list[str]) -> None:
    """A shell variable that is not set would have a run write into the folder where it starts."""
    of = words[0]
    for word in words:
        flag, equals, value = word.partition("=")
        if flag.startswith("--"):
            of = flag
        if not word or (flag == of and equals and not value):
            raise UserError(f"{of}: '' is empty (give a value, or leave it out)")


@contextmanager
def _missing_packages_named() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in OPTIONAL:
            raise
        raise UserError(
            f"{error.name} is not installed: it comes with the command line's packages "
            "(pip install 'megatron-scalebio[cli]')"
        ) from None


def _quieten() -> None:
    """Leaves out what Megatron and torch tell their developers, and errors they raise as well."""
    warnings.filterwarnings(
        "ignore", category=UserWarning, module=r"megatron|torch\.distributed\.checkpoint"
    )
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(megatron|torch)\.")
    # Processes that Megatron spawns to write checkpoints import it anew.
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning,ignore::FutureWarning")
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    logging.getLogger("megatron.core.dist_checkpointing").setLevel(logging.CRITICAL)
    # A build of torch with CUDA tells of a machine without a GPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    sys.unraisablehook = _unraisable


def _unraisable(what: sys.UnraisableHookArgs) -> None:
    """torch's checkpoint writers flush a file that is closed when they are collected.

    Python tells of it since 3.13.
    """
    if "NoCloseWriter" not in repr(what.object):
        sys.__unraisablehook__(what)


# What others call ours.
_ELSEWHERE = {
    "--learning-rate": "--lr", "--model": "--hf", "--model-path": "--hf",
    "--max-steps": "--train-iters", "--num-steps": "--train-iters",
    "--batch-size": "--global-batch-size", "--max-length": "--seq-length",
}  # fmt: skip


def _nearest(flag: str, known: list[str]) -> str:
    if (ours := _ELSEWHERE.get(flag.partition("=")[0])) in known:
        return f"did you mean {ours}?"
    if flag.endswith((".yaml", ".yml")) and "--config" in known:
        return f"did you mean --config {flag}?"
    if flag[:1] != "-" and "--input" in known:
        return f"did you mean --input {flag}? It is given once for each input"
    near = difflib.get_close_matches(flag.partition("=")[0], known, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else "see --help"
