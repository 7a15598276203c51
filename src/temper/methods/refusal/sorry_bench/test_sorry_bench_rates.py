"""Rates, paired differences and kappa by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from temper.methods.refusal.sorry_bench import scoring, taxonomy
from temper.methods.refusal.sorry_bench.conftest import NO, UNKNOWN, YES, rows_of, scored
from temper.methods.refusal.sorry_bench.items import HumanReply, Item
from temper.ops import stats


def test_rates_by_hand() -> None:
    found = scored({"a": [True, True, False, None], "z": [False, False, False, True]})
    rows = list(scoring.rate_rows(found))
    by_class = {r.group: (r.value, r.n) for r in rows_of(rows, "fr") if r.group}
    assert by_class == {"a": (pytest.approx(2 / 3), 3), "z": (0.25, 4)}
    (total,) = rows_of(rows, "fr", group="")
    assert total.value == pytest.approx((2 / 3 + 1 / 4) / 2)
    assert total.value != pytest.approx(3 / 7), "the item mean"
    assert rows_of(rows, "refusal_rate")[0].value == pytest.approx(1 - total.value)
    assert rows_of(rows, "unscored")[0].value == pytest.approx(1 / 8)
    assert {r.group: r.value for r in rows_of(rows, "fr_domain")} == {"D": pytest.approx(2 / 3), "E": 0.25}
    wilson = stats.wilson(1, 4)
    z = rows_of(rows, "fr", group="z")[0]
    assert (z.low, z.high) == (wilson.low, wilson.high)


@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=8))
def test_the_class_mean_is_the_item_mean_when_classes_are_of_one_size(labels: list[list[bool]]) -> None:
    found = scored({f"c{i}": list(hits) for i, hits in enumerate(labels)})
    rates = [rate for rate in scoring.class_rates(found).values() if rate is not None]
    total = scoring.balanced_rate(rates)
    assert total.value == pytest.approx(np.mean(labels))
    assert total.low <= total.value + 1e-12
    assert total.value <= total.high + 1e-12


def test_unbalanced_files_use_the_class_mean_and_say_so() -> None:
    rows = list(scoring.rate_rows(scored({"a": [True], "z": [False] * 9})))
    (total,) = rows_of(rows, "fr", group="")
    assert total.value == 0.5
    assert "1 to 9 items" in total.note
    even = rows_of(list(scoring.rate_rows(scored({"a": [True], "z": [False]}))), "fr", group="")[0]
    assert even.note == ""


def test_departure_6_nothing_is_imputed() -> None:
    rows = list(scoring.rate_rows(scored({"a": [None, None], "z": [True, None]})))
    (total,) = rows_of(rows, "fr", group="")
    assert total.value == 1.0
    assert "without a" in total.note
    assert rows_of(rows, "fr", group="a")[0].value is None
    none = rows_of(list(scoring.rate_rows(scored({"a": [None]}))), "fr", group="")[0]
    assert none.value is None


def test_differences_are_paired_by_prompt() -> None:
    plain = scored({"a": [True, True, False, None]})
    changed = scored({"a": [False, True, True, True]}, "caesar")[:3] + scored({"a": [True] * 4}, "caesar")[3:]
    rows = list(scoring.delta_rows([*plain, *changed]))
    (gap,) = rows_of(rows, "delta_fr")
    assert (gap.value, gap.n, gap.split) == (pytest.approx(0.0), 3, "caesar")
    assert {r.item: r.value for r in rows_of(rows, "delta_caesar")} == {"1": -1.0, "2": 0.0, "3": 1.0}
    lone = rows_of(list(scoring.delta_rows(scored({"a": [True]}, "slang"))), "delta_fr")[0]
    assert lone.value is None


def test_item_rows_are_the_base_style_only() -> None:
    rows = list(
        scoring.item_rows([*scored({"a": [True, None], "b": [False, True]}), *scored({"a": [True]}, "slang")])
    )
    assert {r.item: r.value for r in rows_of(rows, "fulfilled")} == {"1": 1.0, "3": 0.0, "4": 1.0}
    assert {r.item: r.value for r in rows_of(rows, "fulfilled_by_class")} == {"a": 1.0, "b": 0.5}


def test_kappa_on_a_known_table() -> None:
    """Of 50: both yes 20, both no 15, judge alone 10, people alone 5. p_o .7, p_e .5, kappa .4."""
    gold = [True] * 20 + [False] * 15 + [False] * 10 + [True] * 5
    said = [True] * 20 + [False] * 15 + [True] * 10 + [False] * 5
    item = Item(1, "base", taxonomy.Category("a", ""), "p", "p")
    replies = [HumanReply(f"h{i}", item, "r", g) for i, g in enumerate(gold)]
    verdicts = [YES if s else NO for s in said]
    rows = list(scoring.agreement_rows(replies, verdicts, [YES] * 50, ("ours", "words")))
    assert rows_of(rows, "kappa", group="")[0].value == pytest.approx(0.4)
    assert rows_of(rows, "kappa", group="words")[0].value == pytest.approx(0.0)
    assert rows_of(rows, "judge_accuracy", group="ours")[0].value == pytest.approx(0.7)
    assert rows_of(rows, "judge_fpr", group="ours")[0].value == pytest.approx(10 / 25)
    assert rows_of(rows, "judge_fnr", group="ours")[0].value == pytest.approx(5 / 25)
    by_item = [r.value for r in rows_of(rows, "kappa_jackknife")]
    assert len(by_item) == 50
    assert np.mean(by_item) == pytest.approx(0.4, abs=0.01)
    gains = [r.value for r in rows_of(rows, "kappa_gain")]
    assert np.mean(gains) == pytest.approx(0.4, abs=0.02)


def test_agreement_leaves_unscored_replies_out_and_counts_them() -> None:
    item = Item(1, "base", taxonomy.Category("a", ""), "p", "p")
    replies = [HumanReply(f"h{i}", item, "r", i % 2 == 0) for i in range(4)]
    rows = list(scoring.agreement_rows(replies, [YES, NO, UNKNOWN, NO], [UNKNOWN] * 4, ("ours", "words")))
    assert rows_of(rows, "kappa", group="ours")[0].n == 3
    assert rows_of(rows, "judge_unscored", group="ours")[0].value == 0.25
    assert rows_of(rows, "kappa", group="words")[0].value is None
    assert not rows_of(rows, "kappa_gain")


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=12))
def test_jackknife_equals_leaving_each_item_out(pairs: list[tuple[bool, bool]]) -> None:
    gold, said = [g for g, _ in pairs], [s for _, s in pairs]
    n = len(pairs)
    slow = [
        n * stats.kappa(gold, said)
        - (n - 1)
        * stats.kappa([g for j, g in enumerate(gold) if j != i], [s for j, s in enumerate(said) if j != i])
        for i in range(n)
    ]
    assert scoring.jackknife_kappa(gold, said) == pytest.approx(slow)
