"""W&B's and MLflow's own files, read back: of a run that was interrupted and resumed."""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_scalebio.errors import UserError
from megatron_scalebio.logs import trackers
from megatron_scalebio.logs.trackers import Trackers
from tests.commands import command, note, noted
from tests.distributed.harness import run_distributed
from tests.markov import write_two_sources

ABSENT = [name for name in ("wandb", "mlflow") if find_spec(name) is None]  # not imported here
pytestmark = pytest.mark.skipif(bool(ABSENT), reason=f"not installed: {', '.join(ABSENT)}")
STEPS = 6


def run_all(folder_name: str) -> None:
    """Six steps, the last two by a second start; a run that asks for neither; `train`."""
    folder = Path(folder_name)
    os.environ.update(WANDB_MODE="offline", MLFLOW_TRACKING_URI=(folder / "mlruns").as_uri(),
                      MLFLOW_ALLOW_FILE_STORE="true")  # fmt: skip
    path = write_two_sources(folder)
    note(folder / "noted", "plain", command("reweight", "--config", path, "--output", folder / "no",
                                            "--train-iters", 1))  # fmt: skip
    note(folder / "noted", "imported", (None, str("mlflow" in sys.modules)))
    words = ["--config", path, "--wandb-project", "mixtures", "--mlflow-experiment", "mixtures"]
    for name, steps in (("cut off", 5), ("whole", STEPS)):
        output = ["--output", folder / "run", "--train-iters", steps, "--save-interval", 4]
        note(
            folder / "noted", name, command("reweight", *words, *output, "--wandb-exp-name", "one")
        )
        if name == "cut off":  # as a kill leaves it: a step was made since the checkpoint
            shutil.rmtree(folder / "run" / "checkpoints" / "iter_0000005")
    output = ["--output", folder / "trained", "--train-iters", 2]
    note(folder / "noted", "train", command("train", *words, *output))


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trackers")
    run_distributed(run_all, 1, str(folder))
    return folder


def wandb_records(run: Path) -> list[Any]:
    """Of all starts, in order. Their file is a log of blocks of 32 KiB, as LevelDB writes it."""
    from wandb.proto import wandb_internal_pb2

    records = []
    for file in sorted(
        run.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_ctime
    ):
        data, at, part = file.read_bytes(), 7, b""
        while at + 7 <= len(data):
            if 32768 - at % 32768 < 7:
                at += 32768 - at % 32768
                continue
            _, size, kind = struct.unpack("<IHB", data[at : at + 7])
            part += data[at + 7 : at + 7 + size]
            at += 7 + size
            if kind in (1, 4):  # whole, or the last part
                record = wandb_internal_pb2.Record()
                record.ParseFromString(part)
                records.append(record)
                part = b""
    return records


def items(message: Any) -> dict[str, Any]:
    return {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in message}


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict[str, dict[str, Any]]:
    entries = json.loads((run / "weights.json").read_text())["sources"]
    return {entry["name"]: entry for entry in entries}


@pytest.mark.distributed
def test_neither_is_started_unless_a_run_asks(ran: Path) -> None:
    """(Megatron imports wandb itself, where it is installed.)"""
    assert noted(ran / "noted", "plain")[0] == 0
    assert noted(ran / "noted", "imported")[1] == "False"
    assert not (ran / "no" / "wandb").exists() and not (ran / "no" / "trackers.json").exists()


@pytest.mark.distributed
def test_wandb_has_every_step_once_and_the_result(ran: Path) -> None:
    assert noted(ran / "noted", "whole")[0] == 0, noted(ran / "noted", "whole")[1]
    records = wandb_records(ran / "run")
    runs = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert len({run.run_id for run in runs}) == 1, "the second start goes on with the first's"
    assert {(run.project, run.display_name) for run in runs} == {("mixtures", "one")}
    assert items(runs[0].config.update)["train"]["global_batch_size"] == 8
    history = [items(r.history.item) for r in records if r.WhichOneof("record_type") == "history"]
    steps = [row for row in history if "step" in row and "lm loss" in row]
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    for row, record in zip(steps, metrics(ran / "run"), strict=True):
        assert row["lm loss validation"] == pytest.approx(record["validation_loss"])
        shown = [row["mixture/weight/s0"], row["mixture/weight/s1"]]
        assert shown == pytest.approx(record["weights"])
    artifacts = [r.artifact for r in records if r.WhichOneof("record_type") == "artifact"]
    kept = {entry.path for artifact in artifacts for entry in artifact.manifest.contents}
    assert {"report.html", "weights.json", "blend.txt", "config.yaml"} <= kept
    tables = sorted(  # of each start, the later last
        (ran / "run").glob("wandb/*/files/media/table/*.json"),
        key=lambda path: path.stat().st_mtime_ns,
    )
    content = json.loads(tables[-1].read_text())
    assert content["columns"][:4] == ["name", "weight", "ci_low", "ci_high"]
    assert {row[0]: row[1] for row in content["data"]} == {
        name: pytest.approx(entry["weight"]) for name, entry in weights(ran / "run").items()
    }


