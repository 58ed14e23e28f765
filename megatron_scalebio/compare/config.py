"""What `compare` compares: one YAML file that names data, methods, seeds and budgets."""

import copy
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

import yaml

from megatron_scalebio.config.baseline import Method
from megatron_scalebio.config.checks import NAME, require_positive
from megatron_scalebio.config_loader import build, load_config, read_yaml
from megatron_scalebio.errors import UserError

Sections = dict[str, dict[str, Any]]  # of a run's configuration

# Methods under a name of their own: options over the method's defaults.
VARIANTS: dict[str, Sections] = {
    "paper": {"baseline": {"method": "scalebio"}, "bilevel": {"preset": "paper"}},
    "rho_loss_offline": {"baseline": {"method": "rho_loss", "rho_online": False}},
}

# What is in the output beside the folders of methods.
TAKEN = (
    "data", "pool", "model", "logs", "compare.yaml", "compare.json", "compare.md", "compare.png",
    "compare.pdf", "compare.csv", "compare.tex", "compare.html",
)  # fmt: skip
# Options that name a folder to write to or to resume from.
SHARED = (("checkpoint", "save"), ("checkpoint", "load"), ("logging", "tensorboard_dir"))


@dataclass
class CompareConfig:
    """The fields of the YAML file.

    Attributes:
        sources, validation, test: name → JSON/JSONL file or folder, or a prepared folder.
        output: folder that receives everything.
        methods: names of `reweight --method`, of `VARIANTS`, or of `variants`.
        seeds: one run of everything for each.
        model: Hugging Face folder that all stages start from; its tokenizer prepares the data.
        tokenizer: where there is no `model`, or another one is wanted; prepared sets need neither.
        per_source: rows of each source that the methods learn from and draw from [all].
        num_samples: rows of the final training set [what the final training takes in one pass].
        max_epochs: the most times that a row is in it.
        run: sections of a run's configuration, for both stages; over them
        reweight, train: those of finding the mixture and of the final training.
        weights: those of method `manual`, by source.
        variants: more names for `methods`: name → sections, with `baseline.method`.
        tasks: name → JSONL of benchmarks for the final models; needs `model`.
        ranks: processes of a stage, under torchrun; or
        launcher: words before `-m megatron_scalebio`, such as "srun python".
    """

    sources: dict[str, str]
    validation: dict[str, str]
    test: dict[str, str]
    output: str
    methods: list[str]
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    model: str | None = None
    tokenizer: str | None = None
    per_source: int | None = None
    num_samples: int | None = None
    max_epochs: int = 4
    run: dict[str, dict] = field(default_factory=dict)
    reweight: dict[str, dict] = field(default_factory=dict)
    train: dict[str, dict] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    variants: dict[str, dict] = field(default_factory=dict)
    tasks: dict[str, str] = field(default_factory=dict)
    ranks: int = 1
    launcher: str | None = None

    def __post_init__(self) -> None:
        require_positive(self, "per_source", "num_samples", "max_epochs", "ranks")
        for name in ("validation", "test", "methods", "seeds"):
            if not getattr(self, name):
                raise UserError(f"{name}: {getattr(self, name)!r} is empty (name at least one)")
        if len(self.sources) < 2:
            raise UserError(f"sources: {list(self.sources)!r} is not a mixture (name two or more)")
        for name in ("methods", "seeds"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise UserError(f"{name}: {values!r} names one twice (name each once)")
        names = [*self.sources, *self.validation, *self.test]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise UserError(f"test: {twice[0]!r} names two sets (give each set its own name)")
        for name in self.variants:
            if not NAME.fullmatch(name) or name in TAKEN:
                raise UserError(
                    f"variants: {name!r} cannot name a variant, which is a folder of the output "
                    f"(use letters, digits, '.', '_' and '-', and none of {', '.join(TAKEN)})"
                )
        self._refuse_shared_folders()
        known = [*get_args(Method), *VARIANTS, *self.variants]
        for method in self.methods:
            if method not in known:
                raise UserError(
                    f"methods: {method!r} is not a method (choose from {', '.join(known)})"
                )
        if "manual" in self.methods and set(self.weights) != set(self.sources):
            raise UserError(
                f"weights: {self.weights!r} are not those of the sources, which method manual "
                f"needs (give one each of {', '.join(self.sources)})"
            )
        sets = [*self.sources.values(), *self.validation.values(), *self.test.values()]
        if not (self.model or self.tokenizer or all(map(is_prepared, sets))):
            raise UserError("model: None and tokenizer are missing (name a Hugging Face folder)")
        if self.tasks and not self.model:
            raise UserError(f"tasks: {list(self.tasks)!r} need a Hugging Face model (name model)")

    def _refuse_shared_folders(self) -> None:
        layers = {"run": self.run, "reweight": self.reweight, "train": self.train}
        layers |= {f"variants.{name}": sections for name, sections in self.variants.items()}
        for layer, sections in layers.items():
            for section, key in SHARED:
                given = sections.get(section)
                if isinstance(given, dict) and given.get(key) is not None:
                    raise UserError(
                        f"{layer}.{section}.{key}: {given[key]!r} would be one folder for all runs "
                        "(remove it: each run keeps its own under output)"
                    )

    def sections_of(self, method: str) -> Sections:
        """The configuration of finding the mixture by a method, without data, seed and output."""
        variant = {**VARIANTS, **self.variants}.get(method, {"baseline": {"method": method}})
        return merged(self._model(), self.run, self.reweight, variant)

    def sections_of_training(self) -> Sections:
        return merged(self._model(), self.run, self.train)

    def _model(self) -> Sections:
        return {"model": {"hf": self.model}} if self.model else {}


def is_prepared(path: str) -> bool:
    return (Path(path) / "source.json").is_file()


def merged(*layers: Sections) -> Sections:
    """Sections laid over each other, option by option; the last one counts."""
    result: Sections = {}
    for layer in layers:
        for name, section in layer.items():
            if not isinstance(section, dict):
                raise UserError(f"{name}: {section!r} is not a mapping")
            result.setdefault(name, {}).update(copy.deepcopy(section))
    return result


def load(path: Path, overrides: dict[str, Any]) -> CompareConfig:
    """Reads the YAML file and checks every configuration that will come of it.

    Args:
        overrides: fields given on the command line.

    Raises:
        UserError: naming file, field, value and fix.
    """
    config: CompareConfig = build(
        CompareConfig, {**read_yaml(str(path), known=_FIELDS), **overrides}, str(path)
    )
    for method in dict.fromkeys([*config.methods, *config.variants]):
        _check(config.sections_of(method), f"{path}: {method}")
    _check(config.sections_of_training(), f"{path}: train")
    given = {"model": config.model, "tokenizer": config.tokenizer}
    for section in ("sources", "validation", "test", "tasks"):
        for name, file in getattr(config, section).items():
            given[f"{section}.{name}"] = file
    for field_name, file in given.items():
        if file is not None and not Path(file).exists():
            raise UserError(
                f"{path}: {field_name}: {file}: no such file or folder (paths are relative to "
                "where you start from)"
            )
    return config


_FIELDS = [spec.name for spec in fields(CompareConfig)]


def _check(sections: Sections, where: str) -> None:
    try:
        load_config(None, sections)
    except UserError as error:
        raise UserError(f"{where}: {str(error).removeprefix('command line: ')}") from None


def resolved_text(config: CompareConfig) -> str:
    """The comparison as YAML, as it was run."""
    return yaml.safe_dump(vars(config), sort_keys=False, allow_unicode=True)
