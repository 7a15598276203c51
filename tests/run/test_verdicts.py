from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from temper.core.card import Claim
from temper.core.types import Row
from temper.run.unseen import SEEN
from temper.run.verdicts import judge_claim, select


def claim(**changes):
    return Claim(
        **(
            {"id": "c", "sentence": "s", "metric": "m", "arm": "a", "baseline": "b", "direction": "higher"}
            | changes
        )
    )


def seeds(arm, values, **changes):
    return [
        Row(metric="m", value=v, arm=arm, facts={"seed": s, "step": "t"}, **changes)
        for s, v in enumerate(values)
    ]


def items(arm, values, seed=0):
    return [
        Row(metric="m", value=v, arm=arm, item=f"i{n}", facts={"seed": seed, "step": "t"})
        for n, v in enumerate(values)
    ]


def test_paired_seeds_by_hand():
    found = judge_claim(claim(), seeds("a", [3.0, 5.0, 4.0]) + seeds("b", [1.0, 2.0, 3.0]))
    # Differences 2, 3, 1: mean 2, s.e. 1/sqrt(3), t(0.975, 2) = 4.3027.
    half = 4.302652729911275 / math.sqrt(3)
    assert found.difference == pytest.approx(2)
    assert (found.low, found.high) == pytest.approx((2 - half, 2 + half))
    assert (found.verdict, found.pairing, found.n, found.seeds) == ("not shown", "seeds", 3, (0, 1, 2))
    assert [arm.mean for arm in found.arms] == [4.0, 2.0]


@pytest.mark.parametrize(
    ("direction", "margin", "verdict"),
    [
        ("higher", 0.0, "shown"), ("lower", 0.0, "contradicted"), ("higher", 2.0, "contradicted"),
        ("higher", 1.0, "not shown"), ("higher", -0.5, "shown"), ("lower", -2.0, "shown"), ("lower", -0.5, "contradicted"),
    ],
)  # fmt: skip
def test_direction_and_margin(direction, margin, verdict):
    rows = seeds("a", [2.0, 2.1, 1.9]) + seeds("b", [1.0, 1.0, 1.0])
    assert judge_claim(claim(direction=direction, margin=margin), rows).verdict == verdict


def test_one_seed_shows_nothing():
    found = judge_claim(claim(), seeds("a", [9.0]) + seeds("b", [1.0]))
    assert (found.verdict, found.reason, found.difference) == ("not shown", "one seed", 8.0)


def test_items_are_averaged_over_seeds_and_then_paired():
    rows = (
        items("a", [1.0, 2.0, 3.0, 4.0, 1.0, 1.0])
        + items("a", [3.0, 2.0, 3.0, 6.0, 1.0, 1.0], seed=1)
        + items("b", [0.0] * 6)
        + items("b", [0.0] * 6, seed=1)
    )
    found = judge_claim(claim(), rows)
    assert (found.pairing, found.n) == ("items", 6)
    assert found.difference == pytest.approx((2 + 2 + 3 + 5 + 1 + 1) / 6)
    assert found.verdict == "shown"
    assert judge_claim(claim(), rows) == found


def test_items_without_a_value_or_a_partner_do_not_count():
    rows = items("a", [1.0, None, 3.0, 4.0, 4.0, 4.0, 4.0, 9.0]) + items("b", [0.0] * 7)
    found = judge_claim(claim(), rows)
    assert (found.pairing, found.n, found.difference) == ("items", 6, pytest.approx(20 / 6))


def test_few_items_are_judged_by_seeds():
    """Three items that agree would look certain to a bootstrap: every resample lies on one side."""
    alone = items("a", [1.0, 2.0, 3.0]) + items("b", [0.0] * 3)
    found = judge_claim(claim(), alone)
    assert (found.verdict, found.pairing, found.n) == ("not shown", "seeds", 1)
    rows = alone + [
        row
        for seed in (1, 2)
        for row in items("a", [1.0, 2.0, 3.1, 50.0], seed=seed) + items("b", [0.0] * 3, seed=seed)
    ]
    found = judge_claim(claim(), rows)
    assert (found.verdict, found.pairing, found.n) == ("shown", "seeds", 3)
    assert found.difference == pytest.approx(2.0, abs=0.05), "the item that b lacks is left out"


