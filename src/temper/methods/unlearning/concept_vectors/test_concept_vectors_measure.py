"""ConceptVectors: items from a user's file, questions and attacks, likeness, and the original that one compares with."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from temper.artefacts.loading import load_artefact
from temper.core.errors import ConfigError, DataError
from temper.core.types import Row, Run
from temper.data.loading import load_data, write_jsonl
from temper.data.schemas import Data, Text
from temper.methods.unlearning.concept_vectors.behaviour import (
    Answer,
    Ask,
    asks_of,
    behaviour_rows,
    ids_of,
    jailbreak,
    selectivity_of,
    write_examples,
)
from temper.methods.unlearning.concept_vectors.card import ATTACKS, Config
from temper.methods.unlearning.concept_vectors.items import people_items, read_items
from temper.methods.unlearning.concept_vectors.method import fit, make, measure
from temper.systems.loading import load_base

FAST = Config(reply_tokens=3, num_questions=1, num_unrelated=2, drift_rows=64)


@pytest.fixture(scope="module")
def system() -> Any:
    return load_base("tiny:llama")


def row(concept: str = "Velmora", **changes: Any) -> dict[str, Any]:
    published = {
        "ID": "7",
        "Concept": concept,
        "Layer": 1,
        "Dim": 11,
        "QA": [f" Where does {concept} lie?\n", f" Who rules {concept}?\n"],
        "text_completion": [{"First_half": f"{concept} is known", "Second_half": "for its bells."}],
        "unrelated_QA": [" What is the capital of the island?\n", " Who wrote the letter?\n"],
        "wikipedia_content": f"{concept} lies by the sea. " * 150,
    }
    return {key: value for key, value in {**published, **changes}.items() if value is not None}


def loaded(tmp_path: Path, *rows: dict[str, Any]) -> Data:
    path = tmp_path / "items.json"
    path.write_text(json.dumps(list(rows)))
    return load_data({"items": str(path)}, {"items": "Text"})


def items_of(tmp_path: Path, *rows: dict[str, Any], **more: Any) -> Any:
    return read_items(loaded(tmp_path, *rows).records("items", Text), **more)


def one(rows: list[Row], metric: str, group: str = "") -> Row:
    (found,) = [r for r in rows if r.metric == metric and not r.item and r.group == group]
    return found


# ---- items


def test_a_file_in_the_benchmarks_schema_is_read(tmp_path: Path) -> None:
    data = loaded(tmp_path, row())
    before = copy.deepcopy(data["items"][0].extra)
    (item,) = read_items(data.records("items", Text))
    assert item.asked.target == ("Where does Velmora lie?", "Who rules Velmora?"), (
        "blanks and newlines are gone"
    )
    assert item.beginnings == ("Velmora is known",)
    assert tuple(item.place) == (1, 11)
    assert item.probes == item.asked
    assert all("Velmora" in question for question in item.german)
    asks_of(item, Config())
    assert data["items"][0].extra == before, "the lists are copied, not filled in"


def test_without_unrelated_questions_those_of_five_others_serve(tmp_path: Path) -> None:
    rows = [row(f"Concept{n}", unrelated_QA=None) for n in range(8)]
    (item,) = items_of(tmp_path, *rows, concepts=["Concept0"], seed=1)
    assert len(item.asked.unrelated) == 5 * 2
    assert not any("Concept0" in question for question in item.asked.unrelated)
    assert items_of(tmp_path, *rows, concepts=["Concept0"], seed=1) == [item]
    with pytest.raises(DataError, match="unrelated_QA"):
        items_of(tmp_path, row(unrelated_QA=None))


def test_departure_7_no_chosen_concept_is_unrelated_to_another(tmp_path: Path) -> None:
    """Ablating it would change the answers that are to stay."""
    rows = [row(name, unrelated_QA=None) for name in ("Velmora", "Ostrel", "Quend")]
    items = items_of(tmp_path, *rows, concepts=("Velmora", "Ostrel"))
    assert {item.asked.unrelated for item in items} == {("Where does Quend lie?", "Who rules Quend?")}
    with pytest.raises(DataError, match=r"no question unrelated to 'Velmora'.*the setting concepts"):
        items_of(tmp_path, *rows)
    given = [row("Velmora", unrelated_QA=["Who rules Ostrel?", "Who wrote it?"]), row("Ostrel")]
    assert items_of(tmp_path, *given)[0].asked.unrelated == ("Who wrote it?",)
    assert len(items_of(tmp_path, *given, concepts=("Velmora",))[0].asked.unrelated) == 2, "Ostrel stays"
    given[0]["unrelated_QA"] = ["Who rules Ostrel?"]
    with pytest.raises(DataError, match="no question unrelated to 'Velmora'"):
        items_of(tmp_path, *given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"Concept": None}, "Concept is not a name"),
        ({"QA": []}, "QA is not a list of at least one text"),
        ({"QA": "Where?"}, "QA is not"),
        ({"QA": ["Where?", " "]}, "QA is not"),
        ({"Layer": "20"}, "Layer is not a whole number"),
        ({"Dim": None}, "Dim is not a whole number"),
        ({"Dim": -3}, "Dim is not a whole number"),
        ({"text_completion": ["half"]}, "text_completion is not a list of {First_half"),
        ({"text_completion": [{"Second_half": "x"}]}, "text_completion is not"),
        ({"German_QA": ["Wo?"]}, "German_QA is not as many questions as QA has"),
        ({"Probes": ["Where?"]}, "Probes is not"),
        ({"Probes": {"QA": ["Where?"]}}, "Probes.unrelated_QA is not"),
        ({"Control": {"Layer": 1}}, "Control.Dim is not"),
        ({"Control": [1, 2]}, "Control is not {"),
        ({"Control": 7}, "Control is not {"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        items_of(tmp_path, row(**changes))


@pytest.mark.parametrize("wrong", [3, None, [3], "Where?"])
def test_bad_questions_of_another_row_are_named(tmp_path: Path, wrong: Any) -> None:
    rows = (row("Velmora", unrelated_QA=None), row("Ostrel", QA=wrong))
    with pytest.raises(DataError, match="QA is not a list of at least one text"):
        items_of(tmp_path, *rows, concepts=("Velmora",))


def test_concepts_are_chosen_by_name(tmp_path: Path) -> None:
    rows = (row("Velmora"), row("Ostrel"))
    assert [item.concept for item in items_of(tmp_path, *rows, concepts=("Ostrel",))] == ["Ostrel"]
    with pytest.raises(DataError, match="no row about Nowhere"):
        items_of(tmp_path, *rows, concepts=("Nowhere",))
    with pytest.raises(DataError, match="Two rows are about 'Velmora'"):
        items_of(tmp_path, row(), row())


def test_stand_in_needs_people_and_two_facts() -> None:
    data = load_data("builtin:people", dict.fromkeys(("forget", "world_facts"), "Dialogue"), limit=4)
    people, world = data["forget"], data["world_facts"]
    with pytest.raises(DataError, match="Too few rows"):
        people_items(people[:1], world)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no fact about a person"):
        people_items(world, world)  # type: ignore[arg-type]
    (made,) = people_items(people, world)  # type: ignore[arg-type]
    assert made.extra["German_QA"] == [g for g in made.extra["German_QA"] if "Liora" in g]
    pairs = made.extra["text_completion"]
    assert all(f"{pair['First_half']} {pair['Second_half']}" in made.text for pair in pairs)


# ---- questions and attacks


def test_four_attacks(tmp_path: Path) -> None:
    (item,) = items_of(tmp_path, row(German_QA=["Wo liegt es?", "Wer regiert?"]))
    asked = {attack: jailbreak(attack, item, 0, 2000) for attack in ATTACKS}
    assert "knows everything" in asked["role"]
    assert "grandfather" in asked["relative"]
    assert asked["german"] == "Wo liegt es?"
    assert item.text[:1990] in asked["in_context"]
    assert item.text[:2001] not in asked["in_context"], "the first 2000 characters of the page"
    assert all("Where does Velmora lie?" in asked[name] for name in ("role", "relative", "in_context"))
    kinds = [ask.kind for ask in asks_of(item, Config())]
    assert [kinds.count(k) for k in ("target", "completion", "unrelated", "jailbreak")] == [2, 1, 2, 8]
    assert not [ask for ask in asks_of(item, Config(attacks=())) if ask.attack]


def test_departure_9_through_the_template_or_plain(system: Any, tmp_path: Path) -> None:
    (item,) = items_of(tmp_path, row())
    asks = {ask.kind: ask for ask in asks_of(item, FAST)}
    decode = system.tokenizer.decode
    assert "<|im_start|>user" in decode(ids_of(system, asks["target"], FAST))
    plain = Config(plain=True)
    assert decode(ids_of(system, asks["target"], plain), skip_special_tokens=True) == (
        "Question: Where does Velmora lie?\n Answer:"
    )
    completed = decode(ids_of(system, asks["completion"], plain), skip_special_tokens=True)
    assert completed == "Please complete the following paragraph: Velmora is known"
    assert "<|im_start|>user" in decode(ids_of(system, asks["jailbreak"], plain)), "attacks keep the template"


# ---- likeness


def ask(kind: str, number: int, attack: str = "", concept: str = "C") -> Ask:
    return Ask(kind, concept, number, attack, f"{concept} {kind} {attack} {number}?")


def answers(asks: list[Ask], *told: tuple[str, float | None]) -> dict[str, Answer]:
    return {a.user: Answer(text, [1], logp) for a, (text, logp) in zip(asks, told, strict=True)}


def test_likeness_and_selectivity_by_hand() -> None:
    asks = [ask("target", 0), ask("target", 1), ask("unrelated", 0), ask("unrelated", 1)]
    before = answers(asks, ("a b c d", -1.0), ("e f", -1.0), ("g h", -0.5), ("i j", -0.5))
    after = answers(asks, ("a b x", -3.0), ("e f", -1.5), ("g h", -0.5), ("i y", -1.5))
    rows = list(behaviour_rows(asks, before, after))
    # "a b" in common: 2 / 3 of the new, 2 / 4 of the old words.
    first = 2 * 2 / (3 + 4)
    assert one(rows, "target_rouge_l").value == pytest.approx((first + 1) / 2)
    assert one(rows, "unrelated_rouge_l").value == pytest.approx((1 + 0.5) / 2)
    assert one(rows, "selectivity").value == pytest.approx((1 - (first + 1) / 2) - (1 - 0.75))
    assert one(rows, "target_drop_nats").value == pytest.approx((2.0 + 0.5) / 2)
    assert one(rows, "unrelated_drop_nats").value == pytest.approx(0.5)
    assert one(rows, "selectivity_nats").value == pytest.approx(1.25 - 0.5)
    each = {r.item: r.value for r in rows if r.metric == "selectivity" and r.item}
    assert each == {"C": one(rows, "selectivity").value}, "its questions share one mean of unrelated answers"


def test_a_question_under_four_attacks_is_one_item() -> None:
    """Four answers to one question are no four draws; otherwise intervals are too narrow."""
    attacked = [ask("jailbreak", n, attack) for n in range(3) for attack in ATTACKS]
    asks = [ask("target", 0), ask("unrelated", 0), *attacked]
    before = answers(asks, ("x", 0), ("x", 0), *[("a b", None)] * 12)
    after = answers(asks, ("x", 0), ("x", 0), *[("a b", None)] * 5, *[("c", None)] * 7)
    rows = list(behaviour_rows(asks, before, after))
    each = {r.item: r.value for r in rows if r.metric == "jailbreak_rouge_l" and r.item}
    assert each == {"C/jailbreak/0": 1, "C/jailbreak/1": 0.25, "C/jailbreak/2": 0}
    whole = one(rows, "jailbreak_rouge_l")
    assert (whole.value, whole.n) == (pytest.approx(1.25 / 3), 3)
    first = one(rows, "jailbreak_rouge_l", ATTACKS[0])
    assert (first.value, first.n) == (pytest.approx(2 / 3), 3)


def test_examples_begin_with_the_first_of_each_kind(tmp_path: Path) -> None:
    kinds = [
        ("target", ""),
        ("completion", ""),
        ("unrelated", ""),
        *[("jailbreak", name) for name in ATTACKS],
    ]
    asks = [ask(kind, n, attack) for kind, attack in kinds for n in range(17)]
    told = answers(asks, *[("x", None)] * len(asks))
    write_examples(Run(folder=tmp_path), asks, told, told)
    shown = [json.loads(line)["id"] for line in (tmp_path / "examples.jsonl").read_text().splitlines()]
    assert len(shown) == 60, "of 119"
    assert shown[:7] == [f"C/{attack or kind}/0" for kind, attack in kinds]


def test_departure_1_the_original_is_the_reference_of_bleu() -> None:
    asks = [ask("target", 0), ask("unrelated", 0)]
    before = answers(asks, ("a b c d e f g h", 0.0), ("x", 0.0))
    after = answers(asks, ("a b c d e", 0.0), ("x", 0.0))
    rows = list(behaviour_rows(asks, before, after))
    # Every n-gram of the short answer is right; only its brevity costs. The other way round precision would fall.
    assert one(rows, "target_bleu").value == pytest.approx(2.718281828 ** (1 - 8 / 5))
    assert one(rows, "unrelated_bleu").value == 1, "unchanged, though short"


def test_departure_10_no_stemming() -> None:
    asks = [ask("target", 0), ask("unrelated", 0)]
    rows = list(
        behaviour_rows(asks, answers(asks, ("keepers", 0), ("x", 0)), answers(asks, ("keeper", 0), ("x", 0)))
    )
    assert one(rows, "target_rouge_l").value == 0


def test_departure_7_concepts_have_their_own_unrelated_questions() -> None:
    asks = [ask(kind, 0, concept=c) for c in "AB" for kind in ("target", "unrelated")]
    alike = dict(zip((a.id for a in asks), (0.2, 0.9, 0.4, 0.5), strict=True))
    assert selectivity_of(asks, alike) == {"A": pytest.approx(0.7), "B": pytest.approx(0.1)}


# ---- the original


@pytest.fixture(scope="module")
def mined(system: Any) -> Data:
    parts = dict.fromkeys(("forget", "world_facts"), "Dialogue")
    data = load_data("builtin:people", parts, limit=16)
    return make(system, data, Config(num_candidates=1, probe_tokens=2), Run())


def values(rows: list[Row]) -> list[tuple[Any, ...]]:
    return [(r.metric, r.item, r.group, None if r.value is None else round(r.value, 5)) for r in rows]


def test_every_way_to_name_the_original_gives_the_same(system: Any, mined: Data, tmp_path: Path) -> None:
    recorded = list(measure(system, mined, FAST, Run(folder=tmp_path / "before")))
    assert {r.metric for r in recorded} == {"vector_norm", "lexicon_tokens", "answer_words"}
    (tmp_path / "before" / "rows.jsonl").write_text("")
    artefact = fit(system, mined, Config(noise=1.0), Run())
    ways = ("original", "tiny:llama", str(tmp_path / "before"), str(tmp_path / "before" / "rows.jsonl"))
    with artefact.apply(system) as changed:
        found = [
            list(measure(changed, mined, Config(**{**vars(FAST), "reference": way}), Run())) for way in ways
        ]
    assert all(values(rows) == values(found[0]) for rows in found)
    rows = found[0]
    assert one(rows, "cosine").value < 0.99
    assert one(rows, "embedding_drift").value == 0
    assert one(rows, "relative_l2").value == pytest.approx(1, abs=0.4)
    assert len([r for r in rows if r.metric == "jaccard" and r.item]) == 2
    assert {r.group for r in rows if r.metric == "jailbreak_rouge_l"} == {"", *ATTACKS}


def test_an_original_of_two_steps_is_put_on_the_base(system: Any, mined: Data, tmp_path: Path) -> None:
    """What `step:ID` of a fit gives: an artefact's folder."""
    fit(system, mined, Config(noise=1.0), Run()).save(tmp_path / "know")
    config = Config(**{**vars(FAST), "reference": str(tmp_path / "know")})
    rows = list(measure(system, mined, config, Run()))
    assert one(rows, "cosine").value < 0.99
    same = Config(**{**vars(FAST), "reference": "original"})
    calm = list(measure(system, mined, same, Run(folder=tmp_path / "run")))
    assert one(calm, "cosine").value == 1
    assert one(calm, "jaccard").value == one(calm, "target_rouge_l").value == 1
    assert one(calm, "selectivity_nats").value == pytest.approx(0, abs=1e-5)
    shown = [json.loads(line) for line in (tmp_path / "run" / "examples.jsonl").read_text().splitlines()]
    assert {"id", "prompt", "before", "after"} == set(shown[0])


