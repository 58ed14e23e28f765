"""The small wrong changes that `mutants.py` makes of a file: mutmut's, and some of meaning.

mutmut (https://mutmut.readthedocs.io) changes operators, comparisons, numbers and arguments. Those
of meaning are a careless maintainer's: w for u, a copy left out, a statement dropped, two arguments
swapped, a mean for a sum.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import libcst as cst
from libcst.metadata import MetadataWrapper, ParentNodeProvider, PositionProvider
from mutmut.mutation import mutators

# Of mutmut's, all but those that put None or other text in place of something: these crash.
_MUTMUTS = {
    "operator_number", "operator_name", "operator_augmented_assignment",
    "operator_remove_unary_ops", "operator_arg_removal", "operator_symmetric_string_methods_swap",
    "operator_keywords", "operator_swap_op", "operator_if_exp",
}  # fmt: skip
# A name, or a word of one, that may be taken for another.
_OTHERS = {
    "sum": "mean", "mean": "sum", "min": "max", "max": "min", "floor": "ceil", "ceil": "floor",
    "any": "all", "all": "any", "argmax": "argmin", "zeros": "ones", "zeros_like": "ones_like",
    "maximum": "minimum", "minimum": "maximum", "hypot": "maximum", "isnan": "isinf",
    "sorted": "list", "median": "max", "first": "second", "second": "first", "low": "high",
    "high": "low", "w": "u", "u": "w", "W": "U", "U": "W", "TRAIN": "VALID", "VALID": "TRAIN",
    "train": "validation", "validation": "train", "source": "target", "target": "source",
    "s": "t", "t": "s",
}  # fmt: skip
# Methods that may be forgotten.
_IDLE = {
    "abs", "clone", "detach", "copy", "square", "sqrt", "log", "double", "float", "cpu", "to",
    "clamp", "clamp_min", "cumsum", "item", "mean", "sum", "round", "deepcopy", "tolist",
}  # fmt: skip

_SYMMETRIC = {"max", "min", "gcd", "hypot", "maximum", "minimum"}


@dataclass
class Change:
    """One node of a file replaced.

    Attributes:
        before, after: the node's text, on one line.
        within: kinds of libcst's nodes that the node is in, such as Raise.
    """

    path: Path
    line: int
    before: str
    after: str
    within: list[str]
    module: cst.Module = field(repr=False)
    node: cst.CSTNode = field(repr=False)
    new: cst.CSTNode = field(repr=False)

    def __str__(self) -> str:
        before, after = self.before, self.after
        start = _alike(before, after)
        end = max(0, _alike(before[start:][::-1], after[start:][::-1]) - 24)
        start = max(0, start - 24)
        shown = (text[start : len(text) - end] for text in (before, after))
        return f"{self.path}:{self.line}: " + "  →  ".join(shown)

    def code(self) -> str:
        return self.module.deep_replace(self.node, self.new).code  # type: ignore[attr-defined]


def _alike(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))


def changes_of(path: Path) -> list[Change]:
    source = path.read_text()
    wrapper = MetadataWrapper(cst.parse_module(source))
    finder = _Finder(set(re.findall(r"\w+", source)))
    wrapper.visit(finder)
    result = []
    for line, within, node, new in finder.found:
        before, after = (" ".join(wrapper.module.code_for_node(x).split()) for x in (node, new))
        if before != after:
            result.append(Change(path, line, before, after, within, wrapper.module, node, new))
    return result


class _Finder(cst.CSTVisitor):
    """All changes of a file: line, kinds of nodes it is in, node, what is put in its place."""

    METADATA_DEPENDENCIES = (PositionProvider, ParentNodeProvider)

    def __init__(self, words: set[str]) -> None:
        super().__init__()
        self.words = words
        self.found: list[tuple[int, list[str], cst.CSTNode, cst.CSTNode]] = []
        self._within: list[str] = []

    def on_visit(self, node: cst.CSTNode) -> bool:
        if _left_alone(node):
            return False
        for new in (*_by_mutmut(node), *self._of_meaning(node)):
            position = self.get_metadata(PositionProvider, node, None)
            line = position.start.line if position else 0
            self.found.append((line, list(self._within), node, new))
        self._within.append(type(node).__name__)
        return True

    def on_leave(self, original_node: cst.CSTNode) -> None:
        if self._within and not _left_alone(original_node):
            self._within.pop()

    def _of_meaning(self, node: cst.CSTNode) -> Iterator[cst.CSTNode]:
        if isinstance(node, cst.Float):
            yield node.with_changes(value=repr(node.evaluated_value * 1.25))
        elif isinstance(node, cst.Call):
            yield from _other_calls(node)
        elif isinstance(node, cst.SimpleStatementLine):
            if len(node.body) == 1 and _may_go(node.body[0]):
                yield node.with_changes(body=[cst.Pass()])
        elif isinstance(node, cst.SimpleString) and node.value[1:-1] in ("w", "u"):
            yield node.with_changes(value='"u"' if node.value[1:-1] == "w" else '"w"')
        elif isinstance(node, cst.Name):
            parent = self.get_metadata(ParentNodeProvider, node)
            # Not where a name is given.
            if isinstance(parent, (cst.Param, cst.FunctionDef, cst.ClassDef, cst.AssignTarget)):
                return
            if isinstance(parent, (cst.Arg, cst.AnnAssign)) and node is not parent.value:
                return
            yield from self._other_names(node)

    def _other_names(self, node: cst.Name) -> Iterator[cst.CSTNode]:
        if node.value in _OTHERS and len(node.value) > 1:
            yield node.with_changes(value=_OTHERS[node.value])
            return
        words = node.value.split("_")
        for number, word in enumerate(words):
            name = "_".join([*words[:number], _OTHERS.get(word, ""), *words[number + 1 :]])
            if word in _OTHERS and name in self.words:
                yield node.with_changes(value=name)


def _left_alone(node: cst.CSTNode) -> bool:
    if isinstance(node, (cst.Annotation, cst.Decorator, cst.Import, cst.ImportFrom)):
        return True
    if isinstance(node, cst.Arg) and node.keyword is not None and node.keyword.value == "strict":
        return True  # zip's: a check
    # A docstring.
    return isinstance(node, cst.Expr) and isinstance(node.value, cst.SimpleString)


def _by_mutmut(node: cst.CSTNode) -> Iterator[cst.CSTNode]:
    for kind, operator in mutators.mutation_operators:
        if isinstance(node, kind) and operator.__name__ in _MUTMUTS:
            for new in operator(node):
                # Not None for an argument, only an argument less.
                if not isinstance(node, cst.Call) or len(new.args) < len(node.args):  # type: ignore[attr-defined]
                    yield new


def _other_calls(node: cst.Call) -> Iterator[cst.CSTNode]:
    arguments = node.args
    if isinstance(node.func, cst.Attribute):
        if node.func.attr.value in _IDLE and not (
            isinstance(node.func.value, cst.Name)
            and node.func.value.value in ("torch", "np", "math", "copy")
        ):
            yield node.func.value
        if len(arguments) == 1 and node.func.attr.value in _OTHERS:
            yield node.with_changes(args=[])
    name = node.func.attr if isinstance(node.func, cst.Attribute) else node.func
    if isinstance(name, cst.Name) and name.value in _SYMMETRIC:
        return
    for number in range(len(arguments) - 1):
        one, other = arguments[number : number + 2]
        if one.keyword is None and other.keyword is None and not one.star and not other.star:
            swapped = [one.with_changes(value=other.value), other.with_changes(value=one.value)]
            yield node.with_changes(args=[*arguments[:number], *swapped, *arguments[number + 2 :]])


def _may_go(statement: cst.BaseSmallStatement) -> bool:
    if isinstance(statement, cst.Assign):
        target = statement.targets[0].target
        return isinstance(target, (cst.Attribute, cst.Subscript))
    if isinstance(statement, cst.Expr):
        return isinstance(statement.value, cst.Call)
    return isinstance(statement, (cst.AugAssign, cst.Del))
