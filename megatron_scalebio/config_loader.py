"""Fills `config.Config` from defaults < YAML file < command-line flags, and writes it back.

Both ways in share one converter, so a flag and a YAML value are checked and refused alike.
"""

import argparse
import copy
import difflib
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, asdict, fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from megatron_scalebio.config import (
    SECTIONS,
    Config,
    DataConfig,
    ModelConfig,
    SourceConfig,
    ValidationConfig,
)
from megatron_scalebio.config.checks import Quantity
from megatron_scalebio.config.presets import PRESETS
from megatron_scalebio.config.source_lists import with_sources_listed
from megatron_scalebio.errors import UserError
from megatron_scalebio.families import read_family

# Options of the model section that are not the architecture's.
_FREE_WITH_HF = {
    "hf", "make_vocab_size_divisible_by", "init_method_std", "hidden_dropout",
    "attention_dropout", "transformer_impl", "pretrained_checkpoint", "moe_aux_loss_coeff",
    "moe_z_loss_coeff", "moe_router_load_balancing_type", "moe_router_bias_update_rate",
    "moe_router_dtype", "moe_token_dispatcher_type",
}  # fmt: skip


def load_config(
    path: str | None,
    overrides: dict[str, dict[str, Any]] | None = None,
    from_flags: bool = False,
    before_model: Callable[[Config], None] | None = None,
) -> Config:
    """Reads a YAML file (None: defaults only) and lays section-wise overrides over it.

    Args:
        from_flags: the overrides are command-line flags, and are refused under those names.
        before_model: is given the configuration without the model, which is read last: a Hugging
            Face folder takes seconds.

    Raises:
        UserError: for a missing or malformed file, an unknown key (with the nearest known one),
            or a value of the wrong type.
    """
    tree = read_yaml(path, known=SECTIONS) if path else {}
    where = path or "command line"
    _check_keys(tree, SECTIONS, where)
    given: dict[str, dict[str, Any]] = {}
    for name in SECTIONS:
        values = tree.get(name) or {}
        if not isinstance(values, dict):
            raise UserError(f"{where}: {name}: {values!r} is not a mapping")
        if name == "model" and path:
            values = _with_file(values, Path(path))
        given[name] = {**values, **(overrides or {}).get(name, {})}
    preset = _preset(given)
    sections: dict[str, Any] = {}
    for name in [*(name for name in SECTIONS if name != "model"), "model"]:
        cls = typing.get_type_hints(Config)[name]
        if cls is ModelConfig and before_model:
            before_model(Config(**sections))
        merged = {**preset.get(name, {}), **given[name]}
        section_where = f"{where}: {name}"
        make = build if cls is not ModelConfig or not merged.get("hf") else _model_from_hf
        try:
            if cls is DataConfig:
                merged = with_sources_listed(merged, section_where)
            sections[name] = make(cls, merged, section_where)
        except UserError as error:
            flags = (overrides or {}).get(name, {}) if from_flags else {}
            raise _under_its_flag(error, section_where, flags) from None
    return Config(**sections)


def _with_file(model: dict[str, Any], path: Path) -> dict[str, Any]:
    """The model section of the file that `file` names, if it does, and over it what is beside.

    Args:
        path: the file that `model` is from; `file` is relative to it.
    """
    if "file" not in model:
        return model
    name, *beside = (model["file"], *(key for key in model if key != "file"))
    other = path.parent / str(name)
    if not other.is_file():
        raise UserError(f"{path}: model.file: {name!r}: {other} is not a file (name a YAML file)")
    tree = read_yaml(str(other), known=("model",))
    _check_keys(tree, ("model",), str(other))
    if not isinstance(tree.get("model"), dict) or "file" in tree["model"]:
        raise UserError(f"{other}: needs a section `model` of plain options (write them there)")
    return {**tree["model"], **{key: model[key] for key in beside}}


def _under_its_flag(error: UserError, where: str, flags: Iterable[str]) -> UserError:
    """The refusal of a field by the name of its flag, if that is where its value came from."""
    said = str(error)
    for name in flags:
        head = f"{where}.{name}"
        if said.startswith((f"{head}:", f"{head}[")):
            return UserError("--" + name.replace("_", "-") + said.removeprefix(head))
    return error


