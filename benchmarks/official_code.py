"""A bilevel step beside the method authors' own code (github.com/2003pro/ScaleBiO), on one thread.

    full   all layers train            lisa   two active layers in both

Each is a process of its own; they step in turns. The figures: seconds for each real token that goes
through a model, ours over theirs (median of neighbouring turns), and the most memory of either
process: resident, or allocated on the GPU. Both train the model of a Hugging Face folder, in bf16
on a GPU and in fp32 on a CPU, on as many training and validation examples a step; theirs pads, ours
packs (`--no-packing`: it pads, too).

What their code lacks is put in its place here and not in their folder: another attention than flash
attention, packages that it imports and does not use, no evaluation before the first step; on a CPU
fp32 for bf16, and `.cuda()` without effect.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from common import ROOT, build, table, write_json

FILES = ("train_alpaca.json", "train_gpt4_alpaca.json", "val.json", "test.json")
BARS = {"full": (0.65, None), "lisa": (0.60, 0.75)}  # seconds a token, memory


def official(turn: Callable[[int], None], args: Any, lisa: bool) -> None:
    """Their training; `turn` is called after each step with the tokens of its passes."""
    import torch

    # Imported, and not used by what runs here.
    imported = ("peft", "jsonlines", "wandb")
    absent = [name for name in imported if importlib.util.find_spec(name) is None]
    for name in absent:
        stub: Any = types.ModuleType(name)
        stub.__spec__ = importlib.machinery.ModuleSpec(name, None)  # accelerate asks for it
        stub.get_peft_model = stub.LoraConfig = stub.TaskType = None
        sys.modules[name] = stub
    sys.path.insert(0, str(args.official / "python"))
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        torch.Tensor.cuda = lambda tensor, *where, **how: tensor  # type: ignore[assignment]
    import main as their_main
    import minmax
    import training_utils

    for name in absent:  # transformers asks whether they are there
        del sys.modules[name]
    theirs: Any = minmax
    loaded, loss = theirs.AutoModelForCausalLM.from_pretrained, training_utils.loss_on_batch
    tokens, dtype = 0, torch.bfloat16 if on_gpu else torch.float32

    def from_pretrained(folder: str, **unused: Any) -> Any:
        return loaded(folder, attn_implementation="sdpa", dtype=dtype)

    def counted_loss(*words: Any, **named: Any) -> Any:
        nonlocal tokens
        tokens += int(words[6].sum())  # attn_mask
        return loss(*words, **named)

    def after_step(statistics: dict[str, Any], *words: Any, **named: Any) -> None:
        nonlocal tokens
        if "L1(w, lambda)" in statistics:
            turn(tokens)
            tokens = 0

    theirs.AutoModelForCausalLM = types.SimpleNamespace(from_pretrained=from_pretrained)
    training_utils.loss_on_batch = counted_loss
    theirs.evaluate, theirs.logging_stat_dict = lambda *words: (0.0, 0.0), after_step
    os.chdir(args.official)
    sys.argv = [
        "main.py", "--train-data", f"{args.data}/train_*.json",
        "--val-data", f"{args.data}/val.json",
        "--test-data", f"{args.data}/test.json", "--model", str(args.hf), "--tokenizer-name",
        str(args.hf), "--micro_batch_size", str(args.micro_batch_size), "--global_batch_size",
        str(args.global_batch_size), "--max-length", str(args.seq_length),
        "--optimizer", "name=adamw", "--init_lr", "5e-4", "--minmax_init_lr_u", "1e-5",
        "--minmax_init_lr_w", "1e-5", "--minmax_init_lr_lambda", "1e-2",
        "--sampler", "stochastic", "--minmax_validation_sampler", "stochastic",
        "--init_alpha", "10", "--tau", "1", "--seed", "0", "--num_partitions", "2",
        "--num_inner_iter", "100000", "--response_loss_only", "--num_dataload_worker", "0",
        "--pseudo_random", "--model-type", "llama", *(["--lisa"] if lisa else []),
        *(["--bf16"] if on_gpu else []),
    ]  # fmt: skip
    their_main.main()


def ours(turn: Callable[[int], None], args: Any, lisa: bool) -> None:
    import torch

    from megatron_scalebio.methods.scalebio import train_step

    shape = json.loads((args.hf / "config.json").read_text())

    def entry(name: str) -> dict[str, str]:
        return {"name": name, "path": str(args.prepared / name)}

    settings = {
        "data": {
            "seq_length": args.seq_length, "sources": [entry("alpaca"), entry("gpt4")],
            "validation": [entry("validation")],
        },
        "model": {
            "num_layers": shape["num_hidden_layers"], "hidden_size": shape["hidden_size"],
            "num_attention_heads": shape["num_attention_heads"],
            "num_query_groups": shape["num_key_value_heads"],
            "ffn_hidden_size": shape["intermediate_size"],
            "untie_embeddings_and_output_weights": not shape["tie_word_embeddings"],
        },
        "optimizer": {"lr": 1e-5},
        "lisa": {"lisa_layers": 2} if lisa else {},
        "train": {
            "train_iters": 10**5, "global_batch_size": args.global_batch_size,
            "micro_batch_size": args.row or args.micro_batch_size, "packing": args.packing,
        },
        "parallel": {"bf16": torch.cuda.is_available()},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as cache:
        state = build(settings, Path(cache))
        while True:
            turn(train_step(state).losses.tokens)


CONTESTANTS = {"official": official, "ours": ours}


def contestant(pipe: Any, name: str, args: Any, lisa: bool) -> None:
    """A process: makes a step whenever it is asked, and says what it took."""
    import torch

    torch.set_num_threads(1)
    on_gpu = torch.cuda.is_available()
    started = 0.0

    def turn(tokens: int) -> None:
        nonlocal started
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if on_gpu:
            memory = torch.cuda.max_memory_allocated()
        pipe.send({"seconds": seconds, "tokens": tokens, "memory": memory})
        if pipe.recv() == "end":
            os._exit(0)
        started = time.perf_counter()

    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  they print examples
    CONTESTANTS[name](turn, args, lisa)


def in_turns(args: Any, lisa: bool) -> dict[str, dict[str, Any]]:
    """Each one's steps but the first, which loads and warms up, and its most memory."""
    context = multiprocessing.get_context("spawn")
    pipes = {}
    for name in CONTESTANTS:
        here, there = context.Pipe()
        process = context.Process(target=contestant, args=(there, name, args, lisa), daemon=True)
        process.start()
        there.close()
        here.recv()
        pipes[name] = here
    steps: dict[str, list[dict[str, Any]]] = {name: [] for name in pipes}
    for _ in range(args.rounds):
        for name, pipe in pipes.items():
            pipe.send("step")
            steps[name].append(pipe.recv())
    for pipe in pipes.values():
        pipe.send("end")
    return {
        name: {
            "seconds_per_token": [each["seconds"] / each["tokens"] for each in those],
            "memory_bytes": those[-1]["memory"],
        }
        for name, those in steps.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("official", type=Path, help="a clone of their repository")
    parser.add_argument("--hf", type=Path, required=True, help="Hugging Face folder, Llama-shaped")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "denoise")
    parser.add_argument("--prepared", type=Path, help="keep the tokenized sets here and reuse them")
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--global-batch-size", type=int, default=4, help="of either side")
    parser.add_argument("--micro-batch-size", type=int, default=2)
    parser.add_argument(
        "--row", type=int, metavar="N", help="our packed rows have at most N times --seq-length "
        "tokens [--micro-batch-size]"
    )  # fmt: skip
    parser.add_argument("--packing", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--parts", nargs="+", choices=BARS, default=list(BARS))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path, help="write every step here")
    args = parser.parse_args()
    missing = [str(args.data / file) for file in FILES if not (args.data / file).is_file()]
    missing += [str(p) for p in (args.official / "python" / "minmax.py", args.hf / "config.json")
                if not p.is_file()]  # fmt: skip
    if missing:
        print(f"official_code: no {', '.join(missing)} (name the folders)", file=sys.stderr)
        return 2
    args.official, args.hf, args.data = (
        path.resolve() for path in (args.official, args.hf, args.data)
    )
    with tempfile.TemporaryDirectory() as scratch:
        args.prepared = (args.prepared or Path(scratch)).resolve()
        if not (args.prepared / "validation").is_dir():
            prepared(args)
        found = {part: in_turns(args, part == "lisa") for part in args.parts}
    write_json(args.json, found)
    print(table(["part", "seconds a token", "bar", "memory", "bar", "GiB, theirs and ours"],
                [row(part, found[part]) for part in args.parts]))  # fmt: skip
    return 0


def prepared(args: Any) -> None:
    """Tokenizes the sets with the model's tokenizer."""
    import subprocess

    names = {"alpaca": FILES[0], "gpt4": FILES[1], "validation": FILES[2]}
    command = [sys.executable, "-m", "megatron_scalebio", "prepare", "--tokenizer", str(args.hf)]
    command += ["--seq-length", str(args.seq_length), "--out", str(args.prepared)]
    for name, file in names.items():
        command += ["--input", f"{name}={args.data / file}"]
    subprocess.run(command, check=True, cwd=ROOT)


def row(part: str, of: dict[str, dict[str, Any]]) -> list[str]:
    both = (of["ours"]["seconds_per_token"], of["official"]["seconds_per_token"])
    time_ratio = median(a / b for a, b in zip(*both, strict=True))
    theirs, mine = (of[name]["memory_bytes"] / 2**30 for name in ("official", "ours"))
    bars = ["" if bar is None else f"{bar:.2f}" for bar in BARS[part]]
    return [part, f"{time_ratio:.2f}", bars[0], f"{mine / theirs:.2f}", bars[1],
            f"{theirs:.1f}, {mine:.1f}"]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