@pytest.mark.distributed
def test_mlflow_has_every_step_once_and_the_result(
    ran: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = MlflowClient(tracking_uri=(ran / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("mixtures")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {str(ran / "run"), str(ran / "trained")}
    run = runs[str(ran / "run")]
    assert run.info.status == "FINISHED"
    assert run.data.params["train.global_batch_size"] == "8"
    for name, field in (("lm loss", "train_loss_w"), ("bilevel/L1", "validation_loss")):
        points = client.get_metric_history(run.info.run_id, name)
        assert [point.step for point in points] == list(range(1, STEPS + 1))
        want = [record[field] for record in metrics(ran / "run")]
        assert [point.value for point in points] == pytest.approx(want)
    for name, entry in weights(ran / "run").items():
        assert run.data.metrics[f"final/weight/{name}"] == pytest.approx(entry["weight"])
    kept = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"report.html", "weights.json", "blend.txt", "config.yaml"} <= kept
    trained = runs[str(ran / "trained")]
    assert "evaluation.json" in {f.path for f in client.list_artifacts(trained.info.run_id)}


ROWS = [
    {"name": "a", "weight": 0.4, "ci_low": 0.3, "ci_high": 0.6, "initial_weight": 0.5},
    {"name": "b", "weight": 0.6, "ci_low": None, "ci_high": None, "initial_weight": 0.5},
]
FINAL = {"final/weight/a": 0.4, "final/low/a": 0.3, "final/high/a": 0.6, "final/weight/b": 0.6}


def test_mlflow_has_the_ends_of_intervals_where_there_are_any() -> None:
    mlflow, told = trackers._Mlflow.__new__(trackers._Mlflow), {}
    mlflow.log = lambda step, values: told.update(values)  # type: ignore[method-assign]
    mlflow.finish(ROWS, [])
    assert told == FINAL


def test_wandbs_summary_has_them_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = trackers._Wandb(tmp_path, "mixtures", "one", "x1", {})
    run.finish(ROWS, [])
    run.close(failed=False)
    summary: dict[str, Any] = {}
    for record in wandb_records(tmp_path):
        summary |= items(record.summary.update)
    assert {key: value for key, value in summary.items() if key.startswith("final/")} == FINAL


class Away:
    """A service that stops answering at the third step."""

    id, failures = "x", (ConnectionError,)

    def __init__(self) -> None:
        self.steps: list[int] = []

    def log(self, step: int, values: dict[str, float]) -> None:
        if step == 3:
            raise ConnectionError("no answer")
        self.steps.append(step)


def options(**given: Any) -> SimpleNamespace:
    unset = {"wandb_project": None, "wandb_exp_name": None, "mlflow_experiment": None}
    return SimpleNamespace(**{**unset, "tensorboard_log_interval": 1, **given})


def test_a_service_that_is_away_costs_a_warning_and_not_the_run(tmp_path: Path) -> None:
    logs, away = Trackers(tmp_path, options(), {}), Away()
    logs._trackers.append(away)
    warnings = [logs.log({"step": step, "train_loss_w": 1.0}, [], []) for step in range(1, 6)]
    assert warnings == ["", "", "Away is not logged to any more: no answer", "", ""]
    assert away.steps == [1, 2]


def test_groups_have_their_weights_beside_the_sources(tmp_path: Path) -> None:
    logs, handed = Trackers(tmp_path, options(), {}), []
    keep = SimpleNamespace(failures=(), finish=lambda rows, files: handed.append((rows, files)))
    logs._trackers.append(keep)  # type: ignore[arg-type]
    row = {"name": "web", "weight": 0.4, "ci_low": 0.3, "ci_high": 0.5}
    content = {"sources": [row], "groups": [{**row, "weight": 1.0, "level": 0}]}
    (tmp_path / "weights.json").write_text(json.dumps(content))
    assert logs.finish() == ""
    [(rows, files)] = handed
    assert [(r["name"], r["weight"]) for r in rows] == [("web", 0.4), ("groups/web", 1.0)]
    assert files == [tmp_path / "weights.json"]


@pytest.mark.parametrize("field", ["wandb_project", "mlflow_experiment"])
def test_a_missing_library_is_named(
    field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(trackers, "import_module", absent)
    library = field.partition("_")[0]
    with pytest.raises(UserError, match=rf"logging.{field}: {library} is not installed \(pip"):
        Trackers(tmp_path, options(**{field: "x"}), {})
