"""What a user can get wrong: exit code 2 and one line that names it, nothing lost, no traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_scalebio.cli import main
from tests.commands import command, note, noted, start_command, the_only_line, write_config
from tests.distributed.harness import run_distributed
from tests.markov import write_source, write_two_sources
from tests.processes import finish

RARE = 31  # a token that only the source "rare" holds


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources, a validation set, and x.yaml, a short run on them."""
    folder = tmp_path_factory.mktemp("errors")
    write_two_sources(folder, train={"train_iters": 3})
    return folder


# ---- mistakes in flags and files, seen before anything starts --------------------------------


# (flags, words of the answer)
FLAGS: list[tuple[list[str], str]] = [
    (["--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
    (["--lr", "-1"], "--lr: -1.0 must be above 0"),
    (["--lrr", "1"], "unknown argument '--lrr' (did you mean --lr?)"),
    (["--lrr=1"], "unknown argument '--lrr=1' (did you mean --lr?)"),
    (["run.yaml"], "unknown argument 'run.yaml' (did you mean --config run.yaml?)"),
    (["--global-batchsize=8"], "did you mean --global-batch-size?"),
    (
        ["--mixture-optimizer", "sgd"],
        "--mixture-optimizer: 'sgd' is not a choice (choose from 'eg', ",
    ),
    (["--sources", "a"], "'a' is not NAME=PATH"),
    (["--known-weights", "a=much"], "'a=much' is not NAME=WEIGHT"),
    (["--train-iters"], "argument --train-iters: expected one argument"),
    (["--output", ""], "--output: '' is empty (give a value, or leave it out)"),
    (["--hf="], "--hf: '' is empty"),
    (["--sources", "a=HERE/data/s0"], "data.sources: ['a'] is not a mixture (name two"),
    (["--global-batch-size", "7"], "global_batch_size: 7 is not divisible by micro_batch_size 2"),
    (["--tensor-model-parallel-size", "4"], "world size: 1 is not divisible by TP 4 x PP 1"),
    (["--config", "nowhere.yaml"], "nowhere.yaml: No such file or directory (check --config)"),
]


@pytest.mark.parametrize(("flags", "words"), FLAGS)
def test_wrong_flags(
    problem: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    output = problem / "never"
    flags = [flag.replace("HERE", str(problem)) for flag in flags]
    argv = ["reweight", "--config", str(problem / "x.yaml"), "--output", str(output), *flags]
    assert main(argv) == 2
    assert words in the_only_line(capsys.readouterr().err)
    assert not output.exists()


@pytest.mark.parametrize("argv", [["report"], ["report", "here", "there"]])
def test_wrong_commands(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    assert main(argv) == 2
    assert the_only_line(capsys.readouterr().err)


def test_a_second_input_without_its_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "--input", "a.jsonl", "b.jsonl", "--out", "data"]) == 2
    words = "unknown argument 'b.jsonl' (did you mean --input b.jsonl? It is given once for each"
    assert words in the_only_line(capsys.readouterr().err)


def test_report_of_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "nowhere: no such folder" in the_only_line(capsys.readouterr().err)
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no metrics.jsonl" in the_only_line(capsys.readouterr().err)
    (tmp_path / "run.json").write_text("{")
    assert main(["report", str(tmp_path)]) == 2
    assert "run.json:1: not valid JSON" in the_only_line(capsys.readouterr().err)


def test_other_ranks_are_silent(
    problem: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main(["reweight", "--config", str(problem / "x.yaml"), "--lr", "-1"]) == 2
    assert capsys.readouterr().err == ""


# ---- mistakes in the data, seen when it is opened --------------------------------------------


def cut_to(name: str, size: int) -> Callable[[Path], None]:
    return lambda source: (source / name).write_bytes((source / name).read_bytes()[:size])


def described(**fields: Any) -> Callable[[Path], None]:
    def change(source: Path) -> None:
        path = source / "source.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return change


def rewritten(rows: list[Any], masks: list[Any]) -> Callable[[Path], None]:
    def write(source: Path) -> None:
        shutil.rmtree(source)
        write_source(source.parent, source.name, rows, masks)

    return write


ROWS = [np.arange(10)] * 5
OTHER = {
    "type": "none", "model": "other", "vocab_size": 32, "eod": 0, "fingerprint": "other"
}  # fmt: skip
# name: (what happens to source s1, words of the answer)
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, "neither a prepared folder nor a .bin/.idx prefix"),
    "empty folder": (
        lambda source: [path.unlink() for path in source.iterdir()],
        "neither a prepared folder",
    ),
    "no mask": (lambda source: (source / "loss_mask.bin").unlink(), "loss_mask.bin: no such file"),
    "empty bin": (cut_to("tokens.bin", 0), "tokens.bin: truncated: 0 bytes of 1360"),
    "short bin": (cut_to("tokens.bin", 100), "tokens.bin: truncated: 100 bytes of 1360"),
    "short mask": (cut_to("loss_mask.bin", 9), "loss_mask.bin: truncated: 9 bytes of 680"),
    "empty idx": (cut_to("tokens.idx", 0), "tokens.idx: not a whole Megatron index"),
    "short header": (cut_to("tokens.idx", 20), "tokens.idx: not a whole Megatron index"),
    "short idx": (cut_to("tokens.idx", 100), "tokens.idx: not a whole Megatron index"),
    "junk idx": (
        lambda source: (source / "tokens.idx").write_bytes(b"x" * 900),
        "tokens.idx: not a whole Megatron index",
    ),
    "no sequence": (rewritten([], []), "holds no sequence"),
    "empty json": (cut_to("source.json", 0), "source.json: unreadable"),
    "torn json": (cut_to("source.json", 50), "source.json: unreadable"),
    "binary json": (
        lambda source: (source / "source.json").write_bytes(b"\xff\xfe\x00"),
        "source.json: unreadable",
    ),
    "foreign json": (
        lambda source: (source / "source.json").write_text("3"),
        "source.json: is not a JSON object",
    ),
    "no field": (
        lambda source: (source / "source.json").write_text("{}"),
        "source.json: lacks 'fingerprint'",
    ),
    "wrong type": (described(tokens="many"), "source.json: 'tokens' is 'many', not of type int"),
    "half a tokenizer": (described(tokenizer={"model": "m"}), "lacks 'fingerprint'"),
    "other tokenizer": (
        described(tokenizer=OTHER),
        "source 's1' was prepared with tokenizer 'other', 's0' with 'integers'",
    ),
    "other masks": (
        rewritten(ROWS, [np.ones(12)] * 5),
        "tokens and loss_mask differ in their sequences",
    ),
    "too long": (
        rewritten([np.arange(30)], [np.ones(30)]),
        "holds an example of 29 tokens, above seq_length 16",
    ),
    "large ids": (
        rewritten([np.arange(10) + 40], [np.ones(10)]),
        "source 's1' holds token 49, the vocabulary ends at 31",
    ),
}


def wrong_data(folder_name: str) -> None:
    folder = Path(folder_name)
    good = folder / "data" / "s0"
    for name, (happens, _) in DAMAGE.items():
        source = folder / "damaged" / name / "s1"
        shutil.copytree(folder / "data" / "s1", source)
        happens(source)
        note(folder / "noted", name, reweight(folder, "--sources", f"s0={good}", f"s1={source}"))
    afile = folder / "afile"
    afile.write_text("in the way")
    for name, flags in {
        "vocabulary": ["--vocab-size", 20],
        "output is a file": ["--output", afile],
        "output below a file": ["--output", afile / "run"],
        "save below a file": ["--save", afile / "checkpoints"],
        "tensorboard below a file": ["--tensorboard-dir", afile / "events"],
        "nothing to load": ["--load", folder / "nothing"],
        "nothing pretrained": ["--pretrained-checkpoint", folder / "nothing"],
        "transformer engine": ["--transformer-impl", "transformer_engine"],
        "too large": ["--hidden-size", 10**12, "--output", folder / "too large"],
    }.items():
        note(folder / "noted", name, reweight(folder, *flags))


def reweight(folder: Path, *flags: object) -> tuple[int | None, str]:
    output = [] if "--output" in flags else ["--output", folder / "out"]
    return command("reweight", "--config", folder / "x.yaml", *output, *flags)


@pytest.fixture(scope="module")
def noted_on_wrong_data(problem: Path) -> Path:
    run_distributed(wrong_data, 1, str(problem))
    return problem / "noted"


@pytest.mark.distributed
@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_sources(noted_on_wrong_data: Path, name: str) -> None:
    code, said = noted(noted_on_wrong_data, name)
    assert code == 2, said
    line = the_only_line(said)
    assert DAMAGE[name][1] in line
    assert "s1" in line and line.endswith(")"), "names the source and a fix"


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vocabulary", "model.vocab_size: 20 is below the tokenizer's 32 tokens"),
        ("output is a file", "afile: is a file, and a folder is to be made there"),
        ("output below a file", "afile/run: can't write: Not a directory"),
        ("save below a file", "afile/checkpoints: can't write: Not a directory"),
        ("tensorboard below a file", "can't write: Not a directory"),
        ("nothing to load", "nothing: no checkpoint here"),
        ("nothing pretrained", "nothing: not a Megatron checkpoint"),
        ("too large", "ran out of memory in "),
        ("transformer engine", "model.transformer_impl: 'transformer_engine' needs CUDA"),
    ],
)
def test_wrong_places(noted_on_wrong_data: Path, name: str, words: str) -> None:
    code, said = noted(noted_on_wrong_data, name)
    assert code == 2 and words in the_only_line(said), said


