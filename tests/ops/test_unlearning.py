"""The way of an unlearning run: what is read between looks, how long it is, what its curves hold."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from temper.core.types import Row, Run
from temper.ops import unlearning
from temper.ops.batching import encode
from temper.ops.logprobs import response_logprobs
from temper.ops.train_settings import TrainLog
from temper.systems.loading import load_base

LOOKS = [
    {"step": 0.0, "forget": 0.9, "retain": 0.7, "retain/0": 0.8, "retain/1": 0.6},
    {"step": 2.0, "forget": 0.3, "retain": 0.55, "retain/0": 0.5, "retain/1": 0.6},
    {"step": 4.0, "forget": 0.1, "retain": 0.3, "retain/0": 0.4, "retain/1": 0.2},
]


def one(rows: list[Row], metric: str) -> Row:
    (row,) = [row for row in rows if row.metric == metric and row.item is None]
    return row


def items(rows: list[Row], metric: str) -> dict[str, float]:
    return {row.item: row.value for row in rows if row.metric == metric and row.item is not None}  # type: ignore[misc]


def test_levels_are_read_between_looks() -> None:
    found = unlearning.at_level(LOOKS, 0.5)
    assert found is not None
    assert found["step"] == pytest.approx(4 / 3)
    assert found["retain/0"] == pytest.approx(0.8 - 0.3 * 2 / 3)
    assert found["retain/1"] == pytest.approx(0.6)
    assert unlearning.at_level(LOOKS, 0.3)["step"] == 2  # type: ignore[index]
    assert unlearning.at_level(LOOKS, 0.05) is None
    rows = list(unlearning.level_rows(LOOKS, ["a", "b"], (0.5, 0.05)))
    assert items(rows, "retain_probability_at_0.5") == pytest.approx({"a": 0.6, "b": 0.6})
    assert one(rows, "retain_probability_at_0.05").value is None
    rising = [{**look, "forget": 1 - look["forget"]} for look in LOOKS]
    assert unlearning.at_level(rising, 0.5) is None, "a crossing upwards is not forgetting"


def test_way_rows_hold_levels_ends_and_length() -> None:
    log = TrainLog(loss=[1.0] * 4, stopped_early=True)
    rows = unlearning.way_rows(LOOKS, ["a", "b"], (0.5,), log, 3)
    assert items(rows, "retain_probability_end") == {"a": 0.4, "b": 0.2}
    assert one(rows, "retain_probability_end").value == pytest.approx(0.3)
    assert (one(rows, "forget_probability_start").value, one(rows, "forget_probability_end").value) == (
        0.9,
        0.1,
    )
    assert one(rows, "forget_probability_end").n == 3
    assert one(rows, "steps").value == 4
    assert one(rows, "steps").note == "stopped as diverged"


def test_a_watch_gives_probabilities_per_token() -> None:
    system: Any = load_base("tiny:llama")
    rows = [encode(system, ((), "one two three")), encode(system, ((), "four"))]
    found = unlearning.Watch(system, {"forget": rows, "retain": []}, Run()).look(3)
    mean_N = response_logprobs(system, rows, reduce="mean", run=Run()).tolist()
    assert found["forget/0"] == pytest.approx(math.exp(mean_N[0]))
    assert found["forget"] == pytest.approx(sum(map(math.exp, mean_N)) / 2)
    assert set(found) == {"forget", "forget/0", "forget/1"}, "a part without rows is left out"


def settings(**changes: Any) -> Any:
    plain: dict[str, Any] = {
        "lr": 1e-3, "weight_decay": 0.0, "batch_rows": 4, "num_epochs": 3.0, "min_steps": 0, "max_steps": 0,
        "warmup_epochs": 1.0, "schedule": "linear", "clip_norm": 1.0,
    }  # fmt: skip
    return SimpleNamespace(**(plain | changes))


@pytest.mark.parametrize(
    ("changes", "steps"), [({}, 9), ({"min_steps": 20}, 20), ({"max_steps": 5}, 5), ({"num_epochs": 0.5}, 2)]
)
def test_steps_by_hand(changes: dict[str, Any], steps: int) -> None:
    assert unlearning.num_steps(10, settings(**changes)) == steps, (
        "ten rows in fours are three steps an epoch"
    )


def test_warmup_is_its_epochs_share_of_the_steps() -> None:
    assert unlearning.train_settings(10, settings()).warmup_ratio == pytest.approx(1 / 3)
    assert unlearning.train_settings(10, settings(warmup_epochs=9.0)).warmup_ratio == 1
    assert unlearning.train_settings(10, settings(), log_every=1).log_every == 1


def test_curves_hold_every_part_and_the_trade() -> None:
    curves = unlearning.curve_figures(LOOKS, "ga")["curves"]
    assert curves["Kept against forgotten"]["lines"]["ga"] == {"x": [0.9, 0.3, 0.1], "y": [0.7, 0.55, 0.3]}
    assert set(curves["Answer probability while unlearning"]["lines"]) == {"forget", "retain"}
    assert unlearning.curve_figures([], "ga") == {}
    alone = [{"step": 0.0, "forget": 0.5}]
    assert "Kept against forgotten" not in unlearning.curve_figures(alone, "ga")["curves"]
