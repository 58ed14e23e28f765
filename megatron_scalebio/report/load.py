"""A run folder, read for its report: what is there, checked; what is missing or torn, noted."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_scalebio.errors import UserError
from megatron_scalebio.logs.interactions import Interaction, read_interaction
from megatron_scalebio.logs.records import METRICS_FILE
from megatron_scalebio.report.history import History, number_or_none, read_history
from megatron_scalebio.report.sets import SetRow, set_rows


@dataclass
class SourceWeight:
    name: str
    path: str
    weight: float
    examples: int | None = None
    low: float | None = None
    high: float | None = None
    initial: float | None = None
    epochs: float | None = None  # of the final training, where its length is given
    bound: str = ""  # that holds the weight: fixed, min or max


@dataclass
class Weights:
    step: int
    converged: bool
    reason: str
    confidence: float
    sources: list[SourceWeight]
    alike: list[list[str]] = field(default_factory=list)  # of which the sum alone is known
    complete: bool = True  # False: those so far of a run that a signal stopped
    groups: list[SourceWeight] = field(default_factory=list)
    levels: list[dict[str, Any]] = field(default_factory=list)  # verdict on each level of groups
    sets: list[SetRow] = field(default_factory=list)  # validation sets, where there are several
    objective: str = ""  # what they come to
    examples: str = ""  # what is told of single examples' scores


@dataclass
class Run:
    """Everything that the report shows, in the order of `sources` (S) and `validation` (V)."""

    path: Path
    sources: list[str]
    validation: list[str]
    history: History
    weights: Weights | None
    info: dict[str, Any]  # run.json
    config: dict[str, Any]
    config_text: str
    command: str
    blend: str
    interaction: Interaction | None = None
    notices: list[str] = field(default_factory=list)

    def setting(self, section: str, name: str) -> Any:
        """A field of config.yaml, or None."""
        values = self.config.get(section)
        return values.get(name) if isinstance(values, dict) else None

    @property
    def ended(self) -> bool:
        return bool(self.info.get("ended"))

    @property
    def last_step(self) -> int:
        return int(self.history.steps[-1]) if len(self.history.steps) else 0


def load_run(path: Path | str) -> Run:
    """Reads a run folder, finished or not.

    Raises:
        UserError: when it is no run folder, or a file of it is not what its name says.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such folder (give the output of `reweight`)")
    if not any((path / name).exists() for name in (METRICS_FILE, "run.json", "weights.json")):
        raise UserError(
            f"{path}: holds no {METRICS_FILE}, run.json or weights.json (give the output folder of "
            "`reweight`, after its first step)"
        )
    notices: list[str] = []
    info = _read_json(path / "run.json", notices)
    weights = _read_weights(path / "weights.json", notices)
    config_text = _read_text(path / "config.yaml")
    config = _parse_yaml(config_text, path / "config.yaml")
    sources = _names(info, "sources", path / "run.json")
    if not sources and weights:
        sources = [source.name for source in weights.sources]
    if weights and sources != [source.name for source in weights.sources]:
        raise UserError(
            f"{path / 'weights.json'}: names other sources than run.json (take both files from the "
            "same run)"
        )
    validation = _names(info, "validation", path / "run.json")
    history = read_history(path / METRICS_FILE, sources, validation, notices)
    return Run(
        path=path, sources=sources, validation=validation, history=history, weights=weights,
        interaction=read_interaction(path), info=info, config=config, config_text=config_text,
        command=_read_text(path / "command.txt").strip(),
        blend=_read_text(path / "blend.txt").strip(), notices=notices,
    )  # fmt: skip


def _read_text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise UserError(error.strerror or str(error), where=str(path)) from None


def _read_json(path: Path, notices: list[str]) -> dict[str, Any]:
    text = _read_text(path)
    if not text:
        notices.append(f"There is no {path.name} yet.")
        return {}
    try:
        tree = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        problem = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        raise UserError(
            f"{path}{line}: not valid JSON: {problem} (fix the file, or move it away and resume "
            "the run)"
        ) from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: is not a JSON object (restore it from the run)")
    return tree


def _parse_yaml(text: str, path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not valid YAML (fix the file)") from None
    return tree if isinstance(tree, dict) else {}


def _names(info: dict[str, Any], key: str, path: Path) -> list[str]:
    names = info.get(key, [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: {key!r} is not a list of names (fix the file)")
    return list(names)


def _read_weights(path: Path, notices: list[str]) -> Weights | None:
    tree = _read_json(path, notices)
    if not tree:
        return None
    entries = tree.get("sources")
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path}: has no list 'sources' (restore it from the run)")
    scores = tree.get("example_scores")
    notices += [
        f"The weights were learned with other settings {change}."
        for change in _list(tree, "settings_changed")
    ]
    return Weights(
        step=int(number_or_none(tree.get("step")) or 0),
        converged=tree.get("converged") is True,
        reason=str(tree.get("reason") or ""),
        confidence=number_or_none(tree.get("confidence")) or 0.95,
        sources=[_source_weight(entry, f"{path}: sources[{i}]") for i, entry in enumerate(entries)],
        complete=tree.get("complete", True) is not False,
        alike=_groups(tree.get("indistinguishable"), path),
        groups=[
            _source_weight(entry, f"{path}: groups[{i}]")
            for i, entry in enumerate(_list(tree, "groups"))
        ],
        levels=[level for level in _list(tree, "levels") if isinstance(level, dict)],
        sets=set_rows(_list(tree, "validation")),
        objective=str(tree.get("objective") or ""),
        examples=str(scores.get("told") or "") if isinstance(scores, dict) else "",
    )


def _groups(value: Any, path: Path) -> list[list[str]]:
    groups = value or []
    if not isinstance(groups, list) or not all(isinstance(group, list) for group in groups):
        raise UserError(f"{path}: 'indistinguishable' is not a list of lists (restore the file)")
    return [[str(name) for name in group] for group in groups]


def _list(tree: dict[str, Any], name: str) -> list[Any]:
    found = tree.get(name)
    return found if isinstance(found, list) else []


def _source_weight(entry: Any, where: str) -> SourceWeight:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise UserError(f"{where}: has no 'name' (restore the file from the run)")
    weight = number_or_none(entry.get("weight"))
    if weight is None or not 0 <= weight <= 1:
        raise UserError(
            f"{where}: 'weight' is {entry.get('weight')!r}, not a number from 0 to 1 (restore the "
            "file from the run)"
        )
    examples = number_or_none(entry.get("examples"))
    return SourceWeight(
        name=entry["name"], path=str(entry.get("path") or ""), weight=weight,
        examples=None if examples is None else int(examples),
        low=number_or_none(entry.get("ci_low")), high=number_or_none(entry.get("ci_high")),
        initial=number_or_none(entry.get("initial_weight")),
        epochs=number_or_none(entry.get("epochs")), bound=str(entry.get("bound") or ""),
    )  # fmt: skip
