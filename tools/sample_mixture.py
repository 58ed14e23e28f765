#!/usr/bin/env python3
"""Draws a training sample in learned proportions: ``megatron-scalebio sample`` as a script."""

from __future__ import annotations

import argparse
import sys

from megatron_scalebio.commands import sample as command
from megatron_scalebio.errors import EXIT_USER_ERROR, UserError


def main(arguments: list[str] | None = None) -> int:
    """Runs the tool; returns an exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    command.add_arguments(parser)
    args = parser.parse_args(arguments)
    try:
        return command.run(args)
    except UserError as error:
        print(f"sample_mixture: {error}", file=sys.stderr)
        return EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
