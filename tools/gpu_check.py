"""Everything that a machine with a GPU should be asked; results as JSON. See docs/gpu.md.

    tools/gpu_check.sh [--rehearse] [--output DIR] [--parts PART ...]

    environment  device, driver's limits, versions
    parity       ten bilevel steps: CPU fp32 against GPU fp32, bf16, FP8 of each recipe, each layer
                 implementation, LISA
    resume       ten steps against six and four resumed, bf16 and FP8 with delayed scaling; and ten
                 steps twice, for the noise of it
    memory       `plan` against the peak of four layouts of Qwen2.5-7B-shaped layers
    speed        plain and bilevel steps of such layers, sequence 4096, bf16 and FP8 of each recipe,
                 and what it saves to cast frozen layers to FP8 once a LISA period
    largest      the deepest Qwen2.5-32B-shaped model whose bilevel LISA step fits on one card
    tests        what pytest has marked `gpu`

`--rehearse` runs every part in its CPU form, at a small size: it checks this script, not the GPU.
Each part is a process of its own, and a part that fails does not keep the next from running.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from gpu_memory import largest, memory  # noqa: E402

from tests.commands import metrics, write_config  # noqa: E402
from tests.markov import write_problem  # noqa: E402

STEPS = 10
LISA = ["--lisa-layers", "1", "--lisa-interval", "5"]
TE = ["--transformer-impl", "transformer_engine"]
# name: (on the GPU, flags); each is compared with the first of the same LISA setting.
PARITY: dict[str, tuple[bool, list[str]]] = {
    "cpu-fp32": (False, []),
    "gpu-fp32-local": (True, ["--transformer-impl", "local"]),
    "gpu-fp32-te": (True, TE),
    "gpu-bf16-local": (True, ["--transformer-impl", "local", "--bf16"]),
    "gpu-bf16-te": (True, [*TE, "--bf16"]),
    "cpu-fp32-lisa": (False, LISA),
    "gpu-fp32-local-lisa": (True, ["--transformer-impl", "local", *LISA]),
    "gpu-bf16-te-lisa": (True, [*TE, "--bf16", *LISA]),
}
RECIPES = ("tensorwise", "delayed", "blockwise")
for recipe in RECIPES:
    FP8 = ["--bf16", "--fp8-format", "hybrid", "--fp8-recipe", recipe]
    PARITY[f"gpu-fp8-{recipe}-te"] = (True, [*TE, *FP8])
    PARITY[f"gpu-fp8-{recipe}-te-lisa"] = (True, [*TE, *FP8, *LISA])


def reweight(folder: Path, name: str, flags: list[str], gpu: bool) -> list[dict[str, Any]]:
    """The steps of a small run; RuntimeError with what it said if it failed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if not gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    words = [sys.executable, "-m", "megatron_scalebio", "reweight", "--config",
             str(folder / "x.yaml"), "--output", str(folder / name), *flags]  # fmt: skip
    ended = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(f"{name}: exit {ended.returncode}: {ended.stderr[-1500:]}")
    return metrics(folder / name)


def difference(got: list[dict[str, Any]], want: list[dict[str, Any]]) -> dict[str, float]:
    """Largest absolute difference of each kind over the steps; of gradient norms, relative."""
    result: dict[str, float] = {}
    for a, b in zip(got, want, strict=True):
        for field in ("loss_w", "loss_u", "validation_losses", "weights"):
            for x, y in zip(a[field], b[field], strict=True):
                result[field] = max(result.get(field, 0.0), abs(x - y))
        for field in ("grad_norm_w", "grad_norm_u"):
            relative = abs(a[field] - b[field]) / abs(b[field])
            result[field] = max(result.get(field, 0.0), relative)
    return result


def environment(folder: Path, rehearse: bool) -> dict[str, Any]:
    script = (
        "import json, torch, megatron.core as m\n"
        "try:\n import transformer_engine as te; te = te.__version__\n"
        "except ImportError: te = None\n"
        "gpu = torch.cuda.is_available()\n"
        "print(json.dumps({'device': torch.cuda.get_device_name() if gpu else 'cpu',"
        "'memory_bytes': torch.cuda.get_device_properties(0).total_memory if gpu else None,"
        "'torch': torch.__version__, 'cuda': torch.version.cuda,"
        "'megatron-core': m.__version__, 'transformer_engine': te}))"
    )
    said = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return json.loads(said.stdout.splitlines()[-1])


