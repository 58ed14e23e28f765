"""The embedded example as a newcomer runs it: right weights, junk near zero, outputs named."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "examples" / "demo"


@pytest.mark.slow
def test_text_is_reproducible_and_validation_is_held_out(tmp_path: Path) -> None:
    for name in ("a", "b"):
        command = [sys.executable, str(DEMO / "make_data.py"), str(tmp_path / name)]
        subprocess.run(command, check=True, timeout=120)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == [f"{n}.jsonl" for n in ("code", "english", "noise", "shuffled", "validation")]
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    training = set(texts(tmp_path / "a" / "english.jsonl") + texts(tmp_path / "a" / "code.jsonl"))
    assert training.isdisjoint(texts(tmp_path / "a" / "validation.jsonl"))


@pytest.mark.slow
@pytest.mark.distributed
def test_demo_finds_the_known_mixture(tmp_path: Path) -> None:
    output = tmp_path / "demo"
    command = [sys.executable, str(DEMO / "run.py"), "--output", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    said = ended.stdout + ended.stderr
    assert ended.returncode == 0, said[-4000:]

    run = output / "run"
    content = json.loads((run / "weights.json").read_text())
    learned = {source["name"]: source["weight"] for source in content["sources"]}
    known = {"english": 0.6, "code": 0.4, "shuffled": 0.0, "noise": 0.0}
    away = sum(abs(learned[name] - weight) for name, weight in known.items())
    assert away <= 0.15
    assert learned["shuffled"] < 0.03
    assert learned["noise"] < 0.03
    for name in ("weights.json", "blend.txt", "report.html", "tensorboard"):
        assert (run / name).exists()
        assert name in said
    [told] = re.findall(r"L1 distance from the known mixture: ([\d.]+)", said)
    assert float(told) == pytest.approx(away, abs=0.00051)
    for name, weight in learned.items():
        [row] = [line.split() for line in said.splitlines() if line.split()[:1] == [name]][-1:]
        assert float(row[1].strip("<%")) == pytest.approx(100 * weight, abs=0.051)


def texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
