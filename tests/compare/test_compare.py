"""`compare`: a real comparison from raw files, continued, extended and read back."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from rich.console import Console

from megatron_scalebio.cli import main
from megatron_scalebio.commands.compare import run_stage
from megatron_scalebio.compare.config import load
from megatron_scalebio.compare.results import spread, table, write
from megatron_scalebio.compare.stages import Plan, Stage
from tests.commands import ROOT, start_command, the_only_line
from tests.processes import finish

pytestmark = pytest.mark.slow
ALLOCATION = {"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}
TEXT = (ROOT / "docs" / "experiments.md").read_text().split()


def rows(kind: str, count: int, offset: int) -> str:
    """Instructions whose answers are words of a text that all have."""
    records = []
    for number in range(count):
        start = (offset + 7 * number) % (len(TEXT) - 8)
        answer = " ".join(TEXT[start : start + 8]) if kind == "text" else "x " * 8
        records.append({"instruction": f"{kind} {offset} {number}?", "output": answer})
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    for name, kind, count, offset in (
        ("good", "text", 60, 0), ("junk", "junk", 60, 1), ("goal", "text", 20, 500),
    ):  # fmt: skip
        (folder / f"{name}.jsonl").write_text(rows(kind, count, offset))
    # Two rows of the test set are in a source: they must not be trained on.
    good = (folder / "good.jsonl").read_text().splitlines(keepends=True)
    (folder / "test.jsonl").write_text("".join(good[:2]) + rows("text", 18, 900))
    (folder / "compare.yaml").write_text(yaml.safe_dump(content(folder)))
    return folder


def content(folder: Path) -> dict[str, Any]:
    return {
        "tokenizer": str(ROOT / "tokenizers" / "english-code-1k.model"),
        "sources": {name: str(folder / f"{name}.jsonl") for name in ("good", "junk")},
        "validation": {"goal": str(folder / "goal.jsonl")},
        "test": {"test": str(folder / "test.jsonl")},
        "methods": ["uniform"],
        "seeds": [5],
        "per_source": 50,
        "run": {
            "data": {"seq_length": 32},
            "model": {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 2},
            "train": {"train_iters": 3, "global_batch_size": 8},
        },
        "output": str(folder / "out"),
    }


@pytest.fixture(scope="module")
def compared(folder: Path) -> Path:
    """The comparison with one method, and then with a second one added.

    Both are started as by a script of sbatch, in an allocation of two tasks.
    """
    for methods in (["uniform"], ["uniform", "scalebio"]):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in ALLOCATION.items():
                patch.setenv(name, value)
            process = start_command(
                "compare", "--config", folder / "compare.yaml", "--methods", *methods
            )
        said, complaints = finish(process, 600)
        assert process.returncode == 0, said + complaints
        (folder / f"said-{len(methods)}.txt").write_text(said)
    return folder / "out"


def test_every_method_is_trained_on_the_same_budget_and_written_side_by_side(
    compared: Path,
) -> None:
    found = json.loads((compared / "compare.json").read_text())
    assert {method["name"] for method in found["methods"]} == {"uniform", "scalebio"}
    for method in found["methods"]:
        [run] = method["runs"]
        assert sum(run["given"].values()) == 24  # 3 steps of 8
        assert sum(run["weights"].values()) == pytest.approx(1)
        evaluated = json.loads(
            (compared / method["name"] / "seed-5" / "train" / "evaluation.json").read_text()
        )
        test = next(entry for entry in evaluated["sets"] if entry["name"] == "test")
        assert run["test_loss"] == test["sample_mean"]
        assert method["test_loss"] == {"mean": run["test_loss"], "sd": None}
    losses = [method["test_loss"]["mean"] for method in found["methods"]]
    assert losses == sorted(losses)
    by_name = {method["name"]: method for method in found["methods"]}
    assert by_name["uniform"]["cost"]["mean"] == 0
    # Three steps of at most twice the training batch and once the validation batch.
    assert 2 < by_name["scalebio"]["cost"]["mean"] < 4
    text = (compared / "compare.md").read_text()
    assert all(line in text for line in ("| uniform |", "| scalebio |"))
    with Image.open(compared / "compare.png") as image:
        assert image.width > 500 and len(image.convert("RGB").getcolors(2**20) or []) > 10


def test_what_is_done_is_not_done_again(folder: Path, compared: Path) -> None:
    again = (folder / "said-2.txt").read_text()
    assert "prepare" not in again and "uniform, seed 5" not in again
    assert again.count("scalebio, seed 5") == 3


def test_test_rows_are_in_no_pool(compared: Path) -> None:
    manifest = json.loads((compared / "pool" / "good" / "manifest.json").read_text())
    [source] = manifest["sources"]
    assert source["contaminated"]["exact"] == 2 and source["given"] == 50


def test_the_models_of_a_search_are_not_kept(compared: Path) -> None:
    assert not list((compared / "scalebio" / "seed-5" / "find").rglob("checkpoints"))
    assert (compared / "scalebio" / "seed-5" / "train" / "checkpoints").is_dir()


REFUSED = [
    ({"methods": ["lesss"]}, "methods: 'lesss' is not a method (choose from scalebio, uniform"),
    ({"sources": {"good": "good.jsonl"}}, "sources: ['good'] is not a mixture"),
    ({"run": {"train_iters": 9}}, "run.train_iters: 9 is not of type dict (give a section of"),
    ({"seeds": []}, "seeds: [] is empty"),
    ({"seeds": [1, 1]}, "seeds: [1, 1] names one twice"),
    ({"methods": ["manual"]}, "weights: {} are not those of the sources, which method manual"),
    ({"tokenizer": None}, "model: None and tokenizer are missing"),
    ({"test": {"goal": "x.jsonl"}}, "test: 'goal' names two sets"),
    ({"tasks": {"gsm8k": "x.jsonl"}}, "tasks: ['gsm8k'] need a Hugging Face model"),
    ({"method": ["uniform"]}, "unknown key 'method' (did you mean methods?)"),
    ({"run": {"train": {"train_iter": 3}}}, "unknown key 'train_iter' (did you mean train_iters?)"),
    ({"train": {"data": {"seq_length": 64}}}, "data.seq_length: 32 for uniform, 64 for the final"),
    ({"per_source": 0}, "per_source: 0 must be above 0"),
    ({"tokenizer": "nowhere.model"}, "tokenizer: nowhere.model: no such file or folder"),
    ({"test": {"test": "nowhere.json"}}, "test.test: nowhere.json: no such file or folder"),
    ({"variants": {"x": {"baseline": {"method": "les"}}}}, "x: baseline.method: 'les' is not a"),
    ({"output": "/proc/x"}, "/proc/x/compare.yaml: can't write"),
    ({"run": {"checkpoint": {"save": "ckpt"}}}, "run.checkpoint.save: 'ckpt' would be one folder"),
    ({"train": {"checkpoint": {"load": "ckpt"}}}, "train.checkpoint.load: 'ckpt' would be one"),
    (
        {"variants": {"x": {"logging": {"tensorboard_dir": "tb"}}}},
        "variants.x.logging.tensorboard_dir: 'tb' would be one folder for all runs (remove it",
    ),
    ({"variants": {"../x": {}}}, "variants: '../x' cannot name a variant"),
    ({"variants": {"/x": {}}}, "variants: '/x' cannot name a variant"),
    ({"variants": {"pool": {}}}, "variants: 'pool' cannot name a variant"),
]


@pytest.mark.parametrize(("change", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_mistakes_are_refused_before_anything_runs(
    change: dict, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("good", "junk", "goal", "test"):
        (tmp_path / f"{name}.jsonl").touch()
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump({**content(tmp_path), **change}))
    assert main(["compare", "--config", str(path)]) == 2
    assert words in the_only_line(capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"per_source": 40}, "per_source: is 40, but this comparison began with 50"),
        (
            {"run": {**content(Path())["run"], "data": {"seq_length": 64}}},
            "run.data.seq_length: is 64, but this comparison began with 32",
        ),
    ],
)
def test_another_comparison_in_the_same_folder_is_refused(
    folder: Path,
    compared: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict,
    words: str,
    options: list[str],
) -> None:
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump({**content(folder), **change}))
    assert main(["compare", "--config", str(path), *options]) == 2
    assert words in the_only_line(capsys.readouterr().err)


def test_methods_of_earlier_starts_stay_in_the_comparison(folder: Path, compared: Path) -> None:
    """The fixture's second start had both; one that names the first alone drops none."""
    assert main(["compare", "--config", str(folder / "compare.yaml")]) == 0
    found = json.loads((compared / "compare.json").read_text())
    assert {method["name"] for method in found["methods"]} == {"uniform", "scalebio"}


