#!/usr/bin/env python3
"""Prepares one source with Megatron-LM's ``preprocess_data.py`` flags.

``--output-prefix DIR/NAME`` gives ``DIR/NAME/tokens.bin|.idx`` (a ``--data-path`` prefix for
Megatron-LM) with the loss mask and ``source.json`` beside them. Documents stay whole unless
``--seq-length`` is given. ``megatron-scalebio prepare`` has all the options.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_scalebio.commands.prepare import run_config
from megatron_scalebio.data.inputs import parse_input
from megatron_scalebio.data.load_tokenizer import load_tokenizer
from megatron_scalebio.data.prepare import PrepareConfig
from megatron_scalebio.data.record_fields import ALL_FIELDS
from megatron_scalebio.data.tokenizer import HUGGING_FACE, SENTENCE_PIECE
from megatron_scalebio.errors import EXIT_USER_ERROR, UserError


def main(arguments: list[str] | None = None) -> int:
    """Runs the tool; returns an exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--input", required=True, metavar="PATH[,PATH...]")
    add("--output-prefix", required=True, metavar="DIR/NAME")
    add("--tokenizer-type", required=True, choices=(HUGGING_FACE, SENTENCE_PIECE))
    add("--tokenizer-model", required=True, metavar="PATH")
    add("--json-keys", default="text", metavar="KEY", help="the field that holds the text")
    add("--append-eod", action="store_true", help="close plain texts with the EOD token")
    add("--seq-length", type=int, metavar="TOKENS", help="cut to examples of this length")
    add("--workers", type=int, default=1)
    add("--overwrite", action="store_true")
    args = parser.parse_args(arguments)
    prefix = Path(args.output_prefix)
    try:
        tokenizer = load_tokenizer(args.tokenizer_model)
        if tokenizer.type != args.tokenizer_type:
            raise UserError(
                f"is a {tokenizer.type}", where=args.tokenizer_model, fix="--tokenizer-type"
            )
        code = run_config(
            PrepareConfig(
                out=prefix.parent,
                sources=(parse_input(f"{prefix.name}={args.input}"),),
                tokenizer=args.tokenizer_model,
                text_key=args.json_keys,
                ignore_fields=(ALL_FIELDS,),  # as Megatron-LM's
                seq_length=args.seq_length,
                append_eod=args.append_eod,
                workers=args.workers,
                overwrite=args.overwrite,
            )
        )
    except UserError as error:
        print(f"preprocess_data: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    print(f"--data-path {prefix}/tokens")
    return code


if __name__ == "__main__":
    sys.exit(main())
