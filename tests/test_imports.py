"""Imports point one way: mixture → core → data, model → checkpoint → engine → methods →
commands."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import the_only_line
from tests.markov import write_source

PACKAGE = Path(__file__).resolve().parents[1] / "megatron_scalebio"

# What each part of the package may import from the package, besides itself.
LEAVES = {
    "errors", "fingerprint", "formatting", "launcher", "progress", "whole_files", "__init__",
}  # fmt: skip
BELOW = {
    "errors": set(),
    "fingerprint": set(),
    "formatting": set(),
    "launcher": {"errors"},
    "progress": set(),
    "whole_files": {"errors"},
    "__init__": {"core", "mixture"},  # the library's names, looked up when they are asked for
    "compat": set(),
    "mixture": set(),
    "core": {"compat", "mixture"},
    "config": LEAVES | {"core.options"},
    "families": set(),
    "config_loader": {"config", "families"},
    "runtime": {"compat", "config"},
    "guard": {"runtime"},
    "logs": set(),
    "report": {"logs"},
    "data": {"compat", "config", "config_loader", "core", "mixture"},
    "sample": {"config", "config_loader", "mixture", "data"},
    "model": {"compat", "config", "core", "runtime"},
    "checkpoint": {"compat", "config", "core", "data", "model", "runtime", "guard.process"},
    "convert": {"config", "config_loader", "families", "checkpoint", "core", "model", "runtime"},
    "engine": {
        "config", "config_loader", "core", "mixture", "data", "model", "checkpoint", "convert",
        "guard", "logs", "runtime",
    },
    "methods": {
        "compat", "config", "config_loader", "core", "mixture", "data", "model", "checkpoint",
        "engine", "logs", "report", "runtime",
    },
    "evaluate": {"config", "config_loader", "data", "checkpoint", "engine", "runtime"},
    "plan": {
        "compat", "config", "config_loader", "core", "mixture", "families", "data", "model",
        "runtime",
    },
    "compare": {"config", "config_loader", "report"},
    "commands": {
        "checkpoint.folder", "compare", "compat", "config", "config_loader", "convert", "data",
        "evaluate", "families", "guard", "logs", "methods", "plan", "runtime", "sample",
    },
    "cli": set(),  # stages are imported by name, when they are asked for
    "__main__": {"cli"},
}  # fmt: skip
# Private names outside `compat`: of Python and of torch.
_PRIVATE = {
    "_exit", "_current_frames", "_actions", "_record_memory_history", "_dump_snapshot", "_cdata",
    "_schema", "_overloadpacket", "_C", "_current_graph_task_id", "_get_default_store",
    "_StorageInfo", "_replace",
    "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
}  # fmt: skip


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imported(path: Path) -> set[str]:
    """Modules of the package that a file imports anywhere, without the package's name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {n if exists(n) else str(node.module) for n in whole}
    own = {n.removeprefix("megatron_scalebio").lstrip(".") for n in found if is_own(n)}
    return {name or "__init__" for name in own}


def is_own(name: str) -> bool:
    return name == "megatron_scalebio" or name.startswith("megatron_scalebio.")


