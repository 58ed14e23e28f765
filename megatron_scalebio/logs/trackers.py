"""Weights & Biases and MLflow, where a run asks for them; metrics.jsonl stays the record.

    configuration   W&B: config; MLflow: params, and config.yaml
    curves          TensorBoard's, under the same names, at the same intervals
    at the end      the weights with their intervals, the report and the run's small files

Their libraries are imported when a run asks for them, and not before. W&B goes by its own variables
(WANDB_MODE=offline writes to OUTPUT/wandb), MLflow by MLFLOW_TRACKING_URI, or to OUTPUT/mlruns.
"""

from __future__ import annotations

import json
import math
import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from megatron_scalebio.errors import UserError
from megatron_scalebio.logs.records import METRICS_FILE, read_records
from megatron_scalebio.logs.tensorboard import SOURCE_TAGS, source_interval, step_scalars
from megatron_scalebio.whole_files import write_json

IDS_FILE = "trackers.json"  # which runs there this folder's run is, for when it resumes
ARTIFACTS = (
    "report.html", "weights.json", "blend.txt", "config.yaml", "evaluation.json", "command.txt"
)  # fmt: skip
_PARAMS_A_CALL = 100  # MLflow's limit
_PARAM_CHARS = 6000


class Trackers:
    """Those that a run asks for. For rank 0 alone, while the block lasts.

    Args:
        folder: the run's output.
        options: `logging` of the configuration.
        config: all of it, as plain values.

    Raises:
        UserError: where a library is missing.
    """

    def __init__(self, folder: Path, options: Any, config: Mapping[str, Any]) -> None:
        self._folder, self._interval = folder, options.tensorboard_log_interval
        self._trackers: list[_Wandb | _Mlflow] = []
        # A run that resumes makes the steps since its checkpoint again, to the same values.
        metrics = folder / METRICS_FILE
        records = read_records(metrics) if metrics.is_file() else ()
        self._logged = max((record["step"] for record in records), default=0)
        ids = _known_ids(folder) if self._logged else {}
        if options.wandb_project:
            name = options.wandb_exp_name or str(folder)
            known = ids.get("wandb") or uuid.uuid4().hex[:12]
            self._trackers.append(_Wandb(folder, options.wandb_project, name, known, config))
            ids["wandb"] = known
        if options.mlflow_experiment:
            mlflow = _Mlflow(folder, options.mlflow_experiment, ids.get("mlflow"), config)
            self._trackers.append(mlflow)
            ids["mlflow"] = mlflow.id
        write_json(folder / IDS_FILE, ids)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        for tracker in self._trackers:
            tracker.close(failed=kind is not None)

    def log(
        self, record: Mapping[str, Any], sources: Sequence[str], validation: Sequence[str]
    ) -> str:
        """Logs a step. A service that does not answer is left alone from then on.

        Returns:
            A line to warn with, "" where all is well.
        """
        step = int(record["step"])
        if step <= self._logged or step % self._interval:
            return ""
        with_sources = step % source_interval(len(sources), self._interval) == 0
        values = dict(_scalars(record, sources if with_sources else (), validation))
        return self._each(lambda tracker: tracker.log(step, values))

    def finish(self) -> str:
        """Hands over what the run's folder holds at its end; returns as `log`."""
        weights = self._folder / "weights.json"
        content = json.loads(weights.read_text()) if weights.is_file() else {}
        files = [self._folder / name for name in ARTIFACTS if (self._folder / name).is_file()]
        groups = [{**row, "name": f"groups/{row['name']}"} for row in content.get("groups", [])]
        rows = [*content.get("sources", []), *groups]
        return self._each(lambda tracker: tracker.finish(rows, files))

    def _each(self, do: Any) -> str:
        warnings = []
        for tracker in list(self._trackers):
            try:
                do(tracker)
            except tracker.failures as error:
                self._trackers.remove(tracker)
                name = type(tracker).__name__.strip("_")
                warnings.append(f"{name} is not logged to any more: {' '.join(str(error).split())}")
        return "; ".join(warnings)


