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
    whole, a, b, c, kept = unseen_rows(rows, {"forget": {"c"}, "retain": set()})
    assert (whole.value, whole.n, whole.low) == (1.5, 2, None)
    assert whole.note == "of three; without the 1 rows that the attack was trained on"
    assert [row.group for row in (a, b, c)] == ["", "", SEEN]
    assert kept == other


def test_a_figure_that_is_no_mean_stays_and_says_so():
    said = "with the rows that the attack was trained on"
    (odd, *_, quality, utility, kept) = unseen_rows(
        [
            Row(metric="m", value=0.01, split="forget"),
            item("a", 1.0),
            item("b", 2.0),
            Row(metric="quality", value=0.3, split="forget"),
            Row(metric="utility", value=0.4),
            Row(metric="rouge", value=0.5, split="retain"),
        ],
        {"forget": {"a"}, "retain": set()},
    )
    assert [(row.value, row.note) for row in (odd, quality)] == [(0.01, said), (0.3, said)]
    assert utility.note == said, "of no part, so of any"
    assert kept.note == ""


@pytest.mark.parametrize("seen", [set(), {"a", "b"}, {"z"}])
def test_where_all_or_none_were_seen_nothing_changes(seen):
    rows = [Row(metric="m", value=1.5, split="forget"), item("a", 1.0), item("b", 2.0)]
    assert list(unseen_rows(rows, {"forget": seen})) == rows


def test_an_id_is_one_of_its_own_part():
    """Two files may number their rows alike."""
    kept = Row(metric="m", value=5.0, item="a", split="retain")
    rows = unseen_rows([item("a", 1.0), item("b", 2.0), kept], {"forget": {"a"}, "retain": set()})
    assert [row.group for row in rows] == [SEEN, "", ""]


def test_rows_are_known_by_what_is_said_in_them(tmp_path):
    def dialogue(name, text):
        return Dialogue((Message("user", "Who?"), Message("assistant", text)), id=name)

    keep_trained(tmp_path, [dialogue("train-1", "Ada.")])
    data = Data({"forget": [dialogue("forget-1", "Ada."), dialogue("train-1", "Bo.")]}, "here")
    assert seen_items(data, [tmp_path, tmp_path / "none"]) == {"forget": {"forget-1"}}
    assert seen_items(data, [tmp_path / "none"]) == {}
