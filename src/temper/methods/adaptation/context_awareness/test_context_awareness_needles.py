"""Needles in prose, and the conversations that are built."""

from __future__ import annotations

import random

import pytest
import torch

from temper.core.types import Run
from temper.methods.adaptation.context_awareness import conversations, method, needles, prose, shares
from temper.methods.adaptation.context_awareness.card import Config
from temper.methods.adaptation.context_awareness.conftest import NONE
from temper.methods.adaptation.context_awareness.conversations import build_conversations
from temper.ops.text import contains, words
from temper.systems.causal_lm import CausalLM


def test_departure_8_needles_hide_words_the_prose_never_has() -> None:
    draw = random.Random(0)
    haystack = set(words(" ".join(prose.sentence(draw) for _ in range(3000))))
    for needle in prose.build_needles(40, 3):
        assert not haystack & set(needle.keywords)
        assert not set(words(needle.question)) & set(needle.keywords)
        assert set(needle.keywords) <= set(words(needle.text))


@pytest.mark.parametrize(("depth", "place"), [(0.0, 0), (0.5, 2), (1.0, 4)])
def test_needle_stands_at_its_depth_without_line_breaks(depth: float, place: int) -> None:
    text = needles.hide(["a.", "b.", "c.", "d."], "the\nneedle.", depth)
    want = ["a.", "b.", "c.", "d."]
    want.insert(place, "the needle.")
    assert text == " ".join(want)


def test_grid_has_every_cell_and_its_lengths(tiny: CausalLM) -> None:
    config = Config(lengths=(40, 90), depths=(0, 0.5, 1), num_needles=2)
    grid = needles.build_grid(tiny, config, 1)
    assert len({test.id for test in grid}) == len(grid) == 12
    assert grid == needles.build_grid(tiny, config, 1)
    assert grid[0].text != needles.build_grid(tiny, config, 2)[0].text
    for test in grid:
        assert test.needle.text in test.text
        bare = (
            test.text.replace(test.needle.text + " ", "").replace(" " + test.needle.text, "").split("\n\n")[1]
        )
        assert test.length <= len(tiny.chat.text_ids(bare)) < test.length + 60


def test_distractors_are_of_the_needles_form_and_hold_none_of_its_words(tiny: CausalLM) -> None:
    for number, needle in enumerate(prose.build_needles(8, 1)):
        found = prose.build_distractors(needle, 5, random.Random(number))
        assert len(set(found)) == 5
        for text in found:
            assert not set(words(text)) & set(needle.keywords)
            assert text.split(" of ")[0] == needle.text.split(" of ")[0]
            assert text != needle.text
    (test,) = needles.build_grid(tiny, Config(lengths=(120,), depths=(0.5,), num_distractors=2), 0)
    plain = needles.build_grid(tiny, Config(lengths=(120,), depths=(0.5,)), 0)[0]
    form = test.needle.text.split(" of ")[0]
    assert (test.text.count(form), plain.text.count(form)) == (3, 1)


def test_departure_10_bare_text_cannot_end_its_reply(tiny: CausalLM) -> None:
    rule = needles.NoEnd(tiny.stop_ids)
    logits_BV = torch.zeros(2, 512)
    out = rule(logits_BV, [0, 3], [{}, {}])
    ended = sorted(tiny.stop_ids)
    assert torch.isinf(out[:, ended]).all()
    assert int(torch.isinf(out).sum()) == 2 * len(ended)
    assert not torch.isinf(logits_BV).any()


def test_recall_rows_by_hand(tiny: CausalLM) -> None:
    grid = needles.build_grid(tiny, Config(lengths=(40,), depths=(0, 1)), 0)
    rows = list(needles._recall_rows(grid, [1.0, 0.5], "template"))
    value = {(r.metric, r.group, r.item): r.value for r in rows}
    assert value["recall", "", None] == 0.75
    assert value["recall_all", "", None] == 0.5
    assert value["recall_all", "depth 1", None] == 0
    assert value["recall", "length 40", None] == 0.75
    assert value["recall_all", "", grid[0].id] == 1


def test_measure_needles_gives_every_arm_on_the_same_items(tiny: CausalLM, tmp_path) -> None:
    config = Config(lengths=(40,), depths=(0, 1), alphas=(1, 0.5), reply_tokens=3, share_items=1)
    rows = list(method.measure(tiny, NONE, config, Run(folder=tmp_path)))
    items = {
        arm: {r.item for r in rows if r.arm == arm and r.item}
        for arm in ("no_template", "template", "steered_1", "steered_0.5")
    }
    assert len({frozenset(found) for found in items.values()}) == 1
    assert len(items["template"]) == 2
    found = [r for r in rows if r.metric.endswith("_share")]
    assert all(r.n == 1 for r in found)
    share = {(r.arm, r.metric): r.value or 0.0 for r in found}
    for arm in items:
        assert sum(share[arm, f"{g}_share"] for g in shares.GROUPS) == pytest.approx(1, abs=1e-5)
    assert share["steered_1", "user_share"] == share["template", "user_share"]
    assert share["steered_0.5", "user_share"] > share["template", "user_share"]
    assert (tmp_path / "figures.json").exists()


def test_conversations_are_what_they_say() -> None:
    data = build_conversations(300, 5)
    kinds = [r.extra["kind"] for r in data["train"]]
    assert (kinds.count("context"), kinds.count("chat"), kinds.count("aside")) == (150, 75, 75)
    assert (
        data.fingerprint == build_conversations(300, 5).fingerprint != build_conversations(300, 6).fingerprint
    )
    for record in method._dialogues(data, "train") + method._dialogues(data, "test"):
        asked, reply = record.messages[0].content, record.messages[1].content
        assert record.extra["answer"] in reply
        assert contains(asked, str(record.extra["answer"])) == (record.extra["kind"] == "context")
    said = {
        part: " ".join(m.content for r in method._dialogues(data, part) for m in r.messages) for part in data
    }
    countries = {fact.subject for fact in conversations._all_facts()}
    asked_in = {part: {c for c in countries if contains(text, c)} for part, text in said.items()}
    claims = [r.extra["kind"] for r in data["train"] if r.extra.get("prior")]
    assert claims.count("context") == claims.count("aside") == 75, "looks do not tell what to trust"
    assert asked_in["test"]
    assert not asked_in["train"] & asked_in["test"], "tested on countries that training never names"
