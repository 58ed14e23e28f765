"""Which Python `make` takes, and that what a machine lacks is said in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "tools" / "environment.sh"
TOO_OLD = "#!/bin/sh\nexit 1\n"  # runs, and says no to the question for its version
STAND_IN = "#!/bin/sh\necho 'pyenv: python3.12: command not found' >&2\nexit 127\n"


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A folder for the PATH and one for the home, with nothing but what any shell has."""
    (tmp_path / "bin").mkdir()
    return tmp_path


def program(path: Path, text: str = "") -> Path:
    """A program of that text; without one, the Python of these tests."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text or f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    path.chmod(0o755)
    return path


def ask(machine: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": f"{machine / 'bin'}:/usr/bin:/bin", "HOME": str(machine / "home")}
    return subprocess.run(
        ["bash", str(SCRIPT), *words], env={**environment, **variables}, text=True,
        capture_output=True, timeout=120,
    )  # fmt: skip


@pytest.mark.skipif(os.path.exists("/usr/bin/python3.12"), reason="this one would be found")
def test_the_first_that_runs_and_is_new_enough_is_taken(machine: Path) -> None:
    program(machine / "bin" / "python3.12", STAND_IN)
    program(machine / "bin" / "python3", TOO_OLD)
    third = program(machine / "home" / ".pyenv" / "versions" / "3.13.9" / "bin" / "python3.13")
    assert ask(machine, "--python").stdout.strip() == str(third)
    second = program(machine / "bin" / "python3.13")
    assert ask(machine, "--python").stdout.strip() == str(second)
    first = program(machine / "home" / ".pyenv" / "versions" / "3.12.1" / "bin" / "python3.12")
    assert ask(machine, "--python").stdout.strip() == str(first)


def test_the_python_that_is_named_is_taken_or_refused(machine: Path) -> None:
    program(machine / "bin" / "python3.13")
    named = program(machine / "mine")
    assert ask(machine, "--python", PYTHON=str(named)).stdout.strip() == str(named)
    old = program(machine / "old", TOO_OLD)
    refused = ask(machine, "--python", PYTHON=str(old))
    [line] = refused.stderr.splitlines()
    assert refused.returncode == 2 and f"no Python 3.12 or 3.13 at {old} (install" in line


def test_a_machine_without_one_is_told_what_to_install(machine: Path) -> None:
    if ask(machine, "--python").returncode == 0:
        pytest.skip("the system's own python3 is new enough")
    program(machine / "bin" / "uv", "#!/bin/sh\nexit 1\n")  # it is there, and can't fetch
    refused = ask(machine, str(machine / "environment"))
    [line] = refused.stderr.splitlines()
    assert refused.returncode == 2
    assert "uv could not fetch one (install python3.12 with its venv module, or name one" in line
