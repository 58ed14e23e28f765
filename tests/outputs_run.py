"""A run of `reweight` with no option at its default, and what else its outputs are held against.

Its sources are of uneven sizes, lengths and masks. For one rank of `harness.run_distributed`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from tests.commands import command, note, write_config
from tests.markov import write_source

STEPS, BATCH, ALPHA, RATE, VOCAB = 12, 10, 7.0, 0.3, 61
RESYNC, EVERY, TAIL = 3, 2, 3  # steps of a reset, of TensorBoard's points, of the average
SIZES = {"a": 17, "b": 9, "c": 30}
INITIAL = np.array([0.004, 1.0, 0.8]) / 1.804
KNOWN = {"a": 0.1, "b": 0.3, "c": 0.6}


def write_problem(folder: Path) -> dict[str, dict[str, Any]]:
    generator = np.random.default_rng(5)
    entries, written = {}, {}
    for name, count in {**SIZES, "v": 20, "x": 7}.items():
        lengths = generator.integers(4, 16, size=count)
        rows = [generator.integers(0, VOCAB, size=n + 1) for n in lengths]
        masks = [generator.random(n + 1) < 0.6 for n in lengths]
        for mask in masks:
            mask[-1] = True
        entries[name] = {"name": name, "path": write_source(folder, name, rows, masks, VOCAB)}
        written[name] = lengths.tolist()
    (folder / "lengths.json").write_text(json.dumps(written))
    return entries


def run_all(folder_name: str) -> None:
    from megatron_scalebio.methods import scalebio

    scalebio.FEWEST_AVERAGED = 2  # intervals of few steps, which can be worked out
    folder = Path(folder_name)
    entries = write_problem(folder / "data")
    sources = [
        {**entries[n], "initial_weight": w} for n, w in zip("abc", (0.004, 1.0, 0.8), strict=True)
    ]
    write_config(
        folder / "x.yaml", sources, [{**entries["v"], "weight": 3.0}, entries["x"]],
        data={"known_weights": KNOWN},
        train={"train_iters": STEPS, "micro_batch_size": 2, "global_batch_size": BATCH,
               "validation_batch_size": 6, "output": str(folder / "run")},
        bilevel={"alpha": ALPHA, "lr_lambda": RATE, "resync_interval": RESYNC, "floor_share": 0.5,
                 "average_fraction": TAIL / STEPS, "confidence": 0.8, "blend_floor": 0.03},
        optimizer={"lr": 2e-3, "lr_u": 5e-3, "min_lr": 1e-3, "lr_decay_style": "linear",
                   "lr_warmup_fraction": 0.25, "clip_grad": 0.0},
        checkpoint={"save": str(folder / "kept"), "save_interval": 5, "keep_last": 3},
        logging={"log_interval": 4, "tensorboard_dir": str(folder / "events"),
                 "tensorboard_log_interval": EVERY},
    )  # fmt: skip
    note(folder / "noted", "run", command("reweight", "--config", folder / "x.yaml"))
    written = (folder / "run" / "weights.json").read_bytes()
    outcome = command("reweight", "--config", folder / "x.yaml", "--train-iters", STEPS - 1)
    note(folder / "noted", "shorter", outcome)
    assert (folder / "run" / "weights.json").read_bytes() == written
    note(folder / "noted", "stopped", stopped_early(folder))
    still = folder / "still"
    words = ["--output", still, "--save", still / "kept", "--tensorboard-dir", still / "events"]
    slow = ["--train-iters", 20, "--lr", 1e-12, "--lr-u", 1e-12, "--min-lr", 0]
    outcome = command("reweight", "--config", folder / "x.yaml", *words, *slow)
    note(folder / "noted", "still", outcome)
    plain = [f"{name}={entries[name]['path']}" for name in SIZES]
    words = ["--weights", folder / "run", "--sources", *plain, "--output", folder / "trained"]
    apart = ["--save", folder / "trained-kept", "--tensorboard-dir", folder / "trained-events"]
    few = ["--train-iters", 4, "--eval-interval", 3]
    outcome = command("train", "--config", folder / "x.yaml", *words, *apart, *few)
    note(folder / "noted", "trained", outcome)
    measured = one_step(folder)
    (folder / "measured.json").write_text(json.dumps(measured))


def stopped_early(folder: Path) -> tuple[int | None, str]:
    """A run that may stop early, and whose weights are called converged from step 3 on."""
    from megatron_scalebio.methods import scalebio
    from megatron_scalebio.mixture.confidence import Verdict

    judge = scalebio.verdict
    scalebio.verdict = lambda state: Verdict(state.step >= 3, "as asked")
    words = ["reweight", "--config", folder / "x.yaml", "--output", folder / "stopped"]
    apart = ["--save", folder / "stopped-kept", "--tensorboard-dir", folder / "stopped-events"]
    outcome = command(*words, *apart, "--early-stop")
    scalebio.verdict = judge
    return outcome


def one_step(folder: Path) -> dict[str, Any]:
    """A step's record beside the gradients that it leaves, and memory by the system's account."""
    import resource

    from megatron_scalebio import runtime
    from megatron_scalebio.config_loader import load_config
    from megatron_scalebio.engine import outputs
    from megatron_scalebio.methods.scalebio import TrainState

    config = load_config(str(folder / "x.yaml"))
    runtime.start(config)
    state = TrainState(config, folder / "cache")
    for _ in range(2):  # the second has passes of w of its own
        record = state.make_step()
    norms = {
        name: math.sqrt(
            sum(float(p.main_grad.double().square().sum()) for p in chunks[0].parameters())
        )
        for name, chunks in state.training.models.items()
    }
    parameters = outputs.parameter_count(state)
    runtime.stop_model_parallel()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"record": record, "norms": norms, "parameters": parameters, "peak": peak}
