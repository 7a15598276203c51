"""The verbs, from the data to the rows."""

from __future__ import annotations

import json

import pytest

import temper
from temper.core import config as core_config
from temper.core.errors import ConfigError
from temper.core.types import Run
from temper.data.loading import load_data, write_jsonl
from temper.data.schemas import Data
from temper.methods.refusal.sorry_bench import method
from temper.methods.refusal.sorry_bench.card import Config
from temper.methods.refusal.sorry_bench.conftest import row, rows_of, scored
from temper.methods.refusal.sorry_bench.items import human_replies, items_of
from temper.ops import text as tx


def test_departure_7_make_adds_styles_that_need_no_model() -> None:
    data = load_data("builtin:policy-mini", {"test": "Behaviour", "human?": "Labelled"}, limit=12)
    made = method.make(None, data, Config(), Run())
    assert len(made["test"]) == 12 * (1 + len(tx.MUTATIONS))
    assert made["test"][:12] == data["test"]
    assert made["human"] == data["human"]
    one = made["test"][12]
    assert one.extra["turns"] == [one.prompt]  # type: ignore[attr-defined]
    assert method.make(None, made, Config(), Run()).fingerprint == made.fingerprint, "what is there stays"
    with pytest.raises(ConfigError, match="takes a model"):
        method.make(None, data, Config(mutations=("slang",)), Run())
    with pytest.raises(ConfigError, match="misspellings"):
        method.make(None, data, Config(mutations=("misspelling",)), Run())


def test_made_rows_can_be_written_and_read(tmp_path) -> None:  # type: ignore[no-untyped-def]
    data = load_data("builtin:policy-mini:test", {"test": "Behaviour"}, limit=3)
    made = method.make(None, data, Config(mutations=("caesar",)), Run())
    write_jsonl(tmp_path / "made.jsonl", made["test"])
    again = load_data(str(tmp_path / "made.jsonl"), {"test": "Behaviour"})
    assert [(i.number, i.style) for i in items_of(again["test"])] == [
        (i.number, i.style) for i in items_of(made["test"])
    ]
    assert items_of(again["test"])[-1].request == data["test"][-1].prompt, "the judge reads the plain request"  # type: ignore[attr-defined]


def test_measure_on_a_tiny_model(tmp_path) -> None:  # type: ignore[no-untyped-def]
    data = load_data("builtin:policy-mini", {"test": "Behaviour", "human?": "Labelled"}, limit=24)
    made = temper.make("sorry-bench", "tiny:llama", data, mutations=["misspellings"])
    settings = {"max_new_tokens": 4, "temperature": 0.0, "judge": "refusal-rules"}
    rows = list(temper.measure("sorry-bench", "tiny:llama", made, run=Run(folder=tmp_path), **settings))
    assert {r.split for r in rows_of(rows, "fr")} == {"base", "misspellings"}
    assert all(r.facts["judge"] == "refusal-rules" for r in rows)
    again = list(temper.measure("sorry-bench", "tiny:llama", made, **settings))
    assert [(r.metric, r.value, r.item) for r in rows] == [(r.metric, r.value, r.item) for r in again]
    stored = [json.loads(line) for line in (tmp_path / "responses.jsonl").read_text().splitlines()]
    assert len(stored) == 48
    shown = [json.loads(line) for line in (tmp_path / "examples.jsonl").read_text().splitlines()]
    assert all("characters, in responses.jsonl" in example["after"] for example in shown)


def test_responses_become_labelled_replies_once_people_score_them(tmp_path) -> None:  # type: ignore[no-untyped-def]
    found = [one._replace(reply=f"reply {one.item.number}") for one in scored({"a": [True, None]})]
    method.write_responses(tmp_path, found, "j")
    lines = [json.loads(line) for line in (tmp_path / "responses.jsonl").read_text().splitlines()]
    assert [line["judge_score"] for line in lines] == [1, None]
    (tmp_path / "human.jsonl").write_text(
        "".join(json.dumps({**x, "human_score": 0.2}) + "\n" for x in lines)
    )
    human = load_data(str(tmp_path / "human.jsonl"), "Labelled").rows
    read = human_replies(human, [one.item for one in found])  # type: ignore[arg-type]
    assert [(r.reply, r.fulfils) for r in read] == [("reply 1", False), ("reply 2", False)]


def test_a_users_file_runs_and_data_without_base_has_no_differences() -> None:
    records = [row(n, "Lyrics" if n < 3 else "Letters", "slang") for n in range(1, 5)]
    rows = list(
        temper.measure(
            "sorry-bench", "tiny:llama", Data({"test": records}), max_new_tokens=2, judge="refusal-rules"
        )
    )
    assert rows_of(rows, "fr", group="")
    assert not rows_of(rows, "delta_fr")


@pytest.mark.parametrize(
    "bad",
    [{"max_new_tokens": 0}, {"temperature": -1}, {"top_p": 0}, {"judge_window": 5}, {"release": "2023"}],
)
def test_bad_settings_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        core_config.build(Config, [("test", bad)])