def test_a_stage_that_fails_says_why_and_can_be_mended(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """What fails before anything was made does not bind the next start to its mistake."""
    path, empty = tmp_path / "compare.yaml", tmp_path / "empty.jsonl"
    empty.touch()
    changed = {**content(folder), "output": str(tmp_path / "out")}
    path.write_text(yaml.safe_dump({**changed, "test": {"test": str(empty)}}))
    assert main(["compare", "--config", str(path)]) == 2
    said = capfd.readouterr().err
    assert "prepare: " in said and "empty.jsonl" in said
    path.write_text(yaml.safe_dump(changed))
    assert main(["compare", "--config", str(path), "--dry-run"]) == 0
    assert "# prepare" in capfd.readouterr().out


def test_flags_stand_before_what_the_file_says(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--methods", "doge", "--seeds", "3", "--output", str(tmp_path / "elsewhere")]
    assert main(["compare", "--config", str(folder / "compare.yaml"), *words, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "# doge, seed 3" in said and "uniform" not in said and "seed 5" not in said
    assert str(tmp_path / "elsewhere") in said and str(folder / "out") not in said


def test_the_weights_of_a_stopped_search_are_not_its_end(folder: Path, compared: Path) -> None:
    [stage] = [
        stage for stage in Plan(load(folder / "compare.yaml", {"methods": ["scalebio"]}))
        if stage.product.name == "weights.json"
    ]  # fmt: skip
    assert stage.done
    whole = stage.product.read_text()
    try:
        stage.product.write_text(json.dumps({**json.loads(whole), "complete": False}))
        assert not stage.done
    finally:
        stage.product.write_text(whole)


def test_variants_and_presets_reach_the_command(folder: Path, tmp_path: Path) -> None:
    variants = {"fast": {"baseline": {"method": "less"}, "optimizer": {"lr": 0.5}}}
    path = tmp_path / "compare.yaml"
    changed = {**content(folder), "methods": ["paper", "fast", "manual"], "variants": variants,
               "weights": {"good": 3.0, "junk": 1.0}, "ranks": 2}  # fmt: skip
    path.write_text(yaml.safe_dump(changed))
    plan = Plan(load(path, {}))
    paper, fast, manual = (run.stages[0].config[1] for run in plan.runs)  # type: ignore[index]
    assert paper["bilevel"]["preset"] == "paper" and paper["baseline"]["method"] == "scalebio"
    assert fast["optimizer"]["lr"] == 0.5
    assert [s["initial_weight"] for s in manual["data"]["sources"]] == [3.0, 1.0]
    assert "torch.distributed.run" in plan.command(plan.runs[0].stages[0])
    assert "torch.distributed.run" not in plan.command(plan.runs[0].stages[1])


def test_only_the_launcher_of_a_stage_sees_the_allocation(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else `convert` waits for the other tasks, which nobody starts."""
    for name, value in {**ALLOCATION, "SLURM_STEP_ID": "0", "RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    for change, launched in (({}, set()), ({"ranks": 2}, set()), ({"launcher": "srun x"}, {0, 2})):
        path = tmp_path / "compare.yaml"
        path.write_text(yaml.safe_dump({**content(folder), **change}))
        plan = Plan(load(path, {}))
        for number, stage in enumerate(plan.runs[0].stages):
            seen = plan.environment(stage)
            kept = number in launched
            assert [name in seen for name in ("SLURM_NTASKS", "SLURM_STEP_ID", "RANK")] == [
                kept
            ] * 3
            assert seen["PATH"]


def test_only_what_is_not_prepared_yet_is_prepared(folder: Path, tmp_path: Path) -> None:
    kept, data = tmp_path / "good", tmp_path / "out" / "data"
    for made in (kept, data / "junk", data / "goal", data / "test"):
        made.mkdir(parents=True)
    (kept / "source.json").touch()
    changed = content(folder)
    changed["sources"]["good"], changed["output"] = str(kept), str(tmp_path / "out")
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump(changed))
    prepare = Plan(load(path, {})).preparation[0]
    named = [word.partition("=")[0] for word in prepare.words if "=" in word]
    assert named == ["junk", "goal", "test"] and not prepare.done
    for made in data.iterdir():
        (made / "source.json").touch()
    assert prepare.done


def test_a_stage_gets_its_environment_and_its_time_is_kept(tmp_path: Path) -> None:
    made = tmp_path / "made"
    code = f"import os; open({str(made)!r}, 'w').write(os.environ['RANK'])"
    stage = Stage("one", [], tmp_path / "logs" / "one.txt", made)
    timing = tmp_path / "logs" / "one.timing.json"
    timing.parent.mkdir()
    timing.write_text('{"seconds": 1000.0}')  # of an attempt before
    told = run_stage(stage, [sys.executable, "-c", code], {"RANK": "7"})
    assert made.read_text() == "7"
    assert json.loads(timing.read_text()) == {"seconds": told} and 1000 < told < 1600


def test_a_run_whose_time_is_unknown_is_compared_all_the_same(
    folder: Path, compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`compare` was killed with SIGKILL, and its stage ran on to the end."""
    timing = compared / "uniform" / "seed-5" / "find.timing.json"
    timing.rename(tmp_path / "timing.json")
    try:
        assert main(["compare", "--config", str(folder / "compare.yaml")]) == 0
        text = (compared / "compare.json").read_text()
        assert "NaN" not in text
        method = next(m for m in json.loads(text)["methods"] if m["name"] == "uniform")
        assert method["search_seconds"] == {"mean": None, "sd": None}
        assert method["runs"][0]["seconds"]["find"] is None
        assert re.search(r"^ *uniform .* - +\S+ GiB", capsys.readouterr().out, re.MULTILINE)
    finally:
        (tmp_path / "timing.json").rename(timing)


def test_spread_and_differences_of_seeds() -> None:
    assert spread([1.0, 2.0, 3.0]) == {"mean": 2.0, "sd": 1.0}
    assert spread([1.0, None]) == {"mean": None, "sd": None}
    method = {
        "name": "m", "scores": {}, "weights": {"a": spread([1.0, 1.0])}, "cost": spread([0.5]),
        "rows": spread([1234]), "test_loss": spread([1.0, 3.0]), "behind": spread([0.0, 0.5]),
        "search_seconds": spread([61.0]), "search_peak_bytes": 3 * 2**30,
    }  # fmt: skip
    head, [row] = table({"methods": [method], "sources": ["a"]}, ["a"])
    assert dict(zip(head, row, strict=True)) == {
        "method": "m", "test loss": "2.0000 ± 1.4142", "behind": "0.2500 ± 0.3536",
        "a": "1.00 ± 0.00", "rows": "1,234", "cost": "0.50", "search": "61 s", "memory": "3.0 GiB",
    }  # fmt: skip


def test_a_terminal_shows_the_sources_that_some_method_weighs_most(tmp_path: Path) -> None:
    shares = {f"s{n}": n / 100 for n in range(20)}
    methods = [
        {"name": name, "scores": {}, "weights": {s: spread([w]) for s, w in weights.items()},
         "cost": spread([0.5]), "rows": spread([9]), "test_loss": spread([1.0]),
         "behind": spread([0.0]), "search_seconds": spread([61.0]), "search_peak_bytes": 2**30,
         "runs": [{"seed": 0, "test_loss": 1.0, "test_losses": {"t": 1.0}, "scores": {},
                   "cost": 0.5, "validation_losses": {}, "weights": weights, "given": {},
                   "seconds": {}, "search_peak_bytes": 2**30, "training_peak_bytes": 2**30}]}
        for name, weights in (("one", shares), ("two", {**shares, "s3": 0.9}))
    ]  # fmt: skip
    comparison = {
        "methods": methods, "sources": list(shares), "test": ["t"], "num_samples": 9,
        "max_epochs": 4, "seeds": [0], "runs_planned": 2, "methods_planned": ["one", "two"],
        "seconds_left": 0.0,
    }  # fmt: skip
    screen = io.StringIO()
    write(tmp_path, comparison, Console(file=screen, width=120))
    said = screen.getvalue()
    head = said.splitlines()[1].split()
    assert [word for word in head if word in shares] == ["s3", "s16", "s17", "s18", "s19"]
    assert "weights of the other sources: compare.md" in said and "runs (method" not in said
    text = (tmp_path / "compare.md").read_text()
    assert "One seed each" in text and "standard deviation" not in text and "are done" not in text
    assert all(f"| {source} |" in (tmp_path / "compare.md").read_text() for source in shares)
