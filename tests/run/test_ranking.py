"""Ranked arms: places by mean rank, paired tests against the first, and what a column must say."""

import json
from dataclasses import replace

import pytest

from temper.core.errors import ConfigError, DataError
from temper.core.types import Row
from temper.run.plan import Request, make_plan
from temper.run.ranking import Column, columns_from, columns_record, parse_rank, rank_arms, rank_lines
from temper.run.recipe import parse_recipe


def rows(arm, values, metric="kept", better=True, seed=0, **facts):
    facts = {"seed": seed, "step": "score", **facts}
    items = [
        Row(metric=metric, value=v, item=str(n), arm=arm, higher_is_better=better, facts=facts)
        for n, v in enumerate(values)
    ]
    mean = sum(values) / len(values)
    return [
        Row(metric=metric, value=mean, n=len(values), arm=arm, higher_is_better=better, facts=facts),
        *items,
    ]


def attacked(arm, values, **label):
    label = {
        "opponent": "relearn",
        "budget": {"num_steps": 20},
        "defended": True,
        "look": "score",
        "arm": arm,
        **label,
    }
    return rows(f"{arm}/relearn", values, "known", False, step=f"score-{arm}", against=label)


KEPT = Column(metric="kept", name="kept")
UNDER = Column(metric="known", name="relearn", under="relearn num_steps 20")
LOW = [0.10, 0.12, 0.11, 0.13, 0.12, 0.10, 0.11, 0.12]
HIGH = [value + 0.5 + 0.01 * n for n, value in enumerate(LOW)]


def test_places_are_mean_ranks_and_tests_are_paired_against_the_first():
    found = rank_arms(
        [
            *rows("bad", LOW), *rows("good", HIGH), *rows("same", HIGH),
            *attacked("bad", HIGH), *attacked("good", LOW), *attacked("same", LOW[::-1]),
            *attacked("good", HIGH, defended=False),
        ],
        [KEPT, UNDER],
    )  # fmt: skip
    assert [(line.arm, line.mean_rank) for line in found.lines] == [
        ("good", 1.5),
        ("same", 1.5),
        ("bad", 3.0),
    ]
    assert found.num_tests == 4
    good, same, bad = (line.cells for line in found.lines)
    assert good[0].p is None
    assert good[1].value == pytest.approx(sum(LOW) / 8)
    assert same[0].p == 1.0
    assert bad[0].difference == pytest.approx(-0.535)
    # Eight pairs that all point one way: two of 2^8 sign flips; the least of four under Holm.
    assert bad[0].p == pytest.approx(4 * 2 / 256)
    assert (bad[0].n, bad[0].pairing) == (8, "items")


def test_items_are_averaged_over_seeds_and_seeds_pair_what_has_no_items():
    many = [row for seed in (0, 1, 2) for row in rows("a", HIGH, seed=seed)]
    many += [row for seed in (0, 1, 2) for row in rows("b", LOW, seed=seed)]
    (_, second) = rank_arms(many, [KEPT]).lines
    assert second.cells[0].n == 8
    whole = [row for row in many if row.item is None]
    (_, second) = rank_arms(whole, [KEPT]).lines
    assert (second.cells[0].n, second.cells[0].pairing) == (3, "seeds")
    one = [row for row in whole if row.facts["seed"] == 0]
    assert rank_arms(one, [KEPT]).lines[1].cells[0].p is None


def test_an_arm_without_a_value_comes_last():
    found = rank_arms(
        [*rows("a", LOW), *rows("b", HIGH), *attacked("a", LOW), *attacked("c", HIGH)], [KEPT, UNDER]
    )
    by_arm = {line.arm: line for line in found.lines}
    assert by_arm["b"].cells[1].value is None
    assert by_arm["b"].cells[1].rank == 3
    text = rank_lines(found)
    assert text[0] == ["place", "arm", "mean rank", "kept", "relearn"]
    assert "none" in text[1 + list(by_arm).index("b")]


def test_a_column_that_nobody_measured_or_that_is_ambiguous_says_so():
    both = [*rows("a", LOW), *rows("b", HIGH)]
    with pytest.raises(DataError, match="No row of 'lost'"):
        rank_arms(both, [Column(metric="lost", name="lost")])
    with pytest.raises(DataError, match="under 'gcg'"):
        rank_arms([*both, *attacked("a", LOW)], [Column(metric="kept", name="kept", under="gcg")])
    with pytest.raises(DataError, match="Several steps"):
        rank_arms([*both, *rows("a", LOW, step="other")], [KEPT])
    assert rank_arms([*both, *rows("a", LOW, step="other")], [Column(metric="kept", name="k", step="score")])
    parts = [replace(row, split=part) for row in both for part in ("forget", "retain")]
    with pytest.raises(DataError, match="Several splits"):
        rank_arms(parts, [KEPT])
    assert rank_arms(parts, [Column(metric="kept", name="k", split="retain")])
    neither = [*rows("a", LOW, better=None), *rows("b", HIGH, better=None)]
    with pytest.raises(DataError, match="Neither way"):
        rank_arms(neither, [KEPT])
    least = rank_arms(neither, [Column(metric="kept", name="kept", better="lower")])
    assert least.lines[0].arm == "a"
    assert rank_arms(rows("a", LOW), [KEPT]) is None


def test_it_is_written_in_a_recipe():
    raw = [{"metric": "kept"}, {"metric": "known", "as": "relearn", "under": "relearn num_steps 20"}]
    document = {"steps": [{"measure": "npo"}], "rank": raw}
    columns = parse_recipe(document, name="n", where="here").rank
    assert columns == (KEPT, UNDER)
    assert columns_from(columns_record(columns)) == columns


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"step": "scores"}, "no measure step"),
        ({"under": "relearn 20"}, "Attacks of this recipe: relearn steps 20"),
    ],
)
def test_a_column_that_the_plan_cannot_fill_is_refused_before_the_run(column, message, tmp_path):
    steps = [
        {"id": "f", "fit": "npo", "against": [
            {"id": "relearn", "fit": "tampering", "data": "builtin:people:forget", "budget": {"steps": [20]}}]},
        {"id": "score", "measure": "npo", "system": "base+f"},
    ]  # fmt: skip
    document = {"system": "tiny:llama", "data": "builtin:people", "limit": 2, "steps": steps}
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps({**document, "rank": [{"metric": "forget_probability", **column}]}))
    with pytest.raises(ConfigError, match=message):
        make_plan(Request(source=str(path)))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"metric": "kept"}, "not a list"),
        ([{"as": "kept"}], "names a metric"),
        ([{"metric": "kept", "unter": "x"}], "Unknown key"),
        ([{"metric": "kept", "better": "up"}], "not understood"),
    ],
)
def test_what_cannot_be_meant_is_refused(raw, message):
    with pytest.raises(ConfigError, match=message):
        parse_rank(raw, "here")
