"""What `evaluate` makes of its options before it loads Megatron."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from megatron_scalebio.commands import evaluate
from tests.markov import write_source

MODEL = "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --vocab-size 32 --load load"


@pytest.fixture(autouse=True)
def sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, length in (("short", 64), ("long", 96)):
        told = Path(write_source(tmp_path, name, [[1, 2, 3]])) / "source.json"
        told.write_text(json.dumps({**json.loads(told.read_text()), "seq_length": length}))
    write_source(tmp_path, "unknown", [[1, 2, 3]])
    (tmp_path / "load").mkdir()
    (tmp_path / "load" / "metadata.json").touch()
    (tmp_path / "run.yaml").write_text("data: {seq_length: 80}")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("words", "length"),
    [
        ("--test a=short", 64),
        ("--test a=short b=long", 96),
        ("--test a=short --validation b=long", 96),
        ("--test a=unknown b=unknown/tokens", 1024),
        ("--test a=short --seq-length 128", 128),
        ("--test a=short --config run.yaml", 80),
    ],
)
def test_sequences_are_as_long_as_the_sets_were_prepared(words: str, length: int) -> None:
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    config = evaluate._run_config(parser.parse_args([*words.split(), *MODEL.split()]))
    assert config.data.seq_length == length


def test_the_model_is_that_of_the_run_that_the_checkpoint_lies_in() -> None:
    Path("config.yaml").write_text("model: {num_layers: 3, hidden_size: 48}\ntrain: {seed: 7}")
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    words = ["--test", "a=short", "--load", "load"]
    config = evaluate._run_config(parser.parse_args([*words, "--num-attention-heads", "4"]))
    assert config.model.num_layers != 3, "where options tell of a model it is theirs"
    config = evaluate._run_config(parser.parse_args(words))
    assert (config.model.num_layers, config.model.hidden_size) == (3, 48)
    assert config.train.seed == 1234, "and nothing else of the run"
    Path("load/config.yaml").write_text("model: {num_layers: 5, hidden_size: 32}")
    config = evaluate._run_config(parser.parse_args(words))
    assert (config.model.num_layers, config.model.hidden_size) == (5, 32), "the nearest one"
