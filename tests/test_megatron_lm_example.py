"""ScaleBiO around Megatron-LM's own parts: the right weights, and those of the command line."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.commands import ROOT, command, note, noted, write_config
from tests.distributed.harness import run_distributed
from tests.markov import VOCAB, draw, transition_matrices, write_problem, write_source

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
# Of a machine without a GPU, and of data without a tokenizer (docs/library.md).
SURROUNDINGS = [
    "--distributed-backend", "gloo", "--use-cpu-initialization", "--transformer-impl", "local",
    "--no-persist-layer-norm", "--no-masked-softmax-fusion", "--no-gradient-accumulation-fusion",
    "--no-bias-dropout-fusion", "--no-rope-fusion", "--no-bias-gelu-fusion",
    "--no-bias-swiglu-fusion", "--logging-level", "40",
    "--tokenizer-type", "NullTokenizer", "--vocab-size", str(VOCAB),
]  # fmt: skip


EXAMPLE = ROOT / "examples" / "megatron_lm.py"


def learned(
    folder: Path, sources: list[dict], validation: list[dict], *flags: object
) -> dict[str, tuple[float, float, float]]:
    """Weights, with the ends of their intervals, that the example prints on two ranks."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words += [str(EXAMPLE), *SURROUNDINGS]
    words += ["--scalebio-sources", *(f"{entry['name']}={entry['path']}" for entry in sources)]
    words += ["--scalebio-validation", validation[0]["path"], *map(str, flags)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert ended.returncode == 0, (ended.stdout + ended.stderr)[-4000:]
    rows = [re.sub(r"[\[\],]", " ", line).split() for line in ended.stdout.splitlines()]
    names = [entry["name"] for entry in sources]
    table = {row[0]: tuple(map(float, row[1:])) for row in rows if row[:1] and row[0] in names}
    assert list(table) == names, ended.stdout[-4000:]
    return table  # type: ignore[return-value]


def test_it_finds_a_known_mixture(tmp_path: Path) -> None:
    truth = {"s0": 0.6, "s1": 0.4, "s2": 0.0}
    sources, validation = write_problem(tmp_path / "data", list(truth.values()), 0)
    sources[1]["path"] += "/tokens"  # a Megatron prefix, without a loss mask
    found = learned(
        tmp_path, sources, validation, "--num-layers", 1, "--hidden-size", 64,
        "--num-attention-heads", 4, "--seq-length", 32, "--max-position-embeddings", 32,
        "--hidden-dropout", 0, "--attention-dropout", 0, "--make-vocab-size-divisible-by", 16,
        "--train-iters", 240,
        "--micro-batch-size", 24, "--global-batch-size", 48, "--lr", 3e-3,
        "--lr-warmup-fraction", 0.1, "--lr-decay-style", "constant", "--log-interval", 50,
    )  # fmt: skip
    for name, (weight, low, high) in found.items():
        assert abs(weight - truth[name]) < 0.1, found
        assert low - 1e-3 < weight < high + 1e-3  # ends have three digits
        assert high - low < 0.4
    assert found["s2"][0] < 1e-3
    *blend, end = (tmp_path / "blend.txt").read_text().split(" ")
    data = tmp_path / "data"
    assert [*blend[1::2], end] == [f"{data}/s0/tokens", f"{data}/s1/tokens\n"]  # s2 is left out
    weights = [float(weight) for weight in blend[0::2]]
    assert weights == pytest.approx([found["s0"][0], found["s1"][0]], abs=1e-6)


STEPS, MICRO, BATCH = 10, 4, 8  # a micro-batch on each rank: both deal the same examples to it
SAME = [
    "--lr", 1e-3, "--lr-decay-style", "constant", "--micro-batch-size", MICRO, "--seed", 7,
    "--lisa-layers", 1, "--lisa-interval", 4,
]  # fmt: skip


def start_and_reweight(folder_name: str) -> None:
    """A checkpoint to start from, and the weights that the command line learns from there."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    from megatron_scalebio.model import layers

    folder = Path(folder_name)
    config = ("--config", folder / "run.yaml", "--output")
    start = ("train", *config, folder / "start", "--train-iters", 3)
    note(folder / "noted", "start", command(*start))
    run = ("--pretrained-checkpoint", folder / "start" / "checkpoints", *SAME)
    run += ("--lr-warmup-fraction", 0, "--alpha", 3)
    note(folder / "noted", "own", command("reweight", *config, folder / "own", *run))
    layers.SdpaAttention = DotProductAttention  # type: ignore[misc, assignment]
    note(folder / "noted", "core", command("reweight", *config, folder / "core", *run))


def test_from_a_checkpoint_it_makes_the_steps_of_the_command_line(tmp_path: Path) -> None:
    sources, validation = masked_problem(tmp_path / "data")
    train = {"train_iters": STEPS, "global_batch_size": BATCH}
    write_config(tmp_path / "run.yaml", sources, validation, train=train)
    run_distributed(start_and_reweight, 2, str(tmp_path))
    for name in ("start", "own", "core"):
        code, said = noted(tmp_path / "noted", name)
        assert code == 0, said
    found = learned(
        tmp_path, sources, validation, "--use-checkpoint-args",
        "--load", tmp_path / "start" / "checkpoints",
        "--no-use-tokenizer-model-from-checkpoint-args", "--global-batch-size", BATCH,
        "--train-iters", STEPS, *SAME, "--scalebio-alpha", 3,
        "--adam-beta2", 0.95, "--weight-decay", 0,
    )  # fmt: skip
    weights = [weight for weight, _, _ in found.values()]
    assert np.ptp(weights) > 0.1  # it has moved
    # With Megatron-Core's attention in both, they are the same to the nine digits printed.
    assert weights == pytest.approx(weights_of(tmp_path / "core"), abs=1e-9)
    # Ours rounds otherwise.
    assert weights == pytest.approx(weights_of(tmp_path / "own"), abs=2e-5)


def masked_problem(folder: Path) -> tuple[list[dict], list[dict]]:
    """Sequences of one length, in which about half of the tokens are targets."""
    generator, entries = np.random.default_rng(3), []
    matrices = transition_matrices(3, seed=3)
    for name, source_B in {
        **{f"s{i}": np.full(50, i) for i in range(3)},
        "validation": np.repeat([0, 1, 2], [50, 30, 20]),
    }.items():
        rows = draw(matrices, source_B, 17, (3, len(entries)))
        masks = generator.random(rows.shape) < 0.5
        masks[:, -1] = True
        entries.append({"name": name, "path": write_source(folder, name, list(rows), list(masks))})
    return entries[:3], entries[3:]


def weights_of(run: Path) -> list[float]:
    content = json.loads((run / "weights.json").read_text())
    return [entry["weight"] for entry in content["sources"]]


def test_longer_sequences_are_cut_and_every_target_stays(tmp_path: Path) -> None:
    rows = [np.arange(length) for length in (1, 4, 5, 6, 9, 12)]
    masks = [np.arange(len(row)) % 3 > 0 for row in rows]
    prepared = write_source(tmp_path, "a", rows, masks)
    make = runpy.run_path(str(EXAMPLE))["Source"]
    for path, of_prefix in ((prepared, False), (f"{prepared}/tokens", True)):
        source = make(path, 4)
        pieces = [source.tokens_and_targets(index) for index in range(len(source))]
        assert all(piece.shape == (2, 5) for piece in pieces)
        # The tokens that are to be predicted, each once and after the one before it.
        found = [(int(t[i - 1]), int(t[i])) for t, m in pieces for i in range(1, 5) if m[i]]
        wanted = [
            (i - 1, i)
            for row, mask in zip(rows, masks, strict=True)
            for i in range(1, len(row))
            if of_prefix or mask[i]
        ]
        assert found == wanted