def _known_ids(folder: Path) -> dict[str, str]:
    try:
        return dict(json.loads((folder / IDS_FILE).read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def _scalars(
    record: Mapping[str, Any], sources: Sequence[str], validation: Sequence[str]
) -> Iterator[tuple[str, float]]:
    pairs = [*step_scalars(record, validation)]
    for prefix, field in SOURCE_TAGS.items():
        values = record.get(field) or ()
        pairs += [(f"{prefix}/{name}", v) for name, v in zip(sources, values, strict=False)]
    return ((tag, float(v)) for tag, v in pairs if v is not None and math.isfinite(v))


def _library(name: str, field: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError:
        raise UserError(
            f"logging.{field}: {name} is not installed (pip install 'megatron-scalebio[{name}]')"
        ) from None


class _Wandb:
    """A run of Weights & Biases. Their library sends in a process of its own.

    Attributes:
        failures: of a service that is away, not mistakes here.
    """

    def __init__(
        self, folder: Path, project: str, name: str, run_id: str, config: Mapping[str, Any]
    ) -> None:
        self._wandb = _library("wandb", "wandb_project")
        self.id = run_id
        self.failures: tuple[type[Exception], ...] = (self._wandb.errors.Error,)
        try:
            self._run = self._wandb.init(
                project=project, name=name, id=run_id, resume="allow", dir=str(folder),
                config=dict(config), settings=self._wandb.Settings(console="off", silent=True),
            )  # fmt: skip
        except self.failures as error:
            raise UserError(
                f"logging.wandb_project: {error} (wandb login, or WANDB_MODE=offline)"
            ) from None
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def finish(self, rows: Sequence[Mapping[str, Any]], files: Sequence[Path]) -> None:
        if rows:
            columns = ["name", "weight", "ci_low", "ci_high", "initial_weight"]
            data = [[row.get(column) for column in columns] for row in rows]
            self._run.log({"weights": self._wandb.Table(columns=columns, data=data)})
            self._run.summary.update(_final(rows))
        artifact = self._wandb.Artifact(f"run-{self.id}", "run")
        for file in files:
            artifact.add_file(str(file))
        self._run.log_artifact(artifact)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _Mlflow:
    """A run of MLflow."""

    def __init__(
        self, folder: Path, experiment: str, run_id: str | None, config: Mapping[str, Any]
    ) -> None:
        mlflow = _library("mlflow", "mlflow_experiment")
        self.failures: tuple[type[Exception], ...] = (mlflow.MlflowException,)
        self._entities = import_module("mlflow.entities")
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            # MLflow asks whether files are meant: for a run on a cluster they are.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            uri = (folder / "mlruns").resolve().as_uri()
        try:
            self._client = mlflow.MlflowClient(tracking_uri=uri)
            self.id = run_id or self._new_run(folder, experiment, config)
            self._client.update_run(self.id, status="RUNNING")
        except self.failures as error:
            raise UserError(f"logging.mlflow_experiment: {uri}: {error}") from None

    def _new_run(self, folder: Path, experiment: str, config: Mapping[str, Any]) -> str:
        found = self._client.get_experiment_by_name(experiment)
        number = found.experiment_id if found else self._client.create_experiment(experiment)
        run = self._client.create_run(number, run_name=str(folder))
        params = [self._entities.Param(name, text) for name, text in _flat(config)]
        for start in range(0, len(params), _PARAMS_A_CALL):
            self._client.log_batch(run.info.run_id, params=params[start : start + _PARAMS_A_CALL])
        return str(run.info.run_id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        metrics = [self._entities.Metric(name, v, now, step) for name, v in values.items()]
        self._client.log_batch(self.id, metrics=metrics)

    def finish(self, rows: Sequence[Mapping[str, Any]], files: Sequence[Path]) -> None:
        self.log(0, _final(rows))
        for file in files:
            self._client.log_artifact(self.id, str(file))

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self.id, "FAILED" if failed else "FINISHED")


def _final(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Weights, and the ends of their intervals where there are any."""
    fields = {"weight": "weight", "low": "ci_low", "high": "ci_high"}
    return {
        f"final/{kind}/{row['name']}": row[field]
        for row in rows for kind, field in fields.items() if row.get(field) is not None
    }  # fmt: skip


def _flat(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The options as MLflow's params; lists of sources are in config.yaml, which is handed over."""
    for section, values in config.items():
        for name, value in values.items():
            text = str(value)
            if not isinstance(value, list | dict) and len(text) <= _PARAM_CHARS:
                yield f"{section}.{name}", text
