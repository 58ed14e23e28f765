"""Two prepared sources, and samples drawn of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_scalebio.data.prepare import PrepareConfig, SourceInput, prepare
from megatron_scalebio.sample.config import SampleConfig, WeightedSource
from megatron_scalebio.sample.stage import sample


def alpaca(kind: str, count: int) -> list[dict[str, Any]]:
    return [
        {"instruction": f"{kind} question {k}", "input": "", "output": f"answer {k}", "id": k}
        for k in range(count)
    ]


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


class World:
    """Two prepared sources of 40 and 10 rows, and what else the tests need."""

    def __init__(self, root: Path, tokenizer: Path) -> None:
        self.root, self.tokenizer = root, tokenizer
        self.big = write(root / "big.jsonl", alpaca("big", 40))
        self.small = root / "small.json"
        self.small.write_text(json.dumps(alpaca("small", 10)))
        self.prepare(big=self.big, small=self.small)

    def prepare(self, **files: Path) -> None:
        sources = tuple(SourceInput(name, (path,)) for name, path in files.items())
        prepare(PrepareConfig(self.root / "data", sources, str(self.tokenizer), seq_length=64))

    def source(self, name: str, weight: float = 0.5) -> WeightedSource:
        return WeightedSource(name, str(self.root / "data" / name / "tokens"), weight)

    def sample(self, out: str, *sources: WeightedSource, **options: Any) -> list[dict[str, Any]]:
        sources = sources or (self.source("big", 0.2), self.source("small", 0.8))
        if "per_source" not in options:
            options = {"num_samples": 20, **options}
        return sample(SampleConfig(self.root / out, sources, **options))
