"""Rows as tables: what is averaged over what, and what stays apart."""

import pytest

from temper.core.types import Row
from temper.report.tables import Cell, format_interval, format_value, heat_maps, summary_table


def row(value, *, seed=0, **more):
    return Row(
        metric=more.pop("metric", "f1"), value=value, facts={"seed": seed}, higher_is_better=True, **more
    )


def test_one_row_keeps_its_own_interval():
    cell = summary_table([row(0.8, n=50, low=0.7, high=0.9)]).rows[0].cells[""]
    assert cell == Cell(0.8, 0.7, 0.9, 50, 1, "row", "")
    assert summary_table([row(0.8, stderr=0.1)]).rows[0].cells[""].high == pytest.approx(0.996)
    assert summary_table([row(0.8)]).rows[0].cells[""].low is None


def test_seeds_are_averaged_with_a_t_interval():
    cell = summary_table([row(3.0, seed=0, metric="loss"), row(5.0, seed=1, metric="loss")]).rows[0].cells[""]
    assert cell.value == 4.0
    assert cell.num_seeds == 2
    assert cell.high == pytest.approx(4 + 12.706 * 1.0, rel=1e-3)  # t(0.975, 1) x sd / sqrt(2)
    assert cell.spread == "seeds"


def test_items_are_averaged_within_a_seed_first():
    rows = [row(1.0, item="a"), row(0.0, item="b"), row(1.0, item="c"), row(1.0, item="a", seed=1)]
    cell = summary_table(rows).rows[0].cells[""]
    assert cell.value == pytest.approx((2 / 3 + 1) / 2)  # seeds weigh the same
    only = summary_table(rows[:3]).rows[0].cells[""]
    assert only.spread == "items"
    assert only.n == 3


def test_a_rate_stays_between_0_and_1_and_a_loss_does_not():
    spread = [row(0.95, seed=0), row(0.6, seed=1)]
    assert summary_table(spread).rows[0].cells[""].high == 1.0
    loss = [row(0.95, seed=0, metric="loss"), row(0.6, seed=1, metric="loss")]
    assert summary_table(loss).rows[0].cells[""].high > 1
    gain = [row(0.3, seed=0, metric="f1_gain"), row(0.1, seed=1, metric="f1_gain")]
    assert summary_table(gain).rows[0].cells[""].low < 0


def test_arms_splits_and_groups_stay_apart():
    rows = [
        row(0.1, arm="a"),
        row(0.2, arm="b"),
        row(0.3, arm="a", split="test"),
        row(0.4, arm="a", group="g"),
    ]
    table = summary_table(rows)
    assert table.arms == ["a", "b"]
    assert [(r.metric, r.split) for r in table.rows] == [("f1", ""), ("f1", "test")]
    assert table.rows[0].best == "b"
    assert table.rows[1].best is None  # one arm only
    assert len(summary_table(rows, groups=True).rows) == 3


def test_best_follows_the_direction():
    lower = [Row(metric="loss", value=v, arm=a, higher_is_better=False) for v, a in ((1.0, "x"), (2.0, "y"))]
    assert summary_table(lower).rows[0].best == "x"
    neither = [Row(metric="k", value=v, arm=a) for v, a in ((1.0, "x"), (2.0, "y"))]
    assert summary_table(neither).rows[0].best is None
    assert summary_table([row(1.0, arm="x"), row(1.0, arm="y")]).rows[0].best is None


def test_a_value_that_could_not_be_computed_says_why():
    cell = summary_table([row(None, note="no reference model")]).rows[0].cells[""]
    assert cell.value is None
    assert cell.note == "no reference model"
    mixed = summary_table([row(None, note="lost", seed=0), row(0.5, seed=1)]).rows[0].cells[""]
    assert (mixed.value, mixed.note) == (0.5, "lost")  # never counted as 0


def test_heat_maps_need_two_groups():
    rows = [row(0.2, arm=a, group=g) for a in "xy" for g in ("p", "q")] + [
        row(0.9, metric="alone", group="p")
    ]
    (heat,) = heat_maps([*rows[:3], rows[-1]])
    assert (heat.metric, heat.arms, heat.groups, heat.scale) == ("f1", ["x", "y"], ["p", "q"], (0.0, 1.0))
    assert heat.cells[0][1].value == 0.2
    assert heat.cells[1][1] is None


def test_scale_of_other_numbers_is_their_range():
    rows = [row(v, metric="loss", group=g) for v, g in ((2.0, "p"), (5.0, "q"))]
    assert heat_maps(rows)[0].scale == (2.0, 5.0)


def test_numbers_for_people():
    assert format_value(None) == "–"
    assert format_value(0.12345) == "0.123"
    assert format_value(-0.5) == "−0.500"
    assert format_value(12345.0) == "12,345"
    assert format_value(0.00001) == "1e−05"
    assert format_value(12.34, "wall_s") == "12.3 s"
    assert format_value(0.0) == "0.000"
    assert format_interval(Cell(0.5, 0.25, 0.75, 1, 1, "row", "")) == "[0.250, 0.750]"
    assert format_interval(Cell(0.5, None, None, 1, 1, "", "")) == ""


def test_a_mean_beside_its_items_counts_once() -> None:
    items = [
        Row(metric="kept_probability", value=value, item=name)
        for name, value in (("a", 1.0), ("b", 0.9), ("c", 0.2))
    ]
    mean = Row(metric="kept_probability", value=0.7, n=3)
    cell = summary_table([mean, *items]).rows[0].cells[""]
    assert cell == summary_table(items).rows[0].cells[""]
    assert (cell.n, cell.value) == (3, pytest.approx(0.7))
    assert cell.high == 1.0


def test_two_steps_that_measure_the_same_are_two_columns():
    rows = [
        Row(metric="accuracy", value=value, facts={"seed": seed, "step": step})
        for step, value in (("before", 0.2), ("after", 0.8))
        for seed in (0, 1)
    ]
    rows.append(Row(metric="loss_nats", value=1.0, facts={"seed": 0, "step": "after"}))
    table = summary_table(rows)
    assert table.arms == ["before", "after", ""]
    assert {arm: cell.value for arm, cell in table.rows[0].cells.items()} == {"before": 0.2, "after": 0.8}
    assert list(table.rows[1].cells) == [""]


def test_a_step_that_all_arms_share_is_one_column_of_its_own():
    def measured(arm, step, value, step_hash):
        facts = {"seed": 0, "step": step, "step_hash": step_hash}
        return Row(metric="f1", value=value, arm=arm, facts=facts)

    rows = [measured(arm, "reference", 0.9, "r") for arm in ("a", "b")]
    own = [measured("a", "score", 0.5, "s1"), measured("b", "score", 0.6, "s2")]
    table = summary_table([rows[0], own[0], rows[1], own[1]])
    assert table.arms == ["reference", "a", "b"]
    assert [cell.value for cell in table.rows[0].cells.values()] == [0.9, 0.5, 0.6]
    assert summary_table(rows).arms == ["a", "b"]  # nothing but what they share: the arms are compared
