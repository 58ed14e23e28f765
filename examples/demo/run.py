"""The embedded example, from text to learned weights; prints each command that it runs.

make_data.py → JSONL text → prepare → token files → reweight on two CPU ranks → weights, report
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
TOKENIZER = HERE.parents[1] / "tokenizers" / "english-code-1k.model"
SOURCES = ("english", "code", "shuffled", "noise")
YAML_FOLDER = Path("demo-run")  # where demo.yaml looks for the data


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Runs the embedded example.",
        epilog="Other options go to `megatron-scalebio reweight`, e.g. --train-iters 100.",
        allow_abbrev=False,
    )
    parser.add_argument("--output", type=Path, default=YAML_FOLDER, help="folder for everything")
    args, reweight_options = parser.parse_known_args()
    start = time.monotonic()
    remove_former(args.output)
    for what, command in steps(args.output, reweight_options):
        print(f"\n# {what}\n$ {shown(command)}\n", flush=True)
        code = run(command)
        if code:
            return code
    print(f"\nThe demo took {time.monotonic() - start:.0f} s.")
    return 0


def steps(output: Path, reweight_options: list[str]) -> list[tuple[str, list[str]]]:
    """What each step is for, and its command."""
    text, data = output / "text", output / "data"
    make_data = [sys.executable, relative(HERE / "make_data.py"), str(text)]

    prepare = [sys.executable, "-m", "megatron_scalebio", "prepare"]
    prepare += ["--tokenizer", relative(TOKENIZER), "--seq-length", "32", "--too-long", "truncate"]
    prepare += ["--out", str(data), "--overwrite"]
    for name in (*SOURCES, "validation"):
        prepare += ["--input", f"{name}={text / name}.jsonl"]

    reweight = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    reweight += ["--nproc_per_node", "2", "-m", "megatron_scalebio", "reweight"]
    reweight += ["--config", relative(HERE / "demo.yaml"), "--output", str(output / "run")]
    if output != YAML_FOLDER:
        reweight += ["--sources", *(f"{name}={data / name}" for name in SOURCES)]
        reweight += ["--validation", f"validation={data / 'validation'}"]
    return [
        ("Text of two good and two junk sources, and a validation set", make_data),
        ("Text to token files, cut short (of which it warns) so that steps are quick", prepare),
        ("Learn the weights on two ranks, a pipeline stage each", reweight + reweight_options),
    ]


def run(command: list[str]) -> int:
    """Runs a command with its output on this terminal; returns its exit code."""
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    try:
        return subprocess.run(command, env=environment).returncode
    except KeyboardInterrupt:
        return 130


def remove_former(output: Path) -> None:
    """Removes what an earlier demo learned: `reweight` would resume it."""
    former = output / "run"
    if (former / "run.json").exists():
        shutil.rmtree(former)


def relative(path: Path) -> str:
    """The path as one would type it here."""
    short = os.path.relpath(path)
    return str(path) if short.startswith("..") else short


def shown(command: list[str]) -> str:
    return shlex.join([relative(Path(command[0])), *command[1:]])


if __name__ == "__main__":
    sys.exit(main())
