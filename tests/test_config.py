"""The configuration: defaults < file < flags, round trip, and what is refused by name."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import get_args

import pytest
import yaml

from megatron_scalebio.cli import main
from megatron_scalebio.config import Config, LisaConfig
from megatron_scalebio.config.baseline import Method
from megatron_scalebio.config_loader import (
    add_arguments,
    config_from_args,
    config_text,
    load_config,
)
from megatron_scalebio.core.options import LisaOptions
from megatron_scalebio.errors import UserError

DATA = {
    "sources": [{"name": "a", "path": "x/a"}, {"name": "b", "path": "x/b"}],
    "validation": [{"name": "v", "path": "x/v"}],
}


def from_flags(*words: str) -> Config:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return config_from_args(parser.parse_args(words))


def written(tmp_path: Path, tree: object) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
    return str(path)


def test_flags_go_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    path = written(tmp_path, {"train": {"seed": 5, "train_iters": 7}, "optimizer": {"lr": "1e-4"}})
    config = from_flags("--config", path, "--train-iters", "9", "--bf16", "--no-swiglu")
    assert (config.train.seed, config.train.train_iters) == (5, 9)
    assert config.optimizer.lr == 1e-4
    assert config.parallel.bf16 and not config.model.swiglu
    assert config.train.global_batch_size == Config().train.global_batch_size


def test_named_paths_on_the_command_line() -> None:
    config = from_flags(
        "--sources", "a=x/a", "b=y=z", "--validation", "v=w", "--known-weights", "a=0.25", "b=0.75"
    )
    assert [(s.name, s.path) for s in config.data.sources] == [("a", "x/a"), ("b", "y=z")]
    assert config.data.known_weights == {"a": 0.25, "b": 0.75}


@pytest.mark.parametrize("word", ["7,0", "(7,0)"])
def test_a_window_is_given_as_megatron_takes_it(tmp_path: Path, word: str) -> None:
    config = from_flags("--window-size", word)
    assert config.model.window_size == [7, 0]
    assert load_config(written(tmp_path, f"model: {{window_size: '{word}'}}")) == config
    assert load_config(written(tmp_path, config_text(config))) == config
    with pytest.raises(
        UserError, match=r"^--window-size: 9 is one number; .* \(write 8,0, in YAML"
    ):
        from_flags("--window-size", "9")


@pytest.mark.parametrize("every", [1, 0, -2])
def test_full_attention_in_every_layer_is_no_window(every: int) -> None:
    model = {"window_size": [7, 0], "window_attn_skip_freq": every}
    with pytest.raises(UserError, match=rf"window_attn_skip_freq: {every} needs .* two or more"):
        load_config(None, {"model": model})
    load_config(None, {"model": {**model, "window_attn_skip_freq": 2}})


def test_resolved_configuration_reads_back_unchanged(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, {"data": DATA, "lisa": {"lisa_layers": 2}}))
    again = load_config(written(tmp_path, config_text(config)))
    assert again == config
    assert again.optimizer.min_lr == again.optimizer.lr / 10


def test_every_option_has_a_flag_of_its_own_and_help() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert "--tensor-model-parallel-size" in parser.format_help()
    assert all(action.help for action in parser._actions)


# (section, field, value, words of the answer)
REFUSED = [
    ("optimizer", "lr", -1e-3, "lr: -0.001 must be above 0"),
    ("optimizer", "lr", 0, "lr: 0.0 must be above 0"),
    ("optimizer", "lr", float("nan"), "lr: nan must be above 0"),
    ("optimizer", "lr", float("inf"), "lr: inf must be finite"),
    ("optimizer", "lr_u", 0, "lr_u: 0.0 must be above 0"),
    ("optimizer", "lr", "fast", "'fast' is not of type float"),
    ("optimizer", "lr", True, "True is not of type float"),
    ("optimizer", "min_lr", 1.0, "min_lr: 1.0 is above lr"),
    ("optimizer", "adam_beta1", 1.0, "adam_beta1: 1.0 is outside [0, 1)"),
    ("optimizer", "lrr", 1.0, "unknown key 'lrr' (did you mean lr?)"),
    ("optimizer", "lr_decay_style", "cosin", "choose from cosine, linear, constant"),
    ("bilevel", "lr_lambda", -1, "lr_lambda: -1.0 must be above 0"),
    ("bilevel", "alpha", 0, "alpha: 0.0 must be above 0"),
    ("bilevel", "floor_share", 0, "floor_share: 0.0 is outside (0, 1]"),
    ("bilevel", "average_fraction", 1.1, "average_fraction: 1.1 is outside (0, 1]"),
    ("bilevel", "memory_growth", 1.1, "memory_growth: 1.1 is outside [0, 1]"),
    ("bilevel", "blend_floor", 0.5, "blend_floor: 0.5 is outside [0, 0.5)"),
    ("bilevel", "confidence", 0.93, "confidence: 0.93 has no critical value"),
    ("bilevel", "resync_interval", 1, "resync_interval: 1 leaves u no step"),
    ("train", "train_iters", 1.5, "1.5 is not of type int"),
    ("train", "train_iters", 0, "train_iters: 0 must be above 0"),
    ("train", "seed", 2**40, "seed: 1099511627776 does not fit"),
    ("train", "output", None, "None is not of type str"),
    ("train", "output", "", "train.output: '' is empty (give text, or leave it out)"),
    ("train", "global_batchsize", 8, "did you mean global_batch_size?"),
    ("model", "hidden_size", 30, "hidden_size: 30 is not divisible by num_attention_heads 4"),
    ("model", "num_query_groups", 3, "num_query_groups: 3 does not divide"),
    ("model", "kv_channels", 7, "kv_channels: 7 makes rope turn 7 channels"),
    ("model", "rotary_percent", 0, "rotary_percent: 0.0 is outside (0, 1]"),
    ("model", "hidden_dropout", 1, "hidden_dropout: 1.0 is outside [0, 1)"),
    ("parallel", "sequence_parallel", True, "sequence_parallel: True needs tensor parallelism"),
    ("parallel", "num_layers_per_virtual_pipeline_stage", 1, "needs pipeline parallelism"),
    ("parallel", "fp8_format", "hybrid", "fp8_format: 'hybrid' needs bf16"),
    ("parallel", "fp4_format", "e2m1", "fp4_format: 'e2m1' needs bf16"),
    ("parallel", "overlap_param_gather", True, "needs overlap_grad_reduce and"),
    ("parallel", "fp8_param_gather", True, "fp8_param_gather: True is refused"),
    ("model", "no_rope_freq", [1, 0], "no_rope_freq: [1, 0] must have a 1 or a 0 for each"),
    ("model", "window_attn_skip_freq", 2, "window_attn_skip_freq: 2 needs a window_size"),
    ("model", "window_size", 4096, "window_size: 4096 is one number; Megatron's form is two, "
     "neither of which counts the position itself (write 4095,0, in YAML [4095, 0])"),
    ("model", "window_size", [7, 1], "window_size: [7, 1] sees positions after a token, which the "
     "model predicts (write 7,0, in YAML [7, 0])"),
    ("model", "window_size", [-1, 0], "window_size: [-1, 0] must be how many positions one sees"),
    ("model", "window_size", [7, 0, 0], "window_size: [7, 0, 0] must be how many positions"),
    ("model", "window_size", "7", "window_size: 7 is one number; Megatron's form is two, "),
    ("model", "window_size", "7;0", "window_size: '7;0' is not N,N (write [a, b])"),
    ("model", "window_size", [7.5, 0], "model.window_size[0]: 7.5 is not of type int"),
    ("model", "rope_scaling", {"rope_type": "ntk", "factor": 2}, "choose from llama3, linear"),
    ("model", "rope_scaling", {"rope_type": "yarn"}, "factor is missing"),
    ("model", "rope_scaling", {"factor": 2}, "model.rope_scaling: rope_type is missing"),
    ("model", "rope_scaling", {"rope_type": "yarn", "factor": 2, "beta_fast": 0.5},
     "rope_scaling.beta_fast: 0.5 is below beta_slow 1.0"),
    ("model", "rope_scaling", {"rope_type": "linear", "factor": 2, "beta_fast": 16},
     "rope_scaling.beta_fast: 16.0 is not used by linear scaling"),
    ("model", "rope_scaling", {"rope_type": "yarn", "factor": 2, "attention_factor": 0},
     "rope_scaling.attention_factor: 0.0 must be above 0"),
    ("model", "rope_scaling", {"rope_type": "longrope", "factor": 2, "short_factor": [1, 0]},
     "rope_scaling.short_factor: [1.0, 0.0] is not a list of numbers above 0"),
    ("model", "rope_scaling", {"rope_type": "longrope", "factor": 2, "long_factor": [2] * 16,
                               "short_factor": [1] * 15},
     "rope_scaling.short_factor: [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, "
     "1.0, 1.0] has 15 numbers for 16 frequencies"),
    ("lisa", "lisa_layers", -2, "lisa_layers: -2 must be above 0"),
    ("checkpoint", "keep_last", 0, "keep_last: 0 must be above 0"),
    ("data", "seq_length", 0, "seq_length: 0 must be above 0"),
    ("model", "hf", True, "model.hf: True is not of type str (give text in quotes)"),
    ("data", "sources", "abc", "'abc' is not a list of names and paths (write [{name"),
    ("data", "sources", [{"name": "a"}], "data.sources[0]: path is missing"),
    ("data", "sources", [{"name": "a", "path": "p", "initial_weight": -1}],
     "data.sources[0].initial_weight: -1.0 must be above 0"),
    ("data", "sources", [{"name": "a", "path": "p", "min_weight": 0.5, "max_weight": 0.4}],
     "data.sources[0].min_weight: 0.5 is above max_weight 0.4"),
    ("data", "sources", [{"name": "a", "path": "p", "max_weight": 1.5}],
     "data.sources[0].max_weight: 1.5 is above 1"),
    ("data", "sources", [{"name": "a", "path": "p", "max_weight": 0}],
     "data.sources[0].max_weight: 0.0 must be above 0"),
    ("data", "sources", [{"name": "a", "path": "p", "max_weight": 0.5, "fixed_weight": 0.5}],
     "data.sources[0].max_weight: 0.5 and fixed_weight exclude each other"),
    ("data", "sources", [{"name": n, "path": "p", "min_weight": 0.6} for n in "ab"],
     "data.sources: their min_weight and fixed_weight add up to 1.2"),
    ("data", "sources", [{"name": n, "path": "p", "max_weight": 0.4} for n in "ab"],
     "data.sources: their max_weight and fixed_weight add up to 0.8"),
    ("data", "sources", [{"name": n, "path": "p", "fixed_weight": 0.5} for n in "ab"],
     "data.sources: 0 of them have no fixed_weight: nothing is left to learn"),
    ("data", "sources", [{"name": n, "path": "p", **of} for n, of in (
        ("a", {"fixed_weight": 0.6}), ("b", {"min_weight": 0.4}), ("c", {}), ("d", {}))],
     "data.sources: their min_weight and fixed_weight add up to 1: nothing is left to learn"),
    ("bilevel", "group_sources", 1, "bilevel.group_sources: 1 is all sources in one group"),
    ("data", "sources", [{"name": n, "path": "p", "max_weight": 0.1} for n in "abcdefghij"],
     "data.sources: their max_weight and fixed_weight add up to 1: nothing is left to learn"),
    ("data", "new_share", 0.1, "data.new_share: needs the weights of a former run"),
    ("data", "keep_ratios", True, "data.keep_ratios: needs the weights of a former run"),
    ("data", "target_tokens", "20Q", "data.target_tokens: '20Q' is not of type float (give a num"),
    ("data", "matched_repetition", True, "data.matched_repetition: True needs the size of the f"),
    ("data", "target_tokens", 0, "data.target_tokens: 0.0 must be above 0"),
    ("data", "max_epochs", -1, "data.max_epochs: -1.0 must be above 0"),
    ("bilevel", "kl_to_prior", -1, "bilevel.kl_to_prior: -1.0 must be at least 0"),
    ("data", "sources", [{"name": "a b", "path": "p"}], "data.sources: 'a b' cannot name a source"),
    ("data", "validation", [{"name": "../v", "path": "p"}], "data.validation: '../v' cannot name"),
    ("data", "sources", 2 * [{"name": "a", "path": "p"}], "data.sources: 'a' names two entries"),
    ("data", "known_weights", {"z": 1}, "data.known_weights: 'z' is not a source"),
]  # fmt: skip


def test_the_core_is_given_every_option_of_lisa() -> None:
    assert LisaConfig(3, 7, False, True, False).options() == LisaOptions(3, 7, False, True, False)
    assert LisaConfig(2, 5, True, False, True).options() == LisaOptions(2, 5, True, False, True)
    assert LisaConfig().options() is None


@pytest.mark.parametrize(("section", "field", "value", "words"), REFUSED)
def test_refused_by_file_section_field_and_value(
    tmp_path: Path, section: str, field: str, value: object, words: str
) -> None:
    path = written(tmp_path, {section: {field: value}})
    with pytest.raises(UserError) as refusal:
        load_config(path)
    said = str(refusal.value)
    assert words in said and said.startswith(f"{path}: {section}"), said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("trian: {}", "unknown key 'trian' (did you mean train?)"),
        ("train: 3", "3 is not a mapping"),
        ("- train", "holds no sections (begin with one of data"),
        ("train: {seed: 1", "(is the bracket that line 1 opens closed?)"),
        ("a: 1\ntrain: [1, 2\nlisa: 3\n", "(is the bracket that line 2 opens closed?)"),
        ("train: 'x\n", "(is the quote that line 1 opens closed?)"),
        ("train:\n seed: 1\n  lr: 2", ":3: not valid YAML: mapping values"),
        ("train:\n seed: 1\n  lr: 2", "(check its indentation"),
        ("methods: [doge]", "is the file of a comparison (megatron-scalebio compare takes it;"),
        ("train: !!python/object/apply:os.getcwd []", "not valid YAML"),
        ("\x00", "not valid YAML"),
        (
            "train: {seed: 1}\ntrain: {seed: 2}",
            ":2: not valid YAML: 'train' stands twice (keep one",
        ),
        ("a: &a {b: 1}\nc: {<<: *a, b: 2, b: 3}", ":2: not valid YAML: 'b' stands twice"),
    ],
)
def test_malformed_files_are_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UserError) as refusal:
        load_config(written(tmp_path, text))
    assert words in str(refusal.value) and "run.yaml" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_help_tells_every_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["compare", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert all(method in told for method in (*get_args(Method), "paper", "rho_loss_offline"))
    parser = argparse.ArgumentParser(
        formatter_class=partial(argparse.HelpFormatter, width=500, max_help_position=120)
    )
    add_arguments(parser)
    lines = [line for line in parser.format_help().splitlines() if line.startswith("  --")]
    for flag, end in (
        ("--lr", "model (w) [0.0003]"), ("--seed", "random [1234]"), ("--bf16,", "[off]"),
        ("--swiglu,", "[on]"), ("--lr-u", "model (u) [lr]"), ("--load", "no checkpoint yet"),
        ("--output", "[run]"), ("--method", "finds the weights [scalebio]"),
    ):  # fmt: skip
        [line] = [line for line in lines if line.split()[0] == flag]
        assert line.endswith(end), line


def test_empty_file_is_called_empty(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is empty"):
        load_config(written(tmp_path, ""))
    assert load_config(None) == Config()


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        load_config(str(tmp_path / "nowhere.yaml"))


def test_the_model_may_be_in_a_file_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "small.yaml").write_text("model: {num_layers: 6, hidden_size: 96}")
    model = {"file": "models/small.yaml", "hidden_size": 80}
    path = written(tmp_path, {"model": model})
    found = from_flags("--config", path, "--num-attention-heads", "8").model
    assert (found.num_layers, found.hidden_size, found.num_attention_heads) == (6, 80, 8)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "model.file: 'models/small.yaml': {}/models/small.yaml is not a file (name a YAML"),
        ("train: {}", "unknown key 'train' (known: model)"),
        ("model: {file: other.yaml}", "needs a section `model` of plain options"),
        ("model: {num_layer: 6}", "unknown key 'num_layer' (did you mean num_layers?)"),
    ],
)
def test_a_file_that_is_no_models_is_refused(
    tmp_path: Path, content: str | None, words: str
) -> None:
    (tmp_path / "models").mkdir()
    if content is not None:
        (tmp_path / "models" / "small.yaml").write_text(content)
    path = written(tmp_path, {"model": {"file": "models/small.yaml"}})
    with pytest.raises(UserError) as refusal:
        load_config(path)
    assert words.format(tmp_path) in str(refusal.value)


def test_preset_lies_between_defaults_and_what_is_given(tmp_path: Path) -> None:
    paper = from_flags("--preset", "paper")
    assert (paper.bilevel.mixture_optimizer, paper.bilevel.alpha) == ("adamw", 100.0)
    assert paper.bilevel.resync_interval is None
    assert (paper.lisa.lisa_layers, paper.lisa.lisa_interval) == (4, 20)
    assert paper.train.train_epochs == 1
    path = written(tmp_path, {"bilevel": {"preset": "paper", "alpha": 7}})
    mine = from_flags("--config", path, "--lisa-layers", "2", "--train-iters", "9")
    assert (mine.bilevel.alpha, mine.lisa.lisa_layers, mine.lisa.lisa_interval) == (7, 2, 20)
    assert (mine.train.train_iters, mine.train.train_epochs) == (9, None)
    assert load_config(written(tmp_path, config_text(mine))) == mine
    with pytest.raises(UserError, match=r"preset: 'papr' is not a choice"):
        load_config(None, {"bilevel": {"preset": "papr"}})


def test_epochs_become_steps() -> None:
    config = from_flags("--train-epochs", "1.5", "--global-batch-size", "32")
    config.train.resolve_epochs(100)
    assert (config.train.train_iters, config.train.train_epochs) == (5, None)


@pytest.mark.parametrize(
    ("given", "number"),
    [("20B", 2e10), ("1.5T", 1.5e12), ("300k", 3e5), (64000, 64e3)],
)
def test_quantities_are_read_as_people_write_them(given: object, number: float) -> None:
    config = load_config(None, {"data": {"target_tokens": given}})
    assert config.data.target_tokens == number
    assert from_flags("--target-tokens", str(given)) == config


def test_the_two_targets_exclude_each_other() -> None:
    with pytest.raises(UserError, match="target_examples: 10 and target_tokens exclude each other"):
        load_config(None, {"data": {"target_tokens": 9, "target_examples": 10}})


def test_a_limit_of_epochs_needs_a_length() -> None:
    with pytest.raises(UserError, match="max_epochs: 2 needs the length of the final training"):
        load_config(None, {"data": {"max_epochs": 2}})
    data = [load_config(None, {"data": given}).data for given in (
        {}, {"target_tokens": 9}, {"target_tokens": 9, "max_epochs": 2})]  # fmt: skip
    assert [each.most_epochs for each in data] == [4, 4, 2]


def test_a_fixed_weight_is_both_bounds() -> None:
    sources = [
        {**DATA["sources"][0], "fixed_weight": 0.25}, DATA["sources"][1],
        {"name": "c", "path": "x", "min_weight": 0.1, "max_weight": 0.2},
    ]  # fmt: skip
    found = load_config(None, {"data": {**DATA, "sources": sources}}).data.sources
    assert [(s.low, s.high) for s in found] == [(0.25, 0.25), (0.0, 1.0), (0.1, 0.2)]
