"""The tables of a swarm: what is written is read, olmix' own are taken, others are refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_scalebio.errors import UserError
from megatron_scalebio.methods.swarm import Swarm
from megatron_scalebio.methods.swarm_tables import read_tables, write_tables

RATIOS = """,run,name,index,b,a
0,x1,mix-0,0,0.25,0.75
1,x2,mix-1,1,1.0,0.0
2,x3,mix-2,2,0.5,0.504
"""
METRICS = """run_id,arc,mmlu
x3,1.5,2.5
x1,1.25,2.0
x2,1.125,3.0
"""


def test_tables_of_a_run_are_read_as_they_were_written(tmp_path: Path) -> None:
    mixtures = np.random.default_rng(0).dirichlet([1, 1, 1], 5)
    losses = np.random.default_rng(1).uniform(1, 3, (5, 2))
    write_tables(tmp_path, ["a", "b", "c"], mixtures, ["x", "y"], losses)
    got = read_tables(tmp_path, ["a", "b", "c"])
    np.testing.assert_allclose(got[0], mixtures, rtol=1e-15)
    np.testing.assert_array_equal(got[1], losses)
    turned, _ = read_tables(tmp_path, ["c", "a", "b"])
    np.testing.assert_allclose(turned, mixtures[:, [2, 0, 1]], rtol=1e-15)


@pytest.mark.parametrize(("step", "advice"), [(20, "raise proxy_iters or"), (0, "needs more runs")])
def test_a_regression_that_misses_half_the_spread_is_told(step: int, advice: str) -> None:
    """Losses of 1 and 3 by the sets' weights: they differ by 1."""
    losses = np.array([[1.0, 1.0], [2.0, 6.0]])
    half, data = np.array([0.5, 0.5]), SimpleNamespace(sources=[])
    swarm = Swarm(data, half, np.eye(2), losses, np.array([0.75, 0.25]), step=step)  # type: ignore[arg-type]
    assert swarm.found(half, 0.499, {}).remarks == []
    [remark] = swarm.found(half, 0.501, {}).remarks
    assert "left out by 0.5, and they differ by 1: " in remark and advice in remark


def test_published_tables_are_joined_by_run(tmp_path: Path) -> None:
    (tmp_path / "ratios.csv").write_text(RATIOS)
    (tmp_path / "metrics.csv").write_text(METRICS)
    mixtures, losses = read_tables(tmp_path, ["a", "b"])
    assert mixtures.tolist()[:2] == [[0.75, 0.25], [0.0, 1.0]]
    assert mixtures[2] == pytest.approx([0.504 / 1.004, 0.5 / 1.004])
    assert losses.tolist() == [[1.25, 2.0], [1.125, 3.0], [1.5, 2.5]]


@pytest.mark.parametrize(
    ("table", "old", "new", "said"),
    [
        ("ratios", "b,a", "b,c", r"lacks a and has c besides"),
        ("ratios", "0.25,0.75", "0.25,0.7", r"run x1: \[0.25, 0.7\] is not a mixture"),
        ("ratios", "0.25,0.75", "-0.25,1.25", r"run x1: \[-0.25, 1.25\] is not a mixture"),
        ("ratios", "2,x3,mix-2,2,0.5,0.504\n", "", r"only one of the two tables has the runs x3"),
        ("ratios", "2,x3", "2,x1", r"line 4: run is 'x1'"),
        ("ratios", "run", "id", r"line 2: run is None"),
        ("metrics", "x1,1.25", "x1,nan", r"line 3: arc is 'nan', not a number"),
        ("metrics", "x1,1.25,2.0", "x1,1.25", r"line 3: mmlu is None, not a number"),
        ("metrics", "x1,1.25", "x1,-1", r"run x1: -1.0 is not a loss"),
        ("metrics", "run_id,arc,mmlu", "run_id,name,index", r"holds no numbers"),
    ],
)
def test_damaged_tables_are_refused_by_what_is_wrong(
    tmp_path: Path, table: str, old: str, new: str, said: str
) -> None:
    texts = {"ratios": RATIOS, "metrics": METRICS}
    assert old in texts[table]
    texts[table] = texts[table].replace(old, new)
    for name, text in texts.items():
        (tmp_path / f"{name}.csv").write_text(text)
    with pytest.raises(UserError, match=rf"{said}"):
        read_tables(tmp_path, ["a", "b"])


def test_too_few_runs_and_no_tables_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ratios.csv: cannot read it: No such file"):
        read_tables(tmp_path, ["a", "b"])
    write_tables(tmp_path, ["a", "b"], np.full((2, 2), 0.5), ["x"], np.ones((2, 1)))
    with pytest.raises(UserError, match=r"2 runs can't tell 2 sources apart \(give 3 or more\)"):
        read_tables(tmp_path, ["a", "b"])
