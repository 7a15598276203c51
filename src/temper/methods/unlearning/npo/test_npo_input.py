"""A user's own files, bad input, and the path of an unlearning."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

import temper
from temper.core import config as core_config
from temper.core.errors import ConfigError, DataError
from temper.core.types import Message, Row, Run
from temper.data.schemas import Data, Dialogue
from temper.methods.unlearning.npo.card import Config
from temper.methods.unlearning.npo.conftest import quick
from temper.methods.unlearning.npo.method import fit, measure
from temper.systems.loading import load_base


def save(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_fit_on_own_files(tmp_path: Path) -> None:
    forget = save(tmp_path / "my.jsonl", [{"question": "Who is Orla?", "answer": "A pilot."}])
    retain = save(tmp_path / "other.jsonl", [{"prompt": "Two and two?", "completion": "Four."}])
    settings = {"mode": "lora", "rank": 2, "num_epochs": 2, "min_steps": 0, "lr": 1e-3, "watch_every": 1}
    run = Run(folder=tmp_path / "run")
    artefact = temper.fit("npo", "tiny:llama", {"forget": forget, "retain": retain}, run=run, **settings)
    assert artefact.method == "npo"
    curves = json.loads((tmp_path / "run" / "figures.json").read_text())["curves"]
    trade = curves["Kept against forgotten"]["lines"]["npo+rt"]
    assert len(trade["x"]) == len(trade["y"]) == 3, "before the first step and after each"
    with pytest.raises(DataError, match=r"keeps a retain set, and there is none.*loss=npo"):
        temper.fit("npo", "tiny:llama", {"forget": forget}, **settings)
    assert temper.fit("npo", "tiny:llama", {"forget": forget}, loss="npo", **settings)


def test_bad_rows_are_named(system: Any) -> None:
    def data(*turns: tuple[str, str]) -> Data:
        return Data({"forget": [Dialogue(tuple(Message(*turn) for turn in turns), id="bad-7")]})

    long = ("user", "word " * 60), ("assistant", "Yes.")
    with pytest.raises(DataError, match=r"truncated away.*bad-7"):
        fit(system, data(*long), quick(loss="npo", max_tokens=20), Run())
    with pytest.raises(DataError, match=r"no token to score.*bad-7"):
        fit(system, data(("user", "Who?")), quick(loss="npo"), Run())
    with pytest.raises(DataError, match="empty"):
        temper.fit("npo", "tiny:llama", {"forget": []}, loss="npo")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "npoo"}, "no forget loss 'npoo'.*npo"),
        ({"loss": "npo+rtt"}, "'rtt' in 'npo\\+rtt' is no term"),
        ({"loss": "npo+rt+rt"}, "stands twice"),
        ({"loss": "learn+rt"}, "takes no further term"),
        ({"beta": 0}, "beta must be above 0"),
        ({"levels": [0.5, 2]}, "between 0 and 1"),
        ({"kl_positions": "padding"}, "not a valid value"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        core_config.build(Config, [("test", settings)])


def test_little_movement_is_said(system: Any, people: Data, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        fit(system, people, quick(loss="npo", lr=1e-6, num_epochs=1), Run())
    assert "hardly moved in 1 steps" in caplog.text


def test_path_needs_something_to_keep(system: Any, people: Data) -> None:
    forget_only = Data({"forget": people["forget"]})
    with pytest.raises(ConfigError, match="needs an unlearning loss and a part retain"):
        list(measure(system, forget_only, quick(loss="npo", path=True, watch_every=1), Run()))


def values(rows: list[Row], metric: str) -> list[float | None]:
    return [row.value for row in rows if row.metric == metric and row.item is None]


def test_path_reads_retain_at_forget_levels(people: Data) -> None:
    system = load_base("tiny:llama")
    learnt = fit(system, people, quick(loss="learn", mode="full", num_epochs=60), Run())
    config = quick(
        loss="npo", mode="full", path=True, watch_every=1, levels=(0.2, 0.9999), reply_tokens=4, num_epochs=25
    )
    with learnt.apply(system) as target:
        rows = list(measure(target, people, config, Run()))
    (start,), (end,) = values(rows, "forget_probability_start"), values(rows, "forget_probability_end")
    assert start > 0.4 > end
    (kept,) = values(rows, "retain_probability_at_0.2")
    items = [row for row in rows if row.metric == "retain_probability_at_0.2" and row.item]
    assert [row.item for row in items] == [record.id for record in people["retain"]]
    assert sum(row.value or 0 for row in items) / len(items) == pytest.approx(kept)
    (never,) = [row for row in rows if row.metric == "retain_probability_at_0.9999"]
    assert never.value is None
    assert "not crossed" in never.note