# ---- losses that are not finite --------------------------------------------------------------


def not_finite(folder_name: str) -> None:
    """A checkpoint with an infinite embedding of one token, and an absurd learning rate."""
    folder = Path(folder_name)
    rows = list(np.random.default_rng(0).integers(0, RARE - 1, size=(40, 17)))
    rare = [np.full(17, RARE)] * 40
    sources = [
        {"name": name, "path": write_source(folder / "finite", name, content)}
        for name, content in (("plain", rows), ("rare", rare))
    ]
    validation = [{"name": "v", "path": write_source(folder / "finite", "v", rows)}]
    path = write_config(
        folder / "rare.yaml", sources, validation,
        model={"untie_embeddings_and_output_weights": True}, checkpoint={"save_interval": 1},
    )  # fmt: skip
    spoil(path, folder / "spoilt")
    spoilt = ["--pretrained-checkpoint", folder / "spoilt"]
    for name, flags in {
        "spoilt": [*spoilt, "--skip-limit", 3],
        "all skipped": [*spoilt, "--train-iters", 2],
        "validation": [*spoilt, "--skip-limit", 1, "--validation", f"bad={sources[1]['path']}",
                       "--sources", f"a={sources[0]['path']}", f"b={sources[0]['path']}"],
        "absurd rate": ["--lr", 1e30, "--skip-limit", 2],
    }.items():  # fmt: skip
        output = folder / name
        outcome = command("reweight", "--config", path, "--output", output, *flags)
        note(folder / "noted", name, outcome)


