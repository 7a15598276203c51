"""Rows about what an attack was trained on, and means without them."""

import pytest

from temper.core.types import Message, Row
from temper.data.schemas import Data, Dialogue
from temper.data.trained_rows import keep_trained, seen_items
from temper.run.unseen import SEEN, unseen_rows


def item(name, value, **more):
    return Row(metric="m", value=value, item=name, split="forget", **more)


def test_seen_items_leave_the_mean_and_stand_in_a_group():
    mean = Row(metric="m", value=2.0, n=3, low=0.0, high=9.0, split="forget", note="of three")
    other = Row(metric="m", value=7.0, split="retain")
    rows = [mean, item("a", 1.0), item("b", 2.0), item("c", 3.0), other]
    whole, a, b, c, kept = unseen_rows(rows, {"c"})
    assert (whole.value, whole.n, whole.low) == (1.5, 2, None)
    assert whole.note == "of three; without the 1 rows that the attack was trained on"
    assert [row.group for row in (a, b, c)] == ["", "", SEEN]
    assert kept == other


def test_a_figure_that_is_no_mean_stays_and_says_so():
    (quality, *_) = unseen_rows(
        [Row(metric="m", value=0.01, split="forget"), item("a", 1.0), item("b", 2.0)], {"a"}
    )
    assert quality.value == 0.01
    assert quality.note == "with the 1 rows that the attack was trained on"


@pytest.mark.parametrize("seen", [set(), {"a", "b"}, {"z"}])
def test_where_all_or_none_were_seen_nothing_changes(seen):
    rows = [Row(metric="m", value=1.5, split="forget"), item("a", 1.0), item("b", 2.0)]
    assert list(unseen_rows(rows, seen)) == rows


def test_rows_are_known_by_what_is_said_in_them(tmp_path):
    def dialogue(name, text):
        return Dialogue((Message("user", "Who?"), Message("assistant", text)), id=name)

    keep_trained(tmp_path, [dialogue("train-1", "Ada.")])
    data = Data({"forget": [dialogue("forget-1", "Ada."), dialogue("train-1", "Bo.")]}, "here")
    assert seen_items(data, [tmp_path, tmp_path / "none"]) == {"forget-1"}
    assert seen_items(data, [tmp_path / "none"]) == frozenset()
