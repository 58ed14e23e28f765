"""A run that goes on from another's weights with one more source: junk changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.commands import command, note, noted, write_config
from tests.distributed.harness import run_distributed
from tests.markov import write_problem

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def on_one_rank(folder_name: str) -> None:
    import torch.distributed as dist

    folder = Path(folder_name)
    dist.init_process_group("gloo")
    sources, validation = json.loads((folder / "problem.json").read_text())
    sections: dict[str, Any] = {
        "data": {"seq_length": 32},
        "model": {"num_layers": 1, "num_attention_heads": 2, "ffn_hidden_size": 128},
        "optimizer": {"lr": 5e-3},
        "train": {"train_iters": 240, "global_batch_size": 16, "micro_batch_size": 16},
        "checkpoint": {"save_interval": 0},
    }

    def run(name: str, count: int, *words: object) -> None:
        path = folder / f"{name}.yaml"
        config = write_config(path, sources[:count], validation, **sections)
        argv = ("reweight", "--config", config, "--output", folder / name, *words)
        note(folder / "noted", name, command(*argv))

    run("former", 2)
    run("with junk", 3, "--weights", folder / "former", "--new-share", 0.1)
    dist.destroy_process_group()


def test_junk_leaves_the_others_ratios_within_their_intervals(tmp_path: Path) -> None:
    problem = write_problem(tmp_path / "data", [0.65, 0.35, 0.0], 0)
    (tmp_path / "problem.json").write_text(json.dumps(problem))
    run_distributed(on_one_rank, 1, str(tmp_path))
    found = {}
    for name in ("former", "with junk"):
        code, said = noted(tmp_path / "noted", name)
        assert code == 0, said
        found[name] = json.loads((tmp_path / name / "weights.json").read_text())["sources"]
    first, second, junk = found["with junk"]
    assert junk["initial_weight"] == pytest.approx(0.1) and junk["weight"] < 0.03
    for before, now in zip(found["former"], (first, second), strict=True):
        assert before["ci_high"] - before["ci_low"] < 0.4
        share = now["weight"] / (1 - junk["weight"])
        assert before["ci_low"] <= share <= before["ci_high"], before["name"]
