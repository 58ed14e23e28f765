#!/usr/bin/env python3
"""Converts checkpoints: ``megatron-scalebio convert`` under the name that Megatron-LM's users know.

``convert_checkpoint.py import --hf DIR --save CKPT``, ``convert_checkpoint.py export --help``.
"""

from __future__ import annotations

import sys

from megatron_scalebio.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