def spoil(config_path: Path, save_to: Path) -> None:
    import torch

    from megatron_scalebio import runtime
    from megatron_scalebio.checkpoint import saver
    from megatron_scalebio.config_loader import load_config
    from megatron_scalebio.methods.scalebio import TrainState

    config = load_config(str(config_path))
    runtime.start(config)
    state = TrainState(config, save_to / "cache")
    embedding: Any = state.training.w[0].embedding
    with torch.no_grad():
        embedding.word_embeddings.weight[RARE] = float("inf")
    saver.save(state, save_to)
    runtime.stop_model_parallel()


@pytest.fixture(scope="module")
def unfinished(problem: Path) -> Path:
    run_distributed(not_finite, 1, str(problem))
    return problem


def last_line(said: str) -> str:
    return said.strip().splitlines()[-1]


@pytest.mark.distributed
def test_source_that_spoils_the_loss_is_named_and_ends_the_run(unfinished: Path) -> None:
    code, said = noted(unfinished / "noted", "spoilt")
    assert code == 2, said
    assert "Traceback" not in said
    assert "step 3: 3 steps in a row were not applied: u: loss of source 'rare' is nan" in said
    assert "the last checkpoint is kept" in last_line(said)
    records = [json.loads(line) for line in (unfinished / "spoilt" / "metrics.jsonl").open()]
    assert [record["skipped"] for record in records] == ["u: loss of source 'rare' is nan"] * 3
    assert all(record["weights"] == [0.5, 0.5] for record in records), "no step was applied"
    assert not list((unfinished / "spoilt" / "checkpoints").glob("iter_*")), "nor saved"


