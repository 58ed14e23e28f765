"""Everything that a machine with a GPU should be asked; results as JSON. See docs/gpu.md.

    tools/gpu_check.sh [--rehearse] [--output DIR] [--jobs N] [--parts PART ...]

    environment  device, driver's limits, versions
    parity       ten bilevel steps: CPU fp32 against GPU fp32, bf16, FP8 of each recipe, each layer
                 implementation, LISA
    resume       ten steps against six and four resumed, bf16 and FP8; and ten steps twice, for the
                 noise of it; a checkpoint of the CPU resumed on the GPU, and back
    answers      a known mixture of five Markov sources: CPU fp32, GPU bf16 and FP8
    runs         packed rows, experts, sharded optimizers, rivals, `train`, against the CPU's
    families     logits and gradients of every model family against transformers' on the CPU
    shared_card  two ranks on one card, which talk by gloo, against one
    waits        the lines of a step that wait for the GPU, and how long the GPU is idle
    speed        plain, bilevel and LISA steps of Qwen2.5-7B-shaped layers, sequence 4096, bf16 and
                 FP8 of each recipe, and what it saves to cast frozen layers once a LISA period
    memory       `plan` against the peak of four layouts of such layers
    largest      the deepest Qwen2.5-32B-shaped model whose bilevel LISA step fits on one card

`--rehearse` runs every part in its CPU form, at a small size: it checks this script, not the GPU.
Each part is a process of its own with a time limit and writes each result as it comes: one that
fails or takes too long ends neither the rest nor its own results. Runs that only compare numbers
share the card, `--jobs` at a time; what is timed or weighed has it alone.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from gpu_memory import largest, memory  # noqa: E402
from gpu_runs import families, runs, shared_card  # noqa: E402
from gpu_step import speed, waits  # noqa: E402
from gpu_tools import Results, run  # noqa: E402

from tests.commands import metrics, write_config  # noqa: E402
from tests.markov import write_problem  # noqa: E402

STEPS = 10
LISA = ["--lisa-layers", "1", "--lisa-interval", "5"]
TE = ["--transformer-impl", "transformer_engine"]
LOCAL = ["--transformer-impl", "local"]
RECIPES = ("tensorwise", "delayed", "blockwise")
FP8 = {
    recipe: [*TE, "--bf16", "--fp8-format", "hybrid", "--fp8-recipe", recipe] for recipe in RECIPES
}
# name: (on the GPU, flags); each is compared with the CPU's of the same LISA setting.
PARITY: dict[str, tuple[bool, list[str]]] = {
    "cpu-fp32": (False, LOCAL),
    "cpu-fp32-lisa": (False, [*LOCAL, *LISA]),
    "gpu-fp32-local": (True, LOCAL),
    "gpu-fp32-te": (True, TE),
    "gpu-bf16-local": (True, [*LOCAL, "--bf16"]),
    "gpu-bf16-te": (True, [*TE, "--bf16"]),
    "gpu-fp32-local-lisa": (True, [*LOCAL, *LISA]),
    "gpu-bf16-te-lisa": (True, [*TE, "--bf16", *LISA]),
    **{f"gpu-fp8-{recipe}-te": (True, flags) for recipe, flags in FP8.items()},
    **{f"gpu-fp8-{recipe}-te-lisa": (True, [*flags, *LISA]) for recipe, flags in FP8.items()},
}


class Check(NamedTuple):
    """What one part needs to know."""

    folder: Path
    rehearse: bool
    jobs: int
    results: Results

    def each(self, work: Callable[[str], Any], names: list[str]) -> None:
        """The result of each name, several at a time; of one that fails, what it said."""

        def one(name: str) -> None:
            try:
                self.results.add(name, work(name))
            except (RuntimeError, OSError, ValueError, LookupError) as error:
                self.results.add(name, f"failed: {error!r}")

        with ThreadPoolExecutor(self.jobs) as pool:
            list(pool.map(one, names))


def reweight(
    folder: Path, name: str, flags: list[str], gpu: bool = True, config: str = "x.yaml"
) -> list[dict[str, Any]]:
    """The steps of a small run; RuntimeError with what it said if it failed."""
    words = ["--config", str(folder / config), "--output", str(folder / name), *flags]
    run(
        ["-m", "megatron_scalebio", "reweight", *words], {} if gpu else {"CUDA_VISIBLE_DEVICES": ""}
    )
    return metrics(folder / name)


def difference(got: list[dict[str, Any]], want: list[dict[str, Any]]) -> dict[str, float]:
    """Largest absolute difference of each kind over the steps; of gradient norms, relative."""
    result: dict[str, float] = {}
    for a, b in zip(got, want, strict=True):
        for field in ("loss_w", "loss_u", "excess_loss", "validation_losses", "weights"):
            for x, y in zip(a[field], b[field], strict=True):
                result[field] = max(result.get(field, 0.0), abs(x - y))
        for field in ("grad_norm_w", "grad_norm_u"):
            relative = abs(a[field] - b[field]) / abs(b[field])
            result[field] = max(result.get(field, 0.0), relative)
    return result


def write_small_run(folder: Path) -> None:
    sources, validation = write_problem(
        folder / "data", [0.5, 0.3, 0.2], 0, length=33, examples=200, validation=200
    )
    write_config(
        folder / "x.yaml", sources, validation,
        data={"seq_length": 32},
        model={"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4,
               "ffn_hidden_size": 128, "make_vocab_size_divisible_by": 32},
        # Equal counts: those that follow the weights would turn a last bit into other examples.
        bilevel={"floor_share": 1.0},
        optimizer={"lr": 1e-3}, checkpoint={"save_interval": 6},
        train={"train_iters": STEPS, "micro_batch_size": 4, "global_batch_size": 16},
    )  # fmt: skip


def environment(check: Check) -> None:
    said = run(["-c", (
        "import json, torch, megatron.core as m\n"
        "try:\n import transformer_engine as te; te = te.__version__\n"
        "except ImportError as error: te = str(error)\n"
        "gpu = torch.cuda.is_available()\n"
        "print(json.dumps({'device': torch.cuda.get_device_name() if gpu else 'cpu',"
        "'memory_bytes': torch.cuda.get_device_properties(0).total_memory if gpu else None,"
        "'torch': torch.__version__, 'cuda': torch.version.cuda,"
        "'megatron-core': m.__version__, 'transformer_engine': te}))"
    )])  # fmt: skip
    for name, value in json.loads(said.splitlines()[-1]).items():
        check.results.add(name, value)


def parity(check: Check) -> None:
    write_small_run(check.folder)
    names = list(PARITY)
    if check.rehearse:
        names = [name for name in names if "-te" not in name and "fp8" not in name]
    steps: dict[str, Any] = {}
    ended: set[str] = set()

    def one(name: str) -> dict[str, float]:
        gpu, flags = PARITY[name]
        try:
            steps[name] = reweight(check.folder, name, flags, gpu)
        finally:
            ended.add(name)
        reference = "cpu-fp32-lisa" if name.endswith("lisa") else "cpu-fp32"
        while reference not in ended:  # they are the first to start
            time.sleep(0.1)
        if reference not in steps:
            raise RuntimeError(f"there is no {reference} to compare with")
        return difference(steps[name], steps[reference])

    check.each(one, names)


def resume(check: Check) -> None:
    write_small_run(check.folder)
    kinds = {"bf16": [*LOCAL, "--bf16"]}
    if not check.rehearse:
        kinds |= {"bf16-te": [*TE, "--bf16"]}
        kinds |= {f"fp8-{recipe}-lisa": [*flags, *LISA] for recipe, flags in FP8.items()}
    crossings = {"cpu-to-gpu": (False, True), "gpu-to-cpu": (True, False)}

    def one(name: str) -> dict[str, dict[str, float]]:
        on, then = crossings.get(name, (True, True))
        flags = kinds.get(name, LOCAL)
        whole = reweight(check.folder, f"{name}-whole", flags, on)
        source = check.folder / f"{name}-from"
        source.mkdir()
        step = "iter_0000006"
        (check.folder / f"{name}-whole" / "checkpoints" / step).rename(source / step)
        resumed = reweight(check.folder, f"{name}-resumed", [*flags, "--load", str(source)], then)
        again = reweight(check.folder, f"{name}-again", flags, then)
        return {"noise": difference(again, whole), "resumed": difference(resumed, whole[6:])}

    check.each(one, [*kinds, *crossings])


def answers(check: Check) -> None:
    """As benchmarks/markov.py with five sources: distance to the truth after 400 steps."""
    truth = [0.5, 0.3, 0.2, 0.0, 0.0]
    for seed in (0, 1):
        sources, validation = write_problem(check.folder / f"data-{seed}", truth, seed)
        write_config(
            check.folder / f"{seed}.yaml", sources, validation,
            data={"seq_length": 32},
            model={"num_layers": 2, "hidden_size": 64, "num_attention_heads": 2,
                   "ffn_hidden_size": 128, "make_vocab_size_divisible_by": 32},
            optimizer={"lr": 5e-3}, checkpoint={"save_interval": 0},
            train={"train_iters": 20 if check.rehearse else 400, "global_batch_size": 20,
                   "micro_batch_size": 20, "seed": seed},
        )  # fmt: skip
    kinds = {"cpu-fp32": (False, LOCAL), "gpu-bf16-local": (True, [*LOCAL, "--bf16"])}
    if not check.rehearse:
        kinds |= {"gpu-bf16-te": (True, [*TE, "--bf16"])}
        kinds |= {f"gpu-fp8-{recipe}": (True, flags) for recipe, flags in FP8.items()}

    def one(name: str) -> dict[str, Any]:
        kind, seed = name.rsplit(":", 1)
        gpu, flags = kinds[kind]
        folder = f"{kind}-{seed}"
        start = time.perf_counter()
        reweight(check.folder, folder, flags, gpu, f"{seed}.yaml")
        content = json.loads((check.folder / folder / "weights.json").read_text())
        found = [source["weight"] for source in content["sources"]]
        return {
            "l1": sum(abs(p - t) for p, t in zip(found, truth, strict=True)),
            "weights": found, "seconds": time.perf_counter() - start,
        }  # fmt: skip

    check.each(one, [f"{kind}:{seed}" for kind in kinds for seed in (0, 1)])


# In this order; seconds after which a part is ended.
PARTS: dict[str, tuple[int, Callable[[Check], None]]] = {
    "environment": (60, environment),
    "parity": (300, parity),
    "resume": (300, resume),
    "answers": (300, answers),
    "runs": (300, runs),
    "families": (200, families),
    "shared_card": (200, shared_card),
    "waits": (180, waits),
    "speed": (600, speed),
    "memory": (400, memory),
    "largest": (600, largest),
}


def start(part: str, args: argparse.Namespace) -> int:
    """Runs a part in a process group of its own; ends it at its limit. Its exit code."""
    words = [sys.executable, __file__, "--part", part, "--output", str(args.output)]
    words += ["--jobs", str(args.jobs), *(["--rehearse"] if args.rehearse else [])]
    quiet = {**os.environ, "PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(words, start_new_session=True, env=quiet)
    try:
        return process.wait(min(PARTS[part][0], args.limit or PARTS[part][0]))
    except subprocess.TimeoutExpired:
        print(f"{part}: took too long, ended", flush=True)
        return 124
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("gpu-check"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--jobs",
        type=int,
        default=max(1, (os.cpu_count() or 2) // 2),
        help="runs at a time, where numbers are compared",
    )
    parser.add_argument("--limit", type=int, help="seconds for each part, where its own is longer")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # in its own process
    args = parser.parse_args()
    if args.part is None:
        return int(any([start(part, args) != 0 for part in args.parts]))
    folder = (args.output / args.part).resolve()
    folder.mkdir(parents=True)
    results = Results(folder.with_suffix(".json"))
    begin = time.perf_counter()
    try:
        PARTS[args.part][1](Check(folder, args.rehearse, args.jobs, results))
    except (RuntimeError, OSError, ValueError) as error:
        results.add("failed", str(error))
    results.add("seconds", round(time.perf_counter() - begin, 1))
    return int("failed" in json.dumps(results.found))


if __name__ == "__main__":
    sys.exit(main())
