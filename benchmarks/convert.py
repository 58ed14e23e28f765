"""Converts a synthetic checkpoint both ways: peak memory, and speed against copying the files.

    benchmarks/convert.py [--folder DIR] [--layers N] [--json FILE]

A Llama-shaped bf16 model of 3.2 billion parameters in shards of up to 2 GiB by default, made of
random bits in a folder on the disk to be measured (needs four times its size, 26 GB), which is
removed at the end. Copying is `cp` and `sync` of the copied files: the converter, too, ends when
its files are on the disk.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import ROOT, table, write_json

from megatron_scalebio.config_loader import load_config
from megatron_scalebio.convert.layout import OutTensor
from megatron_scalebio.convert.safetensors_file import build_header, bytes_of, write_all, writing
from megatron_scalebio.convert.table import Table
from megatron_scalebio.families import read_family

SHARD_BYTES = 2 << 30
COPIES = 4  # the model, its copy, Megatron's, and the model again
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
    "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
    "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "tie_word_embeddings": True, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
}  # fmt: skip


def make(folder: Path, layers: int) -> int:
    """Writes the model; gives its size in bytes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))
    (folder / "tokenizer.json").write_text("{}")
    family, _ = read_family(folder)
    parts = Table(family, load_config(None, {"model": {"hf": str(folder)}}).model).parts
    shards: list[list[OutTensor]] = [[]]
    for name, whole in parts.items():
        [shape] = [part.shape for part in whole.parts if part.name == name]
        tensor = OutTensor(name, torch.bfloat16, shape)
        if sum(t.nbytes for t in shards[-1]) + tensor.nbytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(tensor)
    total = sum(t.nbytes for shard in shards for t in shard)
    if shutil.disk_usage(folder).free < COPIES * total + SHARD_BYTES:
        sys.exit(f"{folder}: its disk has no room for {COPIES} x {total / 1e9:.1f} GB")
    placed = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        placed.update({tensor.name: name for tensor in shard})
        _write_shard(folder / name, shard, number)
    index = {"metadata": {"total_size": total}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _write_shard(path: Path, shard: list[OutTensor], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    header = build_header(((t.name, t.dtype, t.shape) for t in shard), {"format": "pt"})
    with writing(path, header) as stream:
        for tensor in shard:
            bits = torch.randint(
                -(2**15), 2**15, tensor.shape, dtype=torch.int16, generator=generator
            )
            write_all(stream, bytes_of(bits))


def measure(words: list[object]) -> tuple[float, float]:
    """Runs a command; gives its seconds and its peak resident memory in GiB."""
    begin = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([str(word) for word in words], env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{words} ended with {os.waitstatus_to_exitcode(status)}")
    return time.monotonic() - begin, usage.ru_maxrss / 2**20


def run(folder: Path, layers: int) -> dict[str, Any]:
    hf, megatron, back = folder / "hf", folder / "megatron", folder / "back"
    # In a process of its own: a child's peak would begin at what this process holds.
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        total = pool.apply(make, (hf, layers))
    convert = [sys.executable, "-m", "megatron_scalebio", "convert"]
    copy = f"cp -r {hf} {folder}/copy && sync {folder}/copy/*"
    measured = {
        "cp": measure(["bash", "-c", copy]),
        "import": measure([*convert, "import", "--hf", hf, "--save", megatron]),
        "export": measure(
            [*convert, "export", "--load", megatron, "--hf-reference", hf, "--save", back]
        ),
    }
    names = sorted(path.name for path in hf.iterdir())
    _, differing, failed = filecmp.cmpfiles(hf, back, names, shallow=False)
    assert not differing and not failed, (differing, failed)
    return {
        "bytes": total,
        **{
            name: {"seconds": seconds, "mb_per_s": total / 1e6 / seconds, "peak_gib": peak}
            for name, (seconds, peak) in measured.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where to work [a temporary folder]")
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="convert-", dir=args.folder))
    try:
        result = run(folder, args.layers)
    finally:
        shutil.rmtree(folder)
    print(f"{result['bytes'] / 1e9:.2f} GB, the same bytes after the round trip")
    rows = [
        [name, f"{r['seconds']:.1f}", f"{r['mb_per_s']:.0f}", f"{r['peak_gib']:.2f}"]
        for name, r in result.items()
        if isinstance(r, dict)
    ]
    print(table(["", "seconds", "MB/s", "peak GiB"], rows))
    write_json(args.json, result)


if __name__ == "__main__":
    main()
