"""A conversion holds a few tensors in memory, however many the model has."""

from __future__ import annotations

import multiprocessing
import resource
from pathlib import Path

import pytest

from tests.convert.models import content, make

LARGE = {
    "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 24, "vocab_size": 8000,
    "num_attention_heads": 8, "num_key_value_heads": 8,
}  # fmt: skip


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def growth(folder: Path) -> list[float]:
    """MiB by which each direction raises this process's peak, once all code is loaded."""
    from megatron_scalebio.convert.exporter import export_checkpoint
    from megatron_scalebio.convert.importer import import_checkpoint

    peaks = []
    for size in ("small", "large"):
        hf = folder / size
        import_checkpoint(hf, folder / f"{size}-megatron")
        peaks.append(peak_mib())
        export_checkpoint(folder / f"{size}-megatron", hf, folder / f"{size}-back")
        peaks.append(peak_mib())
    return [peaks[2] - peaks[1], peaks[3] - peaks[1]]


@pytest.mark.slow
def test_peak_does_not_grow_with_the_model(tmp_path: Path) -> None:
    make(tmp_path / "small", "llama")
    make(tmp_path / "large", "llama", shards="100MB", **LARGE)
    megabytes = sum(path.stat().st_size for path in (tmp_path / "large").iterdir()) / 1e6
    assert megabytes > 400
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        importing, exporting = pool.apply(growth, (tmp_path,))
    assert importing < 80 and exporting < 80, (importing, exporting)
    assert content(tmp_path / "large-back") == content(tmp_path / "large")
