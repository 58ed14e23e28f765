"""sdist and wheel: built, installed into environments that hold only what they declare, and used
from another folder."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import megatron_scalebio

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TOKENIZER = ROOT / "tokenizers" / "english-code-1k.model"
BUILD = (
    "import setuptools.build_meta as b, sys; print(getattr(b, 'build_' + sys.argv[1])(sys.argv[2]))"
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that is built from the unpacked sdist."""
    folder = tmp_path_factory.mktemp("dist")
    ignored = shutil.ignore_patterns(
        ".git", ".venv", "tests", "build", "*.egg-info", "*-run", "runs"
    )
    shutil.copytree(ROOT, folder / "checkout", ignore=ignored)
    with tarfile.open(folder / built(folder / "checkout", "sdist", folder)) as sdist:
        sdist.extractall(folder / "unpacked", filter="data")
    [source] = (folder / "unpacked").iterdir()
    return folder / built(source, "wheel", folder)


def built(source: Path, kind: str, into: Path) -> str:
    command = [sys.executable, "-c", BUILD, kind, str(into)]
    return subprocess.run(
        command, cwd=source, check=True, capture_output=True, text=True
    ).stdout.splitlines()[-1]


def environment(
    folder: Path, wheel: Path | None, extra: str, *more: str, without: str = ""
) -> Path:
    """A new environment with the wheel, and of this one's packages those that it declares."""
    venv.create(folder, symlinks=True)
    [packages] = (folder / "lib").glob("python*/site-packages")
    wanted = [Requirement(line) for line in PROJECT["dependencies"]]
    wanted += [Requirement(line) for line in PROJECT["optional-dependencies"].get(extra, [])]
    wanted += [Requirement(name) for name in more]
    done: set[tuple[str, ...]] = set()
    while wanted:
        requirement = wanted.pop()
        asked = (requirement.name, *sorted(requirement.extras))
        if requirement.name == without or asked in done:
            continue
        done.add(asked)
        found = importlib.metadata.distribution(requirement.name)
        assert requirement.specifier.contains(found.version, prereleases=True), requirement
        for top in {file.parts[0] for file in found.files or []} - {"..", "__pycache__"}:
            if not (packages / top).exists():
                (packages / top).symlink_to(Path(str(found.locate_file(top))))
        for each in map(Requirement, found.requires or []):
            extras = ("", *requirement.extras)
            if each.marker is None or any(each.marker.evaluate({"extra": e}) for e in extras):
                wanted.append(each)
    if wheel is None:
        return folder / "bin"
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install"]
    quiet = ["--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
    subprocess.run([*pip, *quiet, wheel], check=True)
    return folder / "bin"


def ran(folder: Path, *command: object, **variables: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [str(word) for word in command], cwd=folder, capture_output=True, text=True, timeout=300,
        env={**clean, "OMP_NUM_THREADS": "1", **variables},
    )  # fmt: skip


def said(folder: Path, *command: object) -> str:
    done = ran(folder, *command)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_command_learns_a_mixture_from_outside_the_checkout(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = environment(tmp_path / "environment", wheel, "cli") / "megatron-scalebio"
    assert said(tmp_path, command, "--version") == megatron_scalebio.__version__ + "\n"
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    said(tmp_path, "bash", ROOT / "tests" / "first_run.sh", TOKENIZER)
    assert len(json.loads((tmp_path / "runs/first/weights.json").read_text())["sources"]) == 2


def test_an_environment_that_has_pytorch_keeps_it(wheel: Path, tmp_path: Path) -> None:
    """What the Dockerfile runs in NVIDIA's image."""
    bin_folder = environment(tmp_path / "environment", None, "cli", "pip", "setuptools")
    [packages] = (tmp_path / "environment" / "lib").glob("python*/site-packages")
    before = sorted(path.name for path in packages.iterdir())
    shutil.copytree(wheel.parent / "checkout", tmp_path / "checkout")
    environ = {"PYTHON": str(bin_folder / "python"), "EXTRAS": "cli", "PIP_NO_INDEX": "1"}
    shown = ran(tmp_path, "bash", "checkout/tools/install.sh", **environ)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.splitlines()[-1] == megatron_scalebio.__version__
    new = {path.name for path in packages.iterdir()} - {*before}
    assert {name.partition("-")[0] for name in new} == {"megatron_scalebio"}
    empty = environment(tmp_path / "bare", None, "nothing", without="torch")
    refused = ran(tmp_path, "bash", "checkout/tools/install.sh", PYTHON=str(empty / "python"))
    assert refused.returncode == 1 and "install: error: PyTorch is not here" in refused.stderr


def test_the_library_does_without_the_command_lines_packages(wheel: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "environment", wheel, "nothing more") / "python"
    everything = (
        "import importlib, pkgutil, megatron_scalebio.core as core, megatron_scalebio as package\n"
        "from megatron_scalebio import ScaleBiO, BlendSampler\n"
        "for each in pkgutil.iter_modules(core.__path__):\n"
        "    importlib.import_module(core.__name__ + '.' + each.name)\n"
        "from megatron_scalebio.compat import adapt; adapt(); print(package.__file__)"
    )
    assert str(tmp_path / "environment") in said(tmp_path, python, "-c", everything)
    refused = ran(tmp_path, python, "-m", "megatron_scalebio", "prepare")
    [line] = refused.stderr.splitlines()
    assert refused.returncode == 2 and line.endswith("(pip install 'megatron-scalebio[cli]')")


def test_what_is_not_code_comes_along(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        [metadata] = (name for name in names if name.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
    here = [
        path for path in (ROOT / "megatron_scalebio").rglob("*") if "__pycache__" not in path.parts
    ]
    assert {str(path.relative_to(ROOT)) for path in here if path.is_file()} <= set(names)
    assert all(name.startswith("megatron_scalebio") for name in names), "nothing beside the package"
    assert {"LICENSE", "NOTICE"} <= {Path(name).name for name in names}
    assert "License-Expression: Apache-2.0" in text


def test_one_version_everywhere() -> None:
    version = re.escape(megatron_scalebio.__version__)
    assert re.search(rf"^version: {version}$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    [newest, *_] = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert re.match(rf"{version}\b", newest)
