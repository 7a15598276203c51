"""Ranking metrics beside hand values."""

from __future__ import annotations

import math

import pytest

from temper.core.errors import ConfigError, DataError
from temper.ops.ir_metrics import ir_values

QRELS = {"1": {"a": 1, "b": 2}, "2": {"c": 1}, "3": {"d": 1}}
RANKED = {"1": ["x", "a", "y", "b"], "2": [*map(str, range(10)), "c"]}


def test_by_hand():
    found = ir_values(QRELS, RANKED, ["MRR@10", "nDCG@10", "R@100", "MAP", "RR"])
    assert found["MRR@10"] == pytest.approx({"1": 1 / 2, "2": 0, "3": 0}), "rank 11 is beyond 10"
    assert found["RR"]["2"] == pytest.approx(1 / 11)
    gain = 1 / math.log2(3) + 2 / math.log2(5)
    best = 2 / math.log2(2) + 1 / math.log2(3)
    assert found["nDCG@10"] == pytest.approx({"1": gain / best, "2": 0, "3": 0})
    assert found["R@100"] == pytest.approx({"1": 1, "2": 1, "3": 0})
    assert found["MAP"] == pytest.approx({"1": (1 / 2 + 2 / 4) / 2, "2": 1 / 11, "3": 0})


def test_the_order_given_is_the_order_scored():
    names = [f"d{n}" for n in range(30)]
    for place, name in enumerate(names):
        found = ir_values({"q": {name: 1}}, {"q": names}, ["RR"])
        assert found["RR"]["q"] == pytest.approx(1 / (place + 1))


def test_bad_input_is_named():
    with pytest.raises(ConfigError, match="no ranking metric 'MRP@10'"):
        ir_values(QRELS, RANKED, ["MRP@10"])
    with pytest.raises(ConfigError, match="no ranking metric 'MRR@x'"):
        ir_values(QRELS, RANKED, ["MRR@x"])
    with pytest.raises(DataError, match="holds a document twice"):
        ir_values(QRELS, {"1": ["a", "a"]}, ["MAP"])
    with pytest.raises(DataError, match="No query has a judgement"):
        ir_values({}, RANKED, ["MAP"])