def test_few_items_are_not_mixed_with_other_splits_or_with_what_an_attack_saw():
    rows = [
        row
        for seed in (0, 1, 2)
        for row in (
            *(replace(r, split="test") for r in items("a", [1.0, 2.0 + seed / 9], seed=seed)),
            *(replace(r, split="val") for r in items("a", [50.0], seed=seed)),
            *(replace(r, split="test", group=SEEN) for r in items("a", [90.0] * 9, seed=seed)),
        )
    ]
    found = judge_claim(claim(baseline=0.0), rows)
    assert (found.pairing, found.n) == ("seeds", 3)
    assert found.difference == pytest.approx(1.5, abs=0.06)


def test_only_seeds_that_both_arms_have_count():
    rows = items("a", [1.0] * 6) + items("a", [9.0] * 6, seed=1) + items("b", [0.0] * 6)
    found = judge_claim(claim(), rows)
    assert (found.difference, found.seeds) == (1.0, (0,))
    seen = items("a", [9.0] + [1.0] * 6) + items("a", [None] + [1.0] * 6, seed=1)
    base = items("b", [8.0] + [0.0] * 6) + items("b", [2.0] + [0.0] * 6, seed=1)
    assert judge_claim(claim(), seen + base).difference == 1.0, "an item's baseline is of the same seeds"
    means = seeds("a", [1.0, 1.1, 9.0]) + seeds("b", [0.0, 0.0])
    assert judge_claim(claim(), means).difference == pytest.approx(1.05)


def test_a_number_as_baseline():
    assert judge_claim(claim(baseline=0.5), seeds("a", [0.9, 0.91, 0.92])).verdict == "shown"
    assert judge_claim(claim(baseline=0.95), seeds("a", [0.9, 0.91, 0.92])).verdict == "contradicted"


def test_missing_rows_say_what_there_is():
    assert "arms with rows: b, c" in judge_claim(claim(), seeds("b", [1.0]) + seeds("c", [1.0])).reason
    assert "baseline 'b'" in judge_claim(claim(), seeds("a", [1.0])).reason
    assert judge_claim(claim(), []).verdict == "not shown"


def test_test_split_and_whole_set_are_preferred():
    rows = []
    for arm, value in (("a", 2.0), ("b", 1.0)):
        rows += seeds(arm, [value, value + 0.01], split="test")
        rows += seeds(arm, [9.0, 9.0], split="val") + seeds(arm, [7.0, 7.0], split="test", group="g")
    assert judge_claim(claim(), rows).difference == pytest.approx(1.0)


def test_a_metric_that_stands_twice_is_not_guessed_at():
    rows = seeds("a", [1.0, 2.0]) + seeds("a", [3.0, 4.0]) + seeds("b", [0.0, 0.0])
    assert "more than once" in judge_claim(claim(), rows).reason


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=2, max_size=12), st.integers(-3, 3))
def test_swapping_arms_and_direction_gives_the_same_verdict(pairs, shift):
    a, b = [p[0] + shift for p in pairs], [p[1] for p in pairs]
    one = judge_claim(claim(), seeds("a", a) + seeds("b", b))
    other = judge_claim(claim(arm="b", baseline="a", direction="lower"), seeds("a", a) + seeds("b", b))
    assert one.verdict == other.verdict


def fact(arm, seed, condition, run, value):
    facts = {"seed": seed, "condition": condition, "run": run, "cell_arm": arm}
    return Row(metric="m", value=value, arm=arm, facts=facts)


def test_only_the_last_settings_and_runs_count():
    rows = [
        fact("a", 0, "old", "r1", 1.0), fact("a", 1, "old", "r1", 2.0), fact("b", 0, "x", "r1", 3.0),
        fact("a", 0, "new", "r2", 4.0), fact("a", 1, "new", "r3", 5.0), fact("a", 0, "new", "r4", 6.0),
    ]  # fmt: skip
    assert [row.value for row in select(rows)] == [3.0, 5.0, 6.0]
