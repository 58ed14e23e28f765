"""What a run leaves behind: run.json, weights.json, the blend files and a record per step."""

import datetime
import json
import os
import platform
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import megatron.core
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import unwrap_model

import megatron_scalebio
from megatron_scalebio import launcher, runtime
from megatron_scalebio.config import Config, ValidationConfig
from megatron_scalebio.config_loader import config_text
from megatron_scalebio.data.blend_schedule import SCHEDULE_FILE
from megatron_scalebio.data.sources import Source
from megatron_scalebio.engine.epochs import natural_counts
from megatron_scalebio.engine.state import RunState, TokenCost
from megatron_scalebio.errors import UserError, disk_errors_named
from megatron_scalebio.formatting import few
from megatron_scalebio.logs.records import METRICS_FILE
from megatron_scalebio.whole_files import write_json, write_text

MEMORY_FILE = "memory.json"


def prepare_folders(
    folder: Path, save_to: Path, sources: list[str], validation: list[str] | None = None
) -> None:
    """Makes the output and the checkpoint folder, before anything costs time.

    Args:
        sources: names.
        validation: names, where they decide what is learned.

    Raises:
        UserError: if one can't be written, or the output holds a run of others.
    """
    for path in (folder, save_to):
        with disk_errors_named(path):
            path.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path).close()
    metrics = folder / METRICS_FILE
    if not metrics.is_file() or metrics.stat().st_size == 0:
        return
    try:
        run = json.loads((folder / "run.json").read_text())
        earlier = {"sources": run["sources"], "validation": run["validation"]}
    except (OSError, ValueError, KeyError, TypeError):
        return
    is_train = run.get("stage") == "train"
    more = f"; with --weights {folder} it starts from the weights learned here"
    if is_train:
        more = ", or name new sources after those that it had"
    for kind, names in (("sources", sources), ("validation", validation)):
        # []: a part that has none. `train` may go on with more sources.
        known = names[: len(earlier[kind])] if names and is_train else names
        if names is not None and earlier[kind] not in ([], known):
            raise UserError(
                f"holds a run of other {kind}: {_difference(earlier[kind], names)}",
                where=str(folder),
                fix="choose a new train.output" + more * (kind == "sources"),
            )


def _difference(earlier: list[str], now: list[str]) -> str:
    """What one list of names lacks and another adds, in words."""
    had, has = set(earlier), set(now)
    gone = [name for name in earlier if name not in has]
    new = [name for name in now if name not in had]
    if not gone and not new:
        return f"the order was {few(earlier)}"
    parts = {"no longer there": gone, "not there before": new}
    return "; ".join(f"{few(names)} {what}" for what, names in parts.items() if names)


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def natural_shares(sources: Sequence[Source]) -> list[float]:
    """What training on all sources put together amounts to: each one's share of the examples.

    Of sequences, for packed prefixes.
    """
    counts = natural_counts(sources)
    return [count / sum(counts) for count in counts]


def counted_in(sources: Sequence[Source]) -> str:
    """What sources' lengths count: examples of prepared ones, sequences of packed prefixes."""
    kinds = {"examples" if source.tokenizer else "sequences" for source in sources}
    return kinds.pop() if len(kinds) == 1 else "both"


def parameter_count(state: RunState) -> int:
    """Parameters of one model over all stages and TP ranks. A collective."""
    count = 0
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    for chunk in state.training.w:
        gpt = unwrap_model(chunk)
        for parameter in gpt.parameters():
            copy_of_first_stage = getattr(parameter, "shared", False)
            split = getattr(parameter, "tensor_model_parallel", False)
            if not copy_of_first_stage and (split or tp_rank == 0):
                count += parameter.numel()
    total = torch.tensor([count], dtype=torch.int64, device=runtime.device())
    dist.all_reduce(total)
    return int(total) // (runtime.dp_size() * runtime.cp_size())


def adam_named() -> str:
    """Whose AdamW the run steps with: Megatron takes the first of these that is installed."""
    from megatron.core.optimizer import Adam

    library = Adam.__module__.partition(".")[0]
    return {
        "transformer_engine": "Transformer Engine's fused Adam", "apex": "Apex's fused Adam",
    }.get(library, "torch's AdamW")  # fmt: skip


