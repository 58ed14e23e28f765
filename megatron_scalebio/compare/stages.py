"""The stages of a comparison as commands, each with the file that says that it is done.

OUTPUT/
  data/NAME            prepared sources, validation and test sets
  pool/NAME            sources without what repeats a validation or test example
  model/               the Hugging Face model, imported once
  METHOD/seed-N/
    find/              weights.json, selected.json     reweight --method METHOD
    sample/            the final training set          sample --weights find
    train/             evaluation.json                 train, the same for all methods
    hf/, benchmarks/   where tasks are asked for       convert export, evaluate --tasks
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_scalebio import launcher
from megatron_scalebio.compare.config import CompareConfig, Sections, is_prepared, merged
from megatron_scalebio.config_loader import load_config
from megatron_scalebio.errors import UserError

WEIGHTS_FILE = "weights.json"
POOL_ALL = 10**9  # rows of each source where per_source sets no limit


@dataclass(frozen=True)
class Stage:
    """One command.

    Attributes:
        title: what the log of the comparison calls it.
        words: of the command, without the launcher.
        log: receives what it prints, and beside it `timing.json`.
        product: the last thing that it writes.
        config: written to a YAML file that the words name, or None.
        distributed: runs under the launcher.
    """

    title: str
    words: list[str]
    log: Path
    product: Path
    config: tuple[Path, Sections] | None = None
    distributed: bool = False

    @property
    def timing(self) -> Path:
        """Its seconds, written when it ends."""
        return self.log.with_suffix(".timing.json")

    @property
    def kind(self) -> tuple[str, str]:
        """Stages of one kind take about as long: of one method, whatever the seed, and one part."""
        return self.log.parents[1].name, self.log.stem

    @property
    def done(self) -> bool:
        """Whether the product is there, and not what a stopped search has found so far."""
        if not self.product.exists():
            return False
        return self.product.name != WEIGHTS_FILE or read(self.product).get("complete", True)


@dataclass(frozen=True)
class Run:
    """One method under one seed."""

    method: str
    seed: int
    folder: Path
    stages: list[Stage] = field(default_factory=list)


class Plan:
    """All stages of a comparison, in order."""

    def __init__(self, config: CompareConfig) -> None:
        self.config = config
        self.output = Path(config.output)
        training = load_config(None, config.sections_of_training())
        self.seq_length = training.data.seq_length
        for method in config.methods:
            found = load_config(None, config.sections_of(method)).data.seq_length
            if found != self.seq_length:
                raise UserError(
                    f"data.seq_length: {found} for {method}, {self.seq_length} for the final "
                    "training (set it under run, once)"
                )
        # What the final training takes in one pass, of rows as of epochs.
        one_pass = training.train.train_iters * training.train.global_batch_size
        self.num_samples = config.num_samples or one_pass
        self.runs = [self._run(method, seed) for seed in config.seeds for method in config.methods]
        self.preparation = [*self._prepare(), self._pool(), *self._import()]

    def __iter__(self) -> Iterator[Stage]:
        yield from self.preparation
        for run in self.runs:
            yield from run.stages

    def _data(self, name: str) -> Path:
        """The prepared folder of a source or set: made here, or the user's own."""
        config = self.config
        given = {**config.sources, **config.validation, **config.test}[name]
        return Path(given) if is_prepared(given) else self.output / "data" / name

    def _prepare(self) -> Iterator[Stage]:
        config, data = self.config, self.output / "data"
        given = {**config.sources, **config.validation, **config.test}
        raw = {name: path for name, path in given.items() if self._data(name) == data / name}
        if not raw:
            return
        words = ["prepare", "--tokenizer", str(config.tokenizer or config.model)]
        words += ["--seq-length", str(self.seq_length), "--out", str(data), "--overwrite"]
        for name, path in raw.items():
            words += ["--input", f"{name}={path}"]
        log = self.output / "logs" / "prepare.txt"
        # All folders appear at once.
        yield Stage("prepare", words, log, data / next(iter(raw)) / "source.json")

    def _pool(self) -> Stage:
        config, pool = self.config, self.output / "pool"
        words = ["sample", "--out", str(pool), "--from-tokens", "--overwrite"]
        words += ["--per-source", str(config.per_source or POOL_ALL)]
        for name in config.sources:
            words += ["--input", f"{name}={self._data(name)}"]
        for name in [*config.validation, *config.test]:
            words += ["--exclude", f"{name}={self._data(name)}"]
        last = list(config.sources)[-1]
        log = self.output / "logs" / "pool.txt"
        return Stage("pool without test examples", words, log, pool / last / "manifest.json")

    def _import(self) -> Iterator[Stage]:
        if self.config.model is None:
            return
        words = ["convert", "import", "--hf", self.config.model, "--save", str(self._model)]
        yield Stage("import the model", words, self.output / "logs" / "import.txt", self._model)

    @property
    def _model(self) -> Path:
        return self.output / "model"

    def _imported(self) -> Sections:
        if self.config.model is None:
            return {}
        return {"model": {"pretrained_checkpoint": str(self._model)}}

    def _run(self, method: str, seed: int) -> Run:
        folder = self.output / method / f"seed-{seed}"
        stages = [
            self._find(method, seed, folder),
            self._sample(method, seed, folder),
            self._train(method, seed, folder),
        ]
        if self.config.tasks:
            stages += self._benchmarks(method, seed, folder)
        return Run(method, seed, folder, stages)

    def _find(self, method: str, seed: int, folder: Path) -> Stage:
        pool: list[dict[str, Any]] = [
            {"name": name, "path": str(self.output / "pool" / name)} for name in self.config.sources
        ]
        if method == "manual":
            for entry in pool:
                entry["initial_weight"] = self.config.weights[entry["name"]]
        sections = merged(
            self.config.sections_of(method),
            self._imported(),
            {
                "data": {"sources": pool, "validation": self._sets(self.config.validation)},
                "train": {"seed": seed, "output": str(folder / "find")},
            },
        )
        path = folder / "find.yaml"
        words = ["reweight", "--config", str(path)]
        return Stage(
            _title(method, seed, "find the mixture"), words, folder / "find.txt",
            folder / "find" / WEIGHTS_FILE, (path, sections), distributed=True,
        )  # fmt: skip

    def _sample(self, method: str, seed: int, folder: Path) -> Stage:
        out = folder / "sample"
        words = ["sample", "--weights", str(folder / "find"), "--out", str(out), "--from-tokens"]
        words += ["--num-samples", str(self.num_samples), "--seed", str(seed), "--overwrite"]
        words += ["--max-epochs", str(self.config.max_epochs)]
        title = _title(method, seed, "draw the training set")
        return Stage(title, words, folder / "sample.txt", out / "manifest.json")

    def _train(self, method: str, seed: int, folder: Path) -> Stage:
        sections = merged(
            {"checkpoint": {"keep_last": 1}, "train": {"eval_interval": 0}},
            self.config.sections_of_training(),
            self._imported(),
            {
                "data": {
                    "sources": [{"name": "sample", "path": str(folder / "sample")}],
                    "validation": self._sets(self.config.validation),
                    "test": self._sets(self.config.test),
                },
                "train": {"seed": seed, "output": str(folder / "train")},
            },
        )
        path = folder / "train.yaml"
        words = ["train", "--config", str(path)]
        return Stage(
            _title(method, seed, "train"), words, folder / "train.txt",
            folder / "train" / "evaluation.json", (path, sections), distributed=True,
        )  # fmt: skip

    def _benchmarks(self, method: str, seed: int, folder: Path) -> list[Stage]:
        config, hf = self.config, folder / "hf"
        export = ["convert", "export", "--load", str(folder / "train" / "checkpoints")]
        export += ["--hf-reference", str(config.model), "--save", str(hf)]
        evaluate = ["evaluate", "--hf", str(hf), "--output", str(folder / "benchmarks")]
        evaluate += ["--tasks", *config.tasks]
        evaluate += ["--data", *(f"{name}={path}" for name, path in config.tasks.items())]
        return [
            Stage(
                _title(method, seed, "export"), export, folder / "export.txt", hf / "config.json"
            ),
            Stage(
                _title(method, seed, "benchmarks"), evaluate, folder / "benchmarks.txt",
                folder / "benchmarks" / "evaluation.json",
            ),
        ]  # fmt: skip

    def _sets(self, sets: dict[str, str]) -> list[dict[str, Any]]:
        return [{"name": name, "path": str(self._data(name))} for name in sets]

    def command(self, stage: Stage) -> list[str]:
        """The words to start, launcher included."""
        config = self.config
        if stage.distributed and config.launcher:
            start = config.launcher.split()
        elif stage.distributed and config.ranks > 1:
            start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            start += ["--nproc_per_node", str(config.ranks)]
        else:
            start = [sys.executable]
        return [*start, "-m", "megatron_scalebio", *stage.words]

    def environment(self, stage: Stage) -> dict[str, str]:
        """What a stage inherits: only one under the user's launcher takes part in an allocation."""
        if stage.distributed and self.config.launcher:
            return dict(os.environ)
        return {key: value for key, value in os.environ.items() if key not in launcher.VARIABLES}


def seconds_left(stages: Sequence[Stage]) -> float | None:
    """What the stages that are not done will take, judged by those of their kind, or else of the
    same part of other methods; None before a part has been timed at all."""
    times: dict[Any, list[float]] = {}
    for stage in stages:
        if stage.done and stage.timing.exists():
            for kind in (stage.kind, stage.kind[1]):
                times.setdefault(kind, []).append(float(read(stage.timing)["seconds"]))
    left = 0.0
    for stage in stages:
        if not stage.done:
            known = times.get(stage.kind) or times.get(stage.kind[1])
            if known is None:
                return None
            left += fmean(known)
    return left


def read(path: Path) -> dict[str, Any]:
    """A JSON file that a stage left."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: damaged ({error}) (remove it, and compare again)") from None


def _title(method: str, seed: int, what: str) -> str:
    return f"{method}, seed {seed}: {what}"
