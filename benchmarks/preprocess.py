"""Tokenizing plain text: `tools/preprocess_data.py` here against Megatron-LM's of that name.

    python benchmarks/preprocess.py --megatron-lm ~/Megatron-LM --tokenizer base --input a.jsonl

Both read the same JSONL with one `text` a line, and run in turns, each in a process of its own. The
times are processor seconds of all their processes, so that other jobs on the machine count little.
What both write is compared.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def seconds(command: list[str], folder: Path) -> float:
    """Processor seconds of a command and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    path = os.pathsep.join([str(folder), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL)  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megatron-lm", type=Path, required=True, help="a checkout")
    parser.add_argument("--tokenizer", required=True, help="Hugging Face folder")
    parser.add_argument("--input", required=True)
    parser.add_argument("--workers", default="1")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    shared = ["--input", args.input, "--tokenizer-type", "HuggingFaceTokenizer",
              "--tokenizer-model", args.tokenizer, "--append-eod",
              "--workers", args.workers]  # fmt: skip
    times: dict[str, list[float]] = {"Megatron-LM": [], "megatron_scalebio": []}
    with tempfile.TemporaryDirectory() as work:
        for number in range(args.rounds):
            for name, root, written in (
                ("Megatron-LM", args.megatron_lm, "theirs_text_document.bin"),
                ("megatron_scalebio", ROOT, "ours/tokens.bin"),
            ):
                prefix = Path(work) / written.split("_")[0].split("/")[0]
                command = [sys.executable, str(root / "tools" / "preprocess_data.py"), *shared]
                command += ["--output-prefix", str(prefix)]
                command += ["--overwrite"] if root == ROOT and number else []
                times[name].append(seconds(command, root))
        digests = {
            hashlib.sha256((Path(work) / name).read_bytes()).hexdigest()
            for name in ("theirs_text_document.bin", "ours/tokens.bin")
        }
    print("same tokens" if len(digests) == 1 else "OTHER TOKENS")
    for name, found in times.items():
        listed = ", ".join(f"{t:.1f}" for t in found)
        print(f"{name:18} {statistics.median(found):6.1f} s ({listed})")
    theirs, ours = (statistics.median(found) for found in times.values())
    print(f"throughput against Megatron-LM's: {theirs / ours:.2f}")


if __name__ == "__main__":
    main()
