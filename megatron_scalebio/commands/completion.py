"""The subcommand ``completion``: a script that lets the shell complete commands and options."""

import argparse

from megatron_scalebio.errors import EXIT_OK

SHELLS = ("bash", "zsh", "tcsh")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``completion``."""
    parser.add_argument("shell", choices=SHELLS)
    parser.epilog = (
        'bash, in ~/.bashrc: eval "$(megatron-scalebio completion bash)"; zsh: megatron-scalebio '
        "completion zsh > ~/.zfunc/_megatron-scalebio"
    )


def run(args: argparse.Namespace) -> int:
    """Prints the script."""
    import shtab

    print(shtab.complete(args.parser, args.shell))
    return EXIT_OK
