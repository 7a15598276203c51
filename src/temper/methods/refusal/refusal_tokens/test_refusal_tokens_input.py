"""Rows, templates and settings that cannot work."""

from __future__ import annotations

import copy

import pytest

from temper.core.errors import ConfigError, DataError, ModelError
from temper.core.types import Run
from temper.data.schemas import Data
from temper.methods.refusal.refusal_tokens.conftest import dialogue, rows, small
from temper.methods.refusal.refusal_tokens.method import fit, names_of
from temper.systems.chat import Chat


@pytest.mark.parametrize(
    ("train", "calibration", "match"),
    [
        (rows(None, 4), None, "both are needed"),
        (rows("a", 4), None, "both are needed"),
        (rows("respond", 4) + rows(None, 4), None, "no name"),
        (rows("a", 4) + rows("b", 4) + rows(None, 4), rows("a", 4) + rows(None, 4), "no row of b"),
        (rows("a", 4) + rows(None, 4), rows("a", 4), "answered requests"),
        ([*rows("a", 4), dialogue("only a question")], None, "no reply"),
    ],
)
def test_rows_that_cannot_work_stop_before_training(tiny, train, calibration, match) -> None:
    parts = {"train": train} if calibration is None else {"train": train, "calibration": calibration}
    with pytest.raises(DataError, match=match):
        fit(tiny, Data(parts), small(), Run())


def test_a_row_that_would_be_truncated_is_named(tiny) -> None:
    long = dialogue("why", "word " * 80, category="a")
    with pytest.raises(DataError, match="truncated at 40.*why"):
        fit(tiny, Data({"train": [long, *rows(None, 4)]}), small(max_tokens=40), Run())


def test_few_rows_warn(tiny, caplog: pytest.LogCaptureFixture) -> None:
    names_of(rows("a", 3) + rows(None, 3), small())
    assert "'a' has 3 rows" in caplog.text


def test_templates_that_cannot_work_are_refused(tiny) -> None:
    both = Data({"train": rows("a", 4) + rows(None, 4)})
    bare = tiny.with_(chat=Chat(copy_without_template(tiny.tokenizer)))
    with pytest.raises(ModelError):
        fit(bare, both, small(), Run())
    opened = tiny.chat.template.replace("<|im_start|>assistant\\n", "<|im_start|>assistant\\nWell, ")
    if opened != tiny.chat.template:
        with pytest.raises(ModelError):
            fit(tiny.with_(chat=tiny.chat.with_(template=opened)), both, small(), Run())


def copy_without_template(tokenizer):  # type: ignore[no-untyped-def]
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    return bare


def test_hand_set_thresholds_name_known_categories(tiny) -> None:
    with pytest.raises(ConfigError, match="no refusal category 'c'"):
        fit(tiny, Data({"train": rows("a", 4) + rows(None, 4)}), small(thresholds={"c": 0.5}), Run())
