"""Markov-chain sources with a known mixture, written as prepared folders.

Sequences are short, so that the mixture matters to a model with context: the first tokens of a
sequence do not yet tell its source, and the best prediction there is the mixture's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

VOCAB = 32


def transition_matrices(sources: int, seed: int, concentration: float = 0.3) -> np.ndarray:
    """One row-stochastic matrix per source, S × V × V, rows from a symmetric Dirichlet."""
    generator = np.random.default_rng((seed, 7))
    return generator.dirichlet(np.full(VOCAB, concentration), size=(sources, VOCAB))


def draw(matrices: np.ndarray, source_B: np.ndarray, length: int, seed: tuple) -> np.ndarray:
    """Sequences of the given sources, B × length."""
    generator = np.random.default_rng(seed)
    cumulative = matrices.cumsum(-1)
    tokens = np.empty((len(source_B), length), dtype=np.int64)
    tokens[:, 0] = generator.integers(VOCAB, size=len(source_B))
    for t in range(1, length):
        edges = cumulative[source_B, tokens[:, t - 1]]
        tokens[:, t] = (generator.random((len(source_B), 1)) > edges).sum(1).clip(max=VOCAB - 1)
    return tokens


def write_source(
    folder: Path,
    name: str,
    examples: Sequence[np.ndarray],
    masks: Sequence[np.ndarray] | None = None,
    vocab_size: int = VOCAB,
) -> str:
    """Writes token arrays as a prepared source and returns its folder."""
    target = folder / name
    target.mkdir(parents=True)
    masks = masks or [np.ones(len(example)) for example in examples]
    for kind, rows, dtype in (("tokens", examples, np.uint16), ("loss_mask", masks, np.uint8)):
        builder = IndexedDatasetBuilder(str(target / f"{kind}.bin"), dtype=dtype)
        for row in rows:
            builder.add_document(np.asarray(row).astype(dtype), [len(row)])
        builder.finalize(str(target / f"{kind}.idx"))
    tokens = int(sum(len(example) for example in examples))
    description = {
        "format_version": 1,
        "name": name,
        "examples": len(examples),
        "tokens": tokens,
        "target_tokens": int(sum(mask[1:].sum() for mask in masks)),
        "fingerprint": f"{name}-{tokens}",
        "tokenizer": {
            "type": "none", "model": "integers", "vocab_size": vocab_size, "eod": 0,
            "fingerprint": f"integers-{vocab_size}",
        },
    }  # fmt: skip
    (target / "source.json").write_text(json.dumps(description))
    return str(target)


def write_problem(
    folder: Path, truth: Sequence[float], seed: int, length: int = 33, examples: int = 2000,
    validation: int = 4000, concentration: float = 0.3,
) -> tuple[list[dict], list[dict]]:  # fmt: skip
    """Sources and a validation set drawn from `truth`; returns their configuration entries."""
    matrices = transition_matrices(len(truth), seed, concentration)
    sources = []
    for i in range(len(truth)):
        rows = draw(matrices, np.full(examples, i), length, (seed, 8, i))
        sources.append({"name": f"s{i}", "path": write_source(folder, f"s{i}", list(rows))})
    counts = np.floor(np.asarray(truth) * validation + 0.5).astype(int)
    source_B = np.repeat(np.arange(len(truth)), counts)
    rows = draw(matrices, source_B, length, (seed, 9))
    path = write_source(folder, "validation", list(rows))
    return sources, [{"name": "validation", "path": path}]
