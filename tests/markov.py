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

from tests.commands import write_config

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


def uneven(rows: np.ndarray, seed: tuple) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The rows cut to lengths of their own, and masks that leave out a prompt and some targets."""
    generator = np.random.default_rng(seed)
    examples, masks = [], []
    for row in rows:
        length = int(generator.integers(len(row) // 2, len(row) + 1))
        mask = generator.random(length) < 0.9
        mask[: generator.integers(1, length // 2)] = False
        mask[-1] = True
        examples.append(row[:length])
        masks.append(mask)
    return examples, masks


def write_problem(
    folder: Path, truth: Sequence[float], seed: int, length: int = 33,
    examples: int | Sequence[int] = 2000, validation: int = 4000, concentration: float = 0.3,
    even: bool = True,
) -> tuple[list[dict], list[dict]]:  # fmt: skip
    """Sources and a validation set drawn from `truth`; returns their configuration entries.

    Args:
        examples: of each source, or of all alike.
        even: sequences are of one length, and every token is a target.
    """
    matrices = transition_matrices(len(truth), seed, concentration)
    sources = []
    for i, count in enumerate(np.broadcast_to(examples, len(truth))):
        rows = draw(matrices, np.full(count, i), length, (seed, 8, i))
        parts = (list(rows),) if even else uneven(rows, (seed, 10, i))
        sources.append({"name": f"s{i}", "path": write_source(folder, f"s{i}", *parts)})
    counts = np.floor(np.asarray(truth) * validation + 0.5).astype(int)
    source_B = np.repeat(np.arange(len(truth)), counts)
    rows = draw(matrices, source_B, length, (seed, 9))
    parts = (list(rows),) if even else uneven(rows, (seed, 11))
    path = write_source(folder, "validation", *parts)
    return sources, [{"name": "validation", "path": path}]


def write_two_sources(
    folder: Path, examples: int = 40, validation: int = 40, **sections: dict
) -> Path:
    """Two sources, a validation set, and x.yaml, a short run on them with `sections`."""
    entries = write_problem(folder / "data", [0.6, 0.4], 0, 17, examples, validation)
    return write_config(folder / "x.yaml", *entries, **sections)
