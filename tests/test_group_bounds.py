"""Bounds of groups: what they leave to sources and groups, and which ones are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.optimize import linprog

from megatron_scalebio.config.bounds import GroupBounds, members_of_groups, ranges
from megatron_scalebio.config_loader import config_text, load_config, read_yaml
from megatron_scalebio.errors import UserError

NAMES = ["code/py/a", "text/a", "code/py/b", "code/c", "text/b", "rest"]
ENTRIES = [{"name": name, "path": "p"} for name in NAMES]


def loaded(groups: Any, data: dict[str, Any] | None = None, **of_sources: Any) -> Any:
    """A configuration; `code_c={…}` adds to the source code/c."""
    sources = [{**e, **of_sources.get(e["name"].replace("/", "_"), {})} for e in ENTRIES]
    return load_config(None, {"data": {"sources": sources, "groups": groups, **(data or {})}})


def test_groups_are_what_names_have_before_a_stroke() -> None:
    found = members_of_groups([*NAMES, "code"])
    assert found == {"code/py": [0, 2], "code": [0, 2, 3, 6], "text": [1, 4]}
    assert next(iter(found)) == "code/py", "the inner one comes first"


@pytest.mark.parametrize("seed", range(8))
def test_ranges_are_what_each_sum_can_be(seed: int) -> None:
    """Against a linear program: the least and the most of each source, and each group."""
    rng = np.random.default_rng(seed)
    low_S, high_S = rng.random(6) * 0.08, 0.2 + rng.random(6) * 0.8
    bounds = {
        "code": GroupBounds(min_weight=0.3, max_weight=0.3 + 0.4 * rng.random()),
        "code/py": GroupBounds(max_weight=0.17 + 0.2 * rng.random()),
        "text": GroupBounds(fixed_weight=0.25),
    }
    members = members_of_groups(NAMES)
    rows = [np.isin(np.arange(6), members[name]).astype(float) for name in bounds]
    above = [*rows, *(-row for row in rows)]
    ends = [*(b.high for b in bounds.values()), *(-b.low for b in bounds.values())]

    def extreme(sign: float, of: list[int]) -> float:
        cost = sign * np.isin(np.arange(6), of)
        box = list(zip(low_S, high_S, strict=True))
        return sign * linprog(cost, above, ends, np.ones((1, 6)), [1], box).fun

    of_sources, of_groups = ranges(NAMES, low_S.tolist(), high_S.tolist(), bounds)
    named = [*(([i], r) for i, r in enumerate(of_sources)),
             *((members[name], r) for name, r in of_groups.items())]  # fmt: skip
    for of, (least, most) in named:
        assert (least, most) == pytest.approx((extreme(1, of), extreme(-1, of)), abs=1e-9)


def test_a_configuration_with_groups_is_read_back(tmp_path: Any) -> None:
    config = loaded({"code": {"max_weight": 0.3}, "code/py": {"fixed_weight": "1e-1"}})
    (tmp_path / "config.yaml").write_text(config_text(config))
    assert load_config(str(tmp_path / "config.yaml")) == config
    assert "groups" in read_yaml(str(tmp_path / "config.yaml"), ("data",))["data"]
    assert (config.data.groups["code/py"].low, config.data.groups["code"].high) == (0.1, 0.3)


HALF = {"min_weight": 0.5}


@pytest.mark.parametrize(
    ("groups", "rest", "words"),
    [
        ({"cod": {"max_weight": 0.3}}, {}, "no source is in a group 'cod' (did you mean code?)"),
        ({"xyz": {"max_weight": 0.3}}, {}, "'xyz' (the groups are code, code/py, text)"),
        ({"rest": {"max_weight": 0.3}}, {}, "'rest' (it is a source: give it the bound in data.s"),
        ({"code": 0.3}, {}, "data.groups.code: 0.3 is not a mapping"),
        ({"code": None}, {}, "data.groups.code: None is not a mapping"),
        (["code"], {}, "data.groups: ['code'] is not a mapping"),
        ({"code": {"max": 0.3}}, {}, "data.groups.code: unknown key 'max' (known: min_weight"),
        ({"code": {"max_weight": 1.3}}, {}, "data.groups.code.max_weight: 1.3 is above 1"),
        ({"code": {"max_weight": 0.2, **HALF}}, {}, "code.min_weight: 0.5 is above max_weight 0.2"),
        ({"code": {"max_weight": 0.2}}, {"code_c": HALF},
         "data.groups.code.max_weight: 0.2 is below 0.5, the least that its sources may have"),
        ({"code": {"max_weight": 0.2}, "code/py": HALF}, {},
         "data.groups.code.max_weight: 0.2 is below 0.5, the least"),
        ({"text": {"fixed_weight": 0.6}}, {"text_a": {"max_weight": 0.1},
                                           "text_b": {"fixed_weight": 0.3}},
         "data.groups.text.fixed_weight: 0.6 is above 0.4, the most that its sources may have"),
        ({"text": {"fixed_weight": 0.6}, "code": HALF}, {},
         "data.groups: with the bounds of groups and sources, all weights add up to at least 1.1"),
        ({"text": {"max_weight": 0.3}, "code": {"max_weight": 0.3}}, {"rest": {"max_weight": 0.2}},
         "all weights add up to at most 0.8"),
        ({"text": {"max_weight": 0.3}}, {"text_a": {"fixed_weight": 0.3}},
         "data.groups: the bounds of groups and sources leave nothing for 'text/b'"),
        ({"text": HALF, "code": HALF}, {}, "leave nothing for 'rest'"),
    ],
)  # fmt: skip
def test_what_no_mixture_keeps_to_is_named(groups: Any, rest: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        loaded(groups, **rest)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_bounds_that_leave_one_mixture_are_refused() -> None:
    sources = [{"name": name, "path": "p"} for name in ("a/x", "b/x")]
    with pytest.raises(UserError, match="nothing to learn"):
        load_config(None, {"data": {"sources": sources, "groups": {"a": {"fixed_weight": 0.3}}}})


def test_ratios_exclude_bounds_of_groups() -> None:
    given = {"weights": "runs/first", "keep_ratios": True}
    with pytest.raises(UserError, match="keep_ratios: True and bounds of groups exclude each"):
        loaded({"code": {"max_weight": 0.3}}, given)