@pytest.mark.distributed
def test_a_run_without_one_finite_step_is_no_result(unfinished: Path) -> None:
    code, said = noted(unfinished / "noted", "all skipped")
    assert code == 2 and "2 steps in a row were not applied" in last_line(said), said
    assert not (unfinished / "all skipped" / "weights.json").exists()


@pytest.mark.distributed
def test_validation_set_that_spoils_the_loss_is_named(unfinished: Path) -> None:
    code, said = noted(unfinished / "noted", "validation")
    assert code == 2 and "w: loss of validation set 'bad' is nan" in last_line(said), said


@pytest.mark.distributed
def test_absurd_learning_rate_ends_the_run_and_keeps_the_last_checkpoint(unfinished: Path) -> None:
    code, said = noted(unfinished / "noted", "absurd rate")
    assert code == 2 and "2 steps in a row were not applied" in last_line(said), said
    run = unfinished / "absurd rate"
    records = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    applied = [record["step"] for record in records if record["skipped"] is None]
    kept = int((run / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())
    assert kept == max(applied) == len(records) - 2


# ---- the real command, and two ranks ---------------------------------------------------------


@pytest.mark.distributed
def test_the_real_command_says_one_line(problem: Path) -> None:
    flags = ["--config", problem / "x.yaml", "--sources", "a=nowhere/a", "b=nowhere/b"]
    process = start_command("reweight", *flags, "--output", problem / "never")
    said, complained = finish(process)
    assert process.returncode == 2
    assert "nowhere/a: is neither" in the_only_line(complained)
    assert said == ""


@pytest.mark.distributed
def test_torchruns_last_words_have_the_line_too(problem: Path) -> None:
    process = start_command("reweight", "--config", problem / "x.yaml", "--lr", -1, ranks=2)
    _, complained = finish(process)
    assert process.returncode == 1
    after = complained.rpartition("ChildFailedError")[2]
    assert "megatron-scalebio: error: --lr: -1.0 must be above 0" in after


def two_ranks(folder_name: str) -> None:
    folder = Path(folder_name)
    nowhere = ["--sources", "a=nowhere/a", "b=nowhere/b"]
    note(folder / "noted", "two: no source", reweight(folder, *nowhere))
    note(folder / "noted", "two: output", reweight(folder, "--output", folder / "x.yaml" / "run"))
    note(folder / "noted", "two: full log", log_on_a_full_disk(folder))


def log_on_a_full_disk(folder: Path) -> tuple[int | None, str]:
    """/dev/full takes no byte: the log of rank 0 fails in the first step."""
    from megatron_scalebio.logs.metrics import MetricsLog

    opened = MetricsLog.__init__

    def opened_on_a_full_disk(self: Any, *args: Any, **options: Any) -> None:
        opened(self, *args, **options)
        self._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115

    MetricsLog.__init__ = opened_on_a_full_disk  # type: ignore[method-assign]
    return reweight(folder, "--output", folder / "full log")


@pytest.mark.distributed
def test_two_ranks_end_together(problem: Path) -> None:
    run_distributed(two_ranks, 2, str(problem))
    for name, words in (
        ("two: no source", "nowhere/a: is neither"),
        ("two: output", "x.yaml/run: can't write: Not a directory"),
        ("two: full log", "metrics.jsonl: can't write: No space left on device"),
    ):
        code, said = noted(problem / "noted", name)
        assert code == 2 and words in last_line(said) and "Traceback" not in said, said
        assert noted(problem / "noted", name, rank=1) == (2, "")


@pytest.mark.distributed
@pytest.mark.slow
def test_torchrun_with_a_world_that_does_not_divide(problem: Path) -> None:
    flags = ["--config", problem / "x.yaml", "--tensor-model-parallel-size", 4]
    process = start_command("reweight", *flags, "--output", problem / "never", ranks=2)
    _, complained = finish(process, 180)
    assert process.returncode != 0
    ours = [line for line in complained.splitlines() if line.startswith("megatron-scalebio")]
    assert len(ours) == 1, complained
    assert "world size: 2 is not divisible by TP 4 x PP 1" in ours[0]
    assert "exitcode  : 2" in complained, complained