def write_start(state: RunState, config: Config, folder: Path, parameters: int) -> dict[str, Any]:
    """Writes config.yaml, command.txt and run.json; returns run.json's content."""
    write_text(folder / "config.yaml", config_text(config))
    write_text(folder / "command.txt", launcher.command_line() + "\n")
    run = {
        "stage": state.stage,
        "sources": [source.name for source in state.data.sources],
        "validation": [source.name for source in state.data.validation],
        "natural": natural_shares(state.data.sources),
        "counted_in": counted_in(state.data.sources),
        "world": {
            "tp": parallel_state.get_tensor_model_parallel_world_size(),
            "pp": parallel_state.get_pipeline_model_parallel_world_size(),
            "dp": runtime.dp_size(),
            "cp": runtime.cp_size(),
            "vpp": config.parallel.virtual_chunks(config.model.num_layers) or 1,
        },
        "device": torch.cuda.get_device_name()
        if runtime.on_cuda()
        else f"cpu ({platform.machine()})",
        "parameters": parameters,
        "adam": adam_named(),
        "started": now(),
        "ended": None,
        "versions": {
            "megatron_scalebio": megatron_scalebio.__version__,
            "megatron-core": megatron.core.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    write_json(folder / "run.json", run)
    return run


def cost_entry(cost: TokenCost) -> dict[str, int]:
    """What finding the weights took: tokens of all ranks."""
    return {"trained_tokens": cost.trained, "scored_tokens": cost.scored}


def write_memory(folder: Path) -> None:
    """Writes memory.json: measured, so apart from what equal runs leave alike."""
    write_json(folder / MEMORY_FILE, {"peak_bytes": runtime.allocated_bytes()})


def write_weights(
    folder: Path, content: dict[str, Any], sources: Sequence[Source], config: Config
) -> list[str]:
    """Writes weights.json, blend.txt (Megatron's --data-path, quoted as a shell needs it) and
    blend.json (per split). Their paths are absolute: a job may start in another folder.

    Returns:
        Names of the sources below the floor, which the blend leaves out: Megatron-LM's
        dataset builder fails on weights that round to no sample.
    """
    write_memory(folder)
    write_json(folder / "weights.json", content)
    floor = blend_floor(config)
    words = _blend_words(sources, [entry["weight"] for entry in content["sources"]], floor)
    write_text(folder / "blend.txt", shlex.join(words) + "\n")
    splits: dict[str, list[str] | None] = {
        "train": words,
        "valid": _weighted(config.data.validation),
    }
    # Megatron-LM wants the name, and takes null for no test set.
    splits["test"] = _weighted(config.data.test) or None
    write_json(folder / "blend.json", splits)
    return [e["name"] for e in content["sources"] if e["weight"] < floor]


def _blend_words(sources: Sequence[Source], weight_S: Sequence[float], floor: float) -> list[str]:
    """Weights and prefixes, as a blend has them, of the weights from a floor on.

    Megatron-LM packs documents and blends the sequences, all of one length: of sources whose
    examples are longer it would draw fewer. So a weight counts by its examples' mean length.
    """
    kept = [(w * s.mean_length, s.prefix) for s, w in zip(sources, weight_S, strict=True)
            if w >= floor]  # fmt: skip
    whole = sum(share for share, _ in kept)
    return [
        word for share, path in kept for word in (f"{share / whole:.6f}", os.path.abspath(path))
    ]


def write_schedule(
    folder: Path,
    sources: Sequence[Source],
    stages: Sequence[tuple[int, list[float]]],
    config: Config,
) -> None:
    """Writes blend_schedule.json: the step at which each stage begins, and its mixture."""
    floor = blend_floor(config)
    content = [
        {
            "step": step,
            "weights": {s.name: weight for s, weight in zip(sources, weight_S, strict=True)},
            "blend": shlex.join(_blend_words(sources, weight_S, floor)),
        }
        for step, weight_S in stages
    ]
    write_json(folder / SCHEDULE_FILE, {"stages": content})


def _weighted(sets: Sequence[ValidationConfig]) -> list[str]:
    """Weights and prefixes of validation or test sets, as a blend has them."""
    words = []
    for entry in sets:
        prefix = Path(entry.path) / "tokens"
        is_folder = prefix.with_suffix(".idx").is_file()
        words += [f"{entry.weight:.6f}", os.path.abspath(prefix if is_folder else entry.path)]
    return words


def blend_floor(config: Config) -> float:
    """`blend_floor`, or a tenth of a uniform weight where that is less: many sources all stay."""
    return min(config.bilevel.blend_floor, 0.1 / len(config.data.sources))


def run_facts(config: Config, run: dict[str, Any], step: int) -> dict[str, object]:
    """What the banner of a run says besides its sources."""
    model, world, lisa = config.model, run["world"], config.lisa
    context = f" x CP {world['cp']}" if world["cp"] > 1 else ""
    start = model.pretrained_checkpoint or model.hf
    facts: dict[str, object] = {
        "model": f"{model.num_layers} layers x {model.hidden_size}, "
        f"{run['parameters']:,} parameters, " + (f"from {start}" if start else "new"),
        "adam": run["adam"],
        "layout": f"TP {world['tp']}{context} x PP {world['pp']} x VPP {world['vpp']} "
        f"x DP {world['dp']} on {run['device']}, {'bf16' if config.parallel.bf16 else 'fp32'}",
        "steps": f"{config.train.train_iters} of {config.train.global_batch_size} sequences",
        "output": config.train.output,
    }
    if lisa.lisa_layers is not None:
        facts["lisa"] = f"{lisa.lisa_layers} layers, redrawn every {lisa.lisa_interval} steps"
    if step:
        facts["resumed"] = f"from step {step}"
    return facts