def _preset(given: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The options of the preset that is asked for; an unknown name is refused with its section."""
    name = given["bilevel"].get("preset")
    preset = copy.deepcopy(PRESETS[name]) if isinstance(name, str) and name in PRESETS else {}
    if "train_iters" in given["train"]:
        preset.get("train", {}).pop("train_epochs", None)
    return preset


def config_text(config: Config) -> str:
    """The resolved configuration as YAML that `load_config` reads back unchanged."""
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    return yaml.dump(asdict(config), Dumper=dumper, sort_keys=False, allow_unicode=True)


class _TwiceError(yaml.constructor.ConstructorError):
    """A key that a mapping has twice."""


_FASTEST: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_FASTEST):
    """Refuses a key that stands twice: YAML forbids it, and PyYAML lets the last one win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise _TwiceError(None, None, f"{key.value!r} stands twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: str, known: Iterable[str]) -> dict[str, Any]:
    """The mapping that a YAML file holds; `known` are the keys that it may have.

    Raises:
        UserError: for a missing or malformed file, or something else than a mapping.
    """
    try:
        tree = yaml.load(Path(path).read_text(), Loader=_Loader)
    except OSError as error:
        raise UserError(error.strerror or str(error), where=path, fix="check --config") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "is not text"
        raise UserError(
            f"not valid YAML: {problem}", where=f"{path}{line}", fix=_mend(error)
        ) from None
    if tree is None:
        raise UserError(f"{path}: is empty (write the sections, or leave --config out)")
    if not isinstance(tree, dict):
        raise UserError(
            f"{path}: holds no sections (begin with one of {', '.join(known)}, and ':')"
        )
    for mark, kind, command in (
        ("data", "a run", "reweight"),
        ("methods", "a comparison", "compare"),
    ):
        if mark in tree and mark not in known:
            raise UserError(
                f"{path}: is the file of {kind} (megatron-scalebio {command} takes it; see "
                "docs/methods.md)"
            )
    return tree


def _mend(error: Exception) -> str:
    """What to do about a file that is not YAML."""
    if isinstance(error, _TwiceError):
        return "keep one of them"
    context, mark = getattr(error, "context", None) or "", getattr(error, "context_mark", None)
    for started, what in (("flow", "bracket"), ("quoted", "quote")):
        if started in context and mark:
            return f"is the {what} that line {mark.line + 1} opens closed?"
    return "check its indentation, and that names end in a colon and a space"


def _check_keys(values: dict[str, Any], known: Iterable[str], where: str) -> None:
    known = list(known)
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            fix = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            raise UserError(f"{where}: unknown key {key!r} ({fix})")


_hints = lru_cache(typing.get_type_hints)


def build(cls: type, values: dict[str, Any], where: str) -> Any:
    """An instance of a dataclass from plain values, each checked against its field's type."""
    hints = _hints(cls)
    _check_keys(values, hints, where)
    converted = {k: _convert(v, hints[k], f"{where}.{k}") for k, v in values.items()}
    for spec in fields(cls):
        required = spec.default is MISSING and spec.default_factory is MISSING
        if required and spec.name not in converted:
            raise UserError(f"{where}: {spec.name} is missing (add it)")
    try:
        return cls(**converted)
    except UserError as error:
        raise UserError(f"{where}.{error}") from None


def _model_from_hf(cls: type, values: dict[str, Any], where: str) -> ModelConfig:
    """The model of a Hugging Face folder; values given beside it must not say otherwise."""
    _convert(values["hf"], str, f"{where}.hf")
    _, architecture = read_family(values["hf"])
    build(ModelConfig, architecture, f"{values['hf']}: model")  # refuses what is wrong there
    free = {key: value for key, value in values.items() if key in _FREE_WITH_HF}
    model = build(ModelConfig, {**architecture, **free}, where)
    # Without experts their other options would be refused.
    experts = {key: architecture[key] for key in ("num_experts",) if key in architecture}
    given = build(ModelConfig, {**experts, **values}, where)
    for key in values.keys() - free.keys():
        ours, theirs = getattr(given, key), getattr(model, key)
        if ours != theirs:
            raise UserError(
                f"{where}.{key}: {ours!r} is not {theirs!r}, as in {values['hf']} (remove {key})"
            )
    return model


def _convert(value: Any, hint: Any, where: str) -> Any:
    """Checks one value against its type; ints pass for floats, '1e-4' (a YAML string) as float."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        kinds = [a for a in args if a is not type(None)]
        mappings = [a for a in kinds if isinstance(value, dict) and typing.get_origin(a) is dict]
        return _convert(value, [*mappings, *kinds][0], where)
    if origin is typing.Literal:
        if value not in args:
            raise UserError(f"{where}: {value!r} is not a choice (choose from {', '.join(args)})")
        return value
    if origin is list:
        if args[0] is int and isinstance(value, (int, str)):
            try:
                value = _whole_numbers(str(value))  # as a flag reads it
            except argparse.ArgumentTypeError as error:
                raise UserError(f"{where}: {error} (write [a, b])") from None
        if not isinstance(value, list):
            raise UserError(f"{where}: {value!r} is not a list (write [a, b])")
        return [_convert(item, args[0], f"{where}[{n}]") for n, item in enumerate(value)]
    if origin is dict or is_dataclass(hint):
        if not isinstance(value, dict):
            raise UserError(f"{where}: {value!r} is not a mapping (write {{name: value}})")
        if origin is dict:
            return {str(k): _convert(v, args[1], f"{where}.{k}") for k, v in value.items()}
        return build(typing.cast(type, hint), value, where)
    return _convert_scalar(value, hint, where)


_WANTED: dict[type, str] = {
    dict: "a section of options, {name: value}",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text in quotes",
    Quantity: "a number, or one such as 20B",
}


def _convert_scalar(value: Any, hint: type, where: str) -> Any:
    if hint is Quantity and not isinstance(value, bool):
        try:
            return float(Quantity(value))
        except ValueError:
            pass
    elif hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    elif value == "":
        raise UserError(f"{where}: '' is empty (give text, or leave it out)")
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    kind = "float" if hint is Quantity else hint.__name__
    raise UserError(f"{where}: {value!r} is not of type {kind} (give {_WANTED[hint]})")


def _named_path(word: str) -> dict[str, str]:
    """`NAME=PATH` as the dictionary that YAML would have held."""
    name, _, path = word.partition("=")
    if not name or not path:
        raise argparse.ArgumentTypeError(f"{word!r} is not NAME=PATH")
    return {"name": name, "path": path}


class _NamedWeights(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        weights = {}
        for word in values:
            name, _, number = word.rpartition("=")
            try:
                weights[name] = float(number)
            except ValueError:
                parser.error(f"argument {option}: {word!r} is not NAME=WEIGHT")
        setattr(namespace, self.dest, weights)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One flag per configuration field, grouped by section; unset flags leave no trace."""
    parser.add_argument("--config", help="YAML file with the sections " + ", ".join(SECTIONS))
    for name, section in SECTIONS.items():
        cls = typing.get_type_hints(Config)[section.name]
        group = parser.add_argument_group(name)
        hints = typing.get_type_hints(cls)
        for spec in fields(cls):
            if spec.name in ("rope_scaling", "groups"):  # several values: in YAML only
                continue
            flag = "--" + spec.name.replace("_", "-")
            help_text = (spec.metadata["help"] + _default_text(spec)).replace("%", "%%")
            keywords: dict[str, Any] = {"default": argparse.SUPPRESS, "help": help_text}
            keywords["dest"] = f"{name}.{spec.name}"
            keywords.update(_flag_type(hints[spec.name]))
            group.add_argument(flag, **keywords)


def _default_text(spec: Field) -> str:
    """The default as help texts have it; one that follows from other options is in the text."""
    value = spec.default
    if value is MISSING or value is None or "[" in spec.metadata["help"]:
        return ""
    return f" [{'on' if value is True else 'off' if value is False else value}]"


def _whole_numbers(text: str) -> list[int]:
    """`1,2`, `(1,2)` or `[1,2]`, as Megatron-LM's flags take them."""
    try:
        return [int(number) for number in text.strip("()[]").split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not N,N") from None


def _flag_type(hint: Any) -> dict[str, Any]:
    args = [a for a in typing.get_args(hint) if a is not type(None)]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint, args = args[0], list(typing.get_args(args[0]))
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(hint) is typing.Literal:
        return {"choices": args}
    if args and args[0] is int:
        return {"type": _whole_numbers, "metavar": "N,N"}
    if args and args[0] in (SourceConfig, ValidationConfig):
        return {"type": _named_path, "nargs": "+", "metavar": "NAME=PATH"}
    if typing.get_origin(hint) is dict:
        return {"action": _NamedWeights, "nargs": "+", "metavar": "NAME=WEIGHT"}
    return {"type": hint, "metavar": {int: "N", float: "X", Quantity: "N"}.get(hint, "TEXT")}


def config_from_args(
    args: argparse.Namespace, before_model: Callable[[Config], None] | None = None
) -> Config:
    """The configuration that the parsed flags of `add_arguments` describe; see `load_config`."""
    overrides: dict[str, dict[str, Any]] = {}
    for dest, value in vars(args).items():
        section, dot, key = dest.partition(".")
        if dot:
            overrides.setdefault(section, {})[key] = value
    return load_config(getattr(args, "config", None), overrides, True, before_model)