def parity(folder: Path, rehearse: bool) -> dict[str, Any]:
    problem(folder)
    result: dict[str, Any] = {}
    references: dict[bool, list[dict[str, Any]]] = {}
    for name, (gpu, flags) in PARITY.items():
        if rehearse and "te" in name.split("-"):
            result[name] = "not rehearsed: Transformer Engine needs CUDA"
            continue
        try:
            steps = reweight(folder, name, flags, gpu)
        except RuntimeError as error:
            result[name] = str(error)
            continue
        reference = references.setdefault("lisa" in name, steps)
        result[name] = difference(steps, reference)
    return result


def resume(folder: Path, rehearse: bool) -> dict[str, Any]:
    problem(folder)
    kinds = {"bf16": ["--bf16"]}
    if not rehearse:
        kinds["fp8-delayed"] = [*TE, *LISA, "--bf16", "--fp8-format", "hybrid",
                                "--fp8-recipe", "delayed"]  # fmt: skip
    result: dict[str, Any] = {}
    for kind, flags in kinds.items():
        whole = reweight(folder, f"{kind}-whole", flags, gpu=True)
        again = reweight(folder, f"{kind}-again", flags, gpu=True)
        source = folder / f"{kind}-from"
        source.mkdir()
        step = "iter_0000006"
        (folder / f"{kind}-whole" / "checkpoints" / step).rename(source / step)
        resumed = reweight(folder, f"{kind}-resumed", [*flags, "--load", str(source)], gpu=True)
        result[kind] = {
            "noise": difference(again, whole), "resumed": difference(resumed, whole[6:]),
        }  # fmt: skip
    return result


def problem(folder: Path) -> None:
    sources, validation = write_problem(
        folder / "data", [0.5, 0.3, 0.2], 0, length=33, examples=200, validation=200
    )
    write_config(
        folder / "x.yaml", sources, validation,
        data={"seq_length": 32},
        model={"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4,
               "ffn_hidden_size": 128, "make_vocab_size_divisible_by": 32},
        optimizer={"lr": 1e-3}, checkpoint={"save_interval": 6},
        train={"train_iters": STEPS, "micro_batch_size": 4, "global_batch_size": 16},
    )  # fmt: skip


def speed(folder: Path, rehearse: bool) -> dict[str, Any]:
    size = ["--layers", "8", "--hidden", "3584", "--seq-length", "4096", "--bf16"]
    if rehearse:
        size = ["--layers", "4", "--hidden", "128", "--seq-length", "64", "--rounds", "2"]
    result: dict[str, Any] = {}
    kinds = [("local", "")] if rehearse else [("local", ""), ("transformer_engine", "")]
    if not rehearse:
        kinds += [("transformer_engine", recipe) for recipe in RECIPES]
    for kind, recipe in kinds:
        name = "-".join(filter(None, (kind, recipe)))
        words = [sys.executable, str(ROOT / "benchmarks" / "step_cost.py"), "--parts", "plain",
                 "--micro-batch-size", "1", "--transformer-impl", kind, *size,
                 "--json", str(folder / f"{name}.json")]  # fmt: skip
        words += ["--fp8-recipe", recipe] if recipe else []
        ended = subprocess.run(words, capture_output=True, text=True, check=False)
        if ended.returncode:
            result[name] = f"exit {ended.returncode}: {ended.stderr[-1500:]}"
        else:
            result[name] = json.loads((folder / f"{name}.json").read_text())
    return result


def tests(folder: Path, rehearse: bool) -> dict[str, Any]:
    words = [sys.executable, "-m", "pytest", "-m", "gpu", "--tb=short", str(ROOT / "tests")]
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    return {"exit": ended.returncode, "said": ended.stdout[-2000:]}  # 5: no test is marked so


PARTS: dict[str, Callable[[Path, bool], dict[str, Any]]] = {
    "environment": environment, "parity": parity, "resume": resume, "memory": memory,
    "speed": speed, "largest": largest, "tests": tests,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("gpu-check"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    args = parser.parse_args()
    failed = False
    for name in args.parts:
        folder = args.output / name
        folder.mkdir(parents=True)
        start = time.perf_counter()
        try:
            result = PARTS[name](folder, args.rehearse)
        except (RuntimeError, subprocess.CalledProcessError, OSError, ValueError) as error:
            result, failed = {"failed": str(error)}, True
        result = {"seconds": round(time.perf_counter() - start, 1), **result}
        (args.output / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        print(f"{name}: {json.dumps(result)}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
