"""Is the held-out loss of `evaluate` what transformers computes? Every example of a file, in fp32.

The file is prepared with the model's own tokenizer and chat template; `evaluate` runs the model on
Megatron-Core from its Hugging Face folder, padded and in micro-batches; transformers then takes the
same token ids one example at a time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from common import ROOT, table, write_json


def megatron(hf: Path, data: Path, limit: int | None, scratch: Path) -> dict:
    start = [sys.executable, "-m", "megatron_scalebio"]
    prepare = [*start, "prepare", "--tokenizer", str(hf), "--seq-length", "512"]
    prepare += ["--input", f"test={data}", "--out", str(scratch)]
    prepare += ["--max-examples", str(limit)] if limit else []
    evaluate = [*start, "evaluate", "--hf", str(hf), "--test", f"test={scratch / 'test'}"]
    evaluate += ["--seq-length", "512", "--micro-batch-size", "4", "--output", str(scratch / "run")]
    for words in (prepare, evaluate):
        subprocess.run(words, check=True, cwd=ROOT)
    content = json.loads((scratch / "run" / "evaluation.json").read_text())
    return content["held_out"]["sets"][0]


def transformers_losses(hf: Path, folder: Path) -> tuple[float, float]:
    """(mean over examples of their token means, mean over all target tokens), in nats."""
    import torch
    from transformers import AutoModelForCausalLM

    from megatron_scalebio.data.sources import ExampleSource

    source = ExampleSource("test", folder, 512)
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32).eval()
    means, total, count = [], 0.0, 0
    for number in range(len(source)):
        tokens, targets = source.example(number)
        ids = torch.from_numpy(tokens)
        with torch.no_grad():
            logits = model(ids[None, :-1]).logits[0]
        losses = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none").double()
        counted = losses[torch.from_numpy(targets[1:]) > 0]
        means.append(float(counted.mean()))
        total, count = total + float(counted.sum()), count + len(counted)
    return sum(means) / len(means), total / count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hf", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--data", type=Path, required=True, help="JSON or JSONL of examples")
    parser.add_argument("--limit", type=int, help="the first N records")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        ours = megatron(args.hf.resolve(), args.data.resolve(), args.limit, Path(scratch))
        sample, token = transformers_losses(args.hf, Path(scratch) / "test")
    rows = [["per example", f"{ours['sample_mean']:.6f}", f"{sample:.6f}"],
            ["per token", f"{ours['token_mean']:.6f}", f"{token:.6f}"]]  # fmt: skip
    print(table([f"loss of {ours['examples']} examples", "evaluate", "transformers"], rows))
    write_json(args.json, {"evaluate": ours, "transformers": [sample, token]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