def exists(name: str) -> bool:
    path = PACKAGE.parent.joinpath(*name.split("."))
    return is_own(name) and (path.is_dir() or path.with_suffix(".py").is_file())


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_module_imports_only_what_lies_below_it(path: Path) -> None:
    part = name_of(path).split(".")[0]
    allowed = BELOW[part] | LEAVES | {part}
    for name in imported(path):
        assert name.split(".")[0] in allowed or name in allowed, f"{name_of(path)} imports {name}"


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    graph = {name_of(path): imported(path) for path in modules()}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " → ".join([*above, name])
        if name in done:
            return
        for below in graph.get(name, set()):
            visit(below, (*above, name))
        done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_private_names_of_megatron_are_named_in_compat_alone(path: Path) -> None:
    if name_of(path).startswith("compat."):
        return
    tree = list(ast.walk(ast.parse(path.read_text())))
    own = {n.name for n in tree if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    own |= {n.attr for n in tree if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
    own |= {n.id for n in tree if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    used = {n.attr for n in tree if isinstance(n, ast.Attribute)}
    imports = [n for n in tree if isinstance(n, ast.ImportFrom) and not is_own(str(n.module))]
    used |= {alias.name for n in imports for alias in n.names}
    foreign = {name for name in used - own if name.startswith("_") and not name.endswith("__")}
    assert foreign <= _PRIVATE


CORE, MIXTURE = (
    [path for path in modules() if name_of(path).startswith(f"{room}.")]
    for room in ("core", "mixture")
)


@pytest.mark.parametrize("path", CORE + MIXTURE, ids=name_of)
def test_the_core_reads_no_file_prints_nothing_and_keeps_nothing(path: Path) -> None:
    """It is a library for the training loops of others: what it does to a process is its caller's
    to decide."""
    tree = ast.parse(path.read_text())
    called = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call)
              and isinstance(n.func, ast.Name)}  # fmt: skip
    assert not called & {"print", "open", "input", "exec", "eval"}
    named = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    named |= {str(n.module) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    roots = {name.split(".")[0] for name in named}
    assert not roots & {"pathlib", "os", "sys", "signal", "json", "logging", "subprocess", "atexit"}
    assert not any(isinstance(n, ast.Global) for n in ast.walk(tree)), "state of the module"
    for statement in tree.body:  # nothing is done on import but to define
        assert isinstance(
            statement,
            ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef | ast.Assign
            | ast.AnnAssign | ast.Expr,
        )  # fmt: skip
        if isinstance(statement, ast.Expr):
            assert isinstance(statement.value, ast.Constant), "a docstring"


def test_the_core_is_small() -> None:
    lines = {room: sum(len(path.read_text().splitlines()) for path in paths)
             for room, paths in (("core", CORE), ("mixture", MIXTURE))}  # fmt: skip
    assert lines["core"] < 2600 and lines["mixture"] < 1350


@pytest.mark.parametrize("path", MIXTURE, ids=name_of)
def test_the_mathematics_of_the_mixture_needs_no_ranks(path: Path) -> None:
    assert "megatron.core" not in path.read_text()
    assert "torch.distributed" not in path.read_text()


def test_commands_import_megatron_lightly() -> None:
    """Their late imports are those that load it."""
    found = 0
    for path in (PACKAGE / "commands").glob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
        blocks = [node for node in nodes if isinstance(node, ast.With)]
        blocks = [node for node in blocks if "light_imports" in ast.unparse(node.items[0])]
        late = {n for each in functions for n in ast.walk(each) if isinstance(n, ast.ImportFrom)}
        light = {n for block in blocks for n in block.body}
        assert late <= light, path
        found += len(late)
    assert found >= 10


@pytest.mark.parametrize("stage", ["reweight", "train"])
def test_a_wrong_option_does_not_wait_for_megatron(stage: str) -> None:
    code = (
        "import sys; from megatron_scalebio.cli import main; "
        f"print(main(['{stage}', '--lr', '-1']), 'torch' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert said.stdout == "2 False\n", said.stderr


@pytest.mark.parametrize(
    "part", ["errors", "formatting", "launcher", "config", "config_loader", "cli", "logs", "report"]
)
def test_light_parts_do_not_load_megatron(part: str) -> None:
    """`report` and a wrong option must not wait for torch and Megatron."""
    heavy = ("torch", "megatron", "transformers")
    folder = PACKAGE / part
    paths = sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{part}.py"]
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert not {n.split(".")[0] for n in names} & set(heavy), path


@pytest.mark.parametrize(
    "words",
    [
        "show nowhere",
        "reweight --sources a=nowhere b=nowhere --validation v=nowhere --hf model",
        "reweight --sources a=here b=here --validation v=nowhere --hf model",
        "reweight --sources a=here b=here --validation v=here --weights nowhere --hf model",
        "reweight --sources a=here b=here --validation v=here --load nowhere --hf model",
        "reweight --sources a=here b=here --validation v=here --output afile --hf model",
        "reweight --sources a=here b=here --validation v=here --num-layers 2 --hidden-size 32 "
        "--num-attention-heads 4 --pretrained-checkpoint nowhere",
        "train --sources a=nowhere --hf model",
        "train --sources a=here --test t=nowhere --hf model",
        "train --sources a=here --blend-schedule nowhere --hf model",
        "evaluate --test t=nowhere --hf model",
        "evaluate --test t=here --load nowhere --hf model",
        "sample --weights nowhere --num-samples 2 --out out",
        "sample --weights a=1 --input a=nowhere --num-samples 2 --out out",
        "sample --weights a=1 --input a=here --exclude nowhere --num-samples 2 --out out",
        "sample --weights a=1 --input a=here --num-samples 2 --out afile --overwrite",
        "convert import --hf nowhere --save out",
        "convert import --hf model --save afile",
        "convert export --load nowhere --hf-reference model --save out",
    ],
)
def test_a_wrong_path_does_not_wait_for_torch(words: str, tmp_path: Path) -> None:
    """Nor leaves anything behind."""
    write_source(tmp_path, "here", [[1, 2, 3]])
    (tmp_path / "afile").write_text("kept")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    code = (
        "import sys; from megatron_scalebio.cli import main; "
        "print(main(sys.argv[1:]), {'torch', 'megatron.core'} & {*sys.modules})"
    )
    said = subprocess.run(
        [sys.executable, "-c", code, *words.split()], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
    )  # fmt: skip
    assert said.stdout == "2 set()\n", said.stderr
    wrong = "afile" if "afile" in words else "nowhere"
    assert wrong in the_only_line(said.stderr)
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "afile").read_text() == "kept"