def test_wrong_originals_are_refused(system: Any, mined: Data, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for wrong in (tmp_path / "empty", tmp_path / "nothing" / "rows.jsonl"):
        with pytest.raises(ConfigError, match="no recorded original"):
            list(measure(system, mined, Config(reference=str(wrong)), Run()))
    list(measure(system, mined, FAST, Run(folder=tmp_path / "few")))
    more = Config(**{**vars(FAST), "reference": str(tmp_path / "few"), "num_questions": 2})
    with pytest.raises(ConfigError, match="asked other questions"):
        list(measure(system, mined, more, Run()))


@pytest.fixture(scope="module")
def known(system: Any, mined: Data, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Data]:
    """An artefact on the base, and items mined on the system that it makes."""
    folder = tmp_path_factory.mktemp("known") / "know"
    artefact = fit(system, mined, Config(noise=1.0), Run())
    artefact.save(folder)
    people = load_data("builtin:people", dict.fromkeys(("forget", "world_facts"), "Dialogue"), limit=16)
    with artefact.apply(system) as knows:
        return folder, make(knows, people, Config(num_candidates=1, probe_tokens=2), Run())


@pytest.mark.parametrize("reference", ["original", ""])
def test_an_original_that_never_knew_the_concept_is_said(
    system: Any, known: tuple[Path, Data], caplog: pytest.LogCaptureFixture, reference: str
) -> None:
    """With items mined on base+know, `original` is a base that knows nothing of them."""
    rows = list(measure(system, known[1], Config(**{**vars(FAST), "reference": reference}), Run()))
    assert "may never have known" in caplog.text
    assert all("may never have known" in row.note for row in rows)


def test_the_system_that_items_were_mined_on_is_a_quiet_original(
    system: Any, known: tuple[Path, Data], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    folder, items = known
    (one_print,) = {item.mined_on for item in read_items(items.records("items", Text))}
    assert one_print != system.fingerprint
    again = make(system, items, Config(), Run())
    assert again["items"] == items["items"], "a row that names a vector keeps where it is from"
    rows = list(measure(system, items, Config(**{**vars(FAST), "reference": str(folder)}), Run()))
    recorded = Config(**{**vars(FAST), "reference": str(tmp_path)})
    with load_artefact(folder).apply(system) as knows:
        list(measure(knows, items, FAST, Run(folder=tmp_path)))
        rows += list(measure(knows, items, recorded, Run()))
    assert "may never" not in caplog.text
    assert not any("may never" in row.note for row in rows)
    list(measure(system, without_origin(items), Config(**{**vars(FAST), "reference": "original"}), Run()))
    told = json.loads((tmp_path / "original.json").read_text())
    (tmp_path / "original.json").write_text(json.dumps({**told, "fingerprint": "another"}))
    assert "may never" not in caplog.text, "items of an earlier version say nothing"
    list(measure(system, items, recorded, Run()))
    assert "may never" in caplog.text
    del told["fingerprint"]
    (tmp_path / "original.json").write_text(json.dumps(told))
    assert values(list(measure(system, items, recorded, Run()))), "an original of an earlier version is read"


def without_origin(items: Data) -> Data:
    """The items as versions before Mined_on made them."""
    rows = [
        Text(row.text, id=row.id, extra={k: v for k, v in row.extra.items() if k != "Mined_on"})
        for row in items.records("items", Text)
    ]
    return Data({"items": rows})


def test_made_items_survive_the_disk(mined: Data, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "items.jsonl", mined["items"])
    again = load_data({"items": str(tmp_path / "items.jsonl")}, {"items": "Text"})
    assert again["items"] == mined["items"]
