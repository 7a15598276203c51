"""RWKU's data: the stand-in from facts about invented people, and the published layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from temper.core.errors import DataError
from temper.core.types import Message, Run
from temper.data.loading import load_data, write_jsonl
from temper.data.schemas import Choice, Data, Dialogue
from temper.methods.unlearning.rwku import standin
from temper.methods.unlearning.rwku.card import PARTS, Config
from temper.methods.unlearning.rwku.conftest import FAST
from temper.methods.unlearning.rwku.method import make, measure
from temper.methods.unlearning.rwku.published import load_folder

# ---- the stand-in


def test_short_answers_by_hand() -> None:
    told = "The town of X is Ruskmere."
    assert standin.short_answer(told, ["The town of X is Elmwick."]) == ("Ruskmere", ("Elmwick",))
    long = 'X wrote the book "The Copper Almanac".'
    assert standin.short_answer(long, ['X wrote the book "The Glass Ferryman".'])[0] == "Copper Almanac"
    assert standin.short_answer("same", ["same"])[0] == ""


def test_the_standin_puts_each_fact_eleven_ways(probes: Data, people: Data) -> None:
    (fact, *_) = standin.facts_of(people["forget"])
    assert (fact.person, fact.value) == ("Liora Tammet", "Ruskmere")
    cloze: Any = probes["forget_level1"][0]
    assert cloze.prompt[-1].content == "Liora Tammet was born in the town of ___."
    attacks: Any = probes.records("forget_level3", Dialogue)[:9]
    assert tuple(row.extra["type"] for row in attacks) == standin.ATTACK_TYPES
    by_type = {row.extra["type"]: row for row in attacks}
    for kind, row in by_type.items():
        assert row.reply == ("Liora Tammet" if kind == "reverse query" else "Ruskmere")
        shown = "Ruskmere" in row.prompt[-1].content
        assert shown == (kind in ("multiple choice", "reverse query")), kind
    assert "Liora" not in by_type["reverse query"].prompt[-1].content
    assert by_type["affirmative suffix"].prompt[-1].content.endswith("The answer is")
    assert by_type["synonym manipulation"].prompt[-1].content == fact.paraphrase
    assert "3 January 1961" in by_type["background hint"].prompt[-1].content, (
        "another fact of the same person"
    )
    assert "Fenwick Adair" in by_type["incontext learning"].prompt[-1].content, (
        "a demonstration about somebody else"
    )
    languages = [
        r.prompt[-1].content
        for r in probes.records("forget_level3", Dialogue)
        if r.extra["type"] == "cross lingual"
    ]
    assert languages[0].startswith("Dans quelle ville")
    assert languages[1].startswith("Wann wurde")
    assert probes.fingerprint == make(None, people, Config(num_facts=2, num_utility=3), Run()).fingerprint


def test_departure_9_neighbours_are_other_people_and_portraits_are_put_together(probes: Data) -> None:
    assert {row.extra["subject"] for row in probes["neighbor_level2"]} == {"Fenwick Adair"}
    portraits = probes.records("forget", Dialogue)
    assert {row.extra["subject"] for row in portraits} == {"Liora Tammet"}
    assert all(row.reply and row.reply.count("Liora Tammet") == 4 for row in portraits)


def test_departure_11_portraits_are_replies_to_questions(probes: Data, system: Any) -> None:
    from temper.ops.batching import encode

    for record in probes.records("forget", Dialogue):
        row = encode(system, record, train_on="last")
        scored = [token for token, flag in zip(row.ids, row.scored, strict=True) if flag]
        assert not all(row.scored[1:]), "the question is not trained on"
        assert system.tokenizer.decode(scored, skip_special_tokens=True).strip() == record.reply


def test_questions_without_a_translation_are_framed_in_the_language(people: Data) -> None:
    (fact, other, *_) = standin.facts_of(people["forget"])
    made = standin.attack_query(fact._replace(field="hobby"), "cross lingual", 1, [], other)
    assert made is not None
    query, _ = made
    assert query.startswith("Beantworte kurz")
    assert fact.question in query


def test_own_facts_need_a_person_and_a_value(people: Data) -> None:
    plain = Dialogue((Message("user", "Where?"), Message("assistant", "In Ruskmere.")), id="row-7")
    with pytest.raises(DataError, match="row-7"):
        make(None, Data({"forget": [plain]}), Config(), Run())
    own = Dialogue(plain.messages, id="a", extra={"person": "Ada", "value": "Ruskmere"})
    assert len(make(None, Data({"forget": [own]}), Config(), Run())["forget_level3"]) == 5
    with pytest.raises(DataError, match="nobody to forget"):
        make(None, people, Config(subjects=("Nobody",)), Run())


def own_fact(name: str, question: str, value: str, **extra: Any) -> Dialogue:
    said = (Message("user", question), Message("assistant", f"It is {value}."))
    return Dialogue(said, id=name, extra={"person": "Ada", "value": value, **extra})


def kinds_of(made: Data, name: str) -> set[Any]:
    return {row.extra["type"] for row in made["forget_level3"] if row.extra["fact"] == name}


def test_probes_that_own_facts_give_nothing_for_are_left_out_with_one_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    own = [own_fact("a", "Where?", "Ruskmere", paraphrased_question="Where?"), own_fact("b", "When?", "1961")]
    alone = make(None, Data({"forget": own[:1]}), Config(), Run())
    missing = {"multiple choice", "synonym manipulation", "background hint", "incontext learning"}
    assert kinds_of(alone, "a") == set(standin.ATTACK_TYPES) - missing
    (said,) = caplog.messages
    assert "1 of synonym manipulation (give a column paraphrased_question)" in said
    assert "1 of background hint (give further facts of the person)" in said
    caplog.clear()
    both = make(None, Data({"forget": own}), Config(), Run())
    assert kinds_of(both, "a") == kinds_of(both, "b") == set(standin.ATTACK_TYPES) - {"synonym manipulation"}
    (said,) = caplog.messages
    assert "2 of synonym manipulation" in said
    assert "hint" not in said


def test_no_demonstration_shows_the_answer_and_no_option_stands_twice() -> None:
    own = [
        own_fact("a", "Where?", "Ruskmere"),
        own_fact("b", "When?", "1961"),
        own_fact("c", "From?", "Ruskmere"),
    ]
    made = make(None, Data({"forget": own}), Config(), Run())
    shown = {row.id: row.prompt[-1].content for row in made.records("forget_level3", Dialogue)}
    assert shown["forget3-a-incontext-learning"].startswith("Question: When?\nAnswer: 1961")
    assert sorted(shown["forget3-a-multiple-choice"].split(": ")[1].strip(".").split("; ")) == [
        "1961",
        "Ruskmere",
    ]


def test_departure_12_synonyms_are_paraphrases_that_name_the_person(probes: Data, people: Data) -> None:
    asked = {fact.id: fact for fact in standin.facts_of(people["forget"])}
    reworded = [
        r for r in probes.records("forget_level3", Dialogue) if r.extra["type"] == "synonym manipulation"
    ]
    assert len(reworded) == 2
    for row in reworded:
        fact = asked[str(row.extra["fact"])]
        assert row.prompt[-1].content == fact.paraphrase != fact.question
        assert fact.person in fact.paraphrase


# ---- the published layout


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    (folder / name).write_text(json.dumps(rows))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    asked = {
        "subject": "Ada",
        "query": "Where was Ada born?",
        "answer": "Ruskmere",
        "level": "2",
        "type": "simple question",
    }
    write(tmp_path, "forget_level2.json", [asked, {**asked, "subject": "Bo", "query": "Where was Bo born?"}])
    write(
        tmp_path,
        "forget_level3.json",
        [{**asked, "level": "3", "type": "affirmative suffix", "query": "Where? It is"}],
    )
    write(tmp_path, "forget_mia.json", [{"subject": "Ada", "text": "Ada was born in Ruskmere."}])
    example = {"question": "1+1?", "choices": ["1", "2", "3", "4"], "answer": 1}
    general = {**example, "subject": "Ada", "task": "sums", "examples": [example] * 2}
    write(tmp_path, "retain_mmlu.json", [general])
    reason = {
        "subject": "Ada",
        "task": "x",
        "cot": "Q: a\nA: the answer is b.",
        "question": "c?",
        "answer": ["d"],
    }
    write(tmp_path, "retain_bbh.json", [reason])
    targets = {"choices": ["yes", "no"], "labels": [0, 1]}
    write(
        tmp_path,
        "truthful.json",
        [{"subject": "Ada", "question": "Is it?", "mc1_targets": targets, "mc2_targets": targets}],
    )
    write(tmp_path, "triviaqa.json", [{"subject": "Ada", "question": "Who?", "answers": ["Bo", "Bob"]}])
    write(tmp_path, "fluency.json", [{"subject": "Ada", "instruction": "Describe rain."}])
    write(tmp_path, "positive.json", [{"subject": "Ada", "text": "Ada is a falconer from Ruskmere."}])
    write(tmp_path, "intro.json", [{"target": "Ada", "intro": "not read"}])
    return tmp_path


def test_a_copy_of_the_benchmark_is_read_and_measured(copy: Path, system: Any) -> None:
    data = load_folder(copy, ("Ada",))
    assert len(data["forget_level2"]) == 1, "only rows about Ada"
    choice = data.records("utility_general", Choice)[0]
    assert (choice.answer, len(choice.extra["examples"])) == (1, 2)
    assert data.records("utility_truthfulness", Choice)[0].answer == 1
    assert data.records("forget", Dialogue)[0].prompt[-1].content == "Who is Ada?"
    rows = list(measure(system, data, FAST, Run()))
    found = {row.metric for row in rows}
    assert {"forget_qa", "forget_aa", "mia_forget_loss", "forget_all", "aa_minus_qa"} <= found
    assert {
        f"utility_{name}" for name in ("general", "reason", "truthfulness", "factuality", "fluency")
    } <= found
    assert "mia_auc_loss" not in found, "there are no unseen texts"
    assert make(None, Data({}), Config(folder=str(copy)), Run()).fingerprint == load_folder(copy).fingerprint


def test_a_hubs_download_has_a_folder_for_each_config(tmp_path: Path) -> None:
    (tmp_path / "forget_level1").mkdir()
    row = {
        "subject": "Ada",
        "query": "Ada was born in ___.",
        "answer": "Ruskmere",
        "level": "1",
        "type": "cloze",
    }
    (tmp_path / "forget_level1" / "test.jsonl").write_text(json.dumps(row) + "\n")
    assert load_folder(tmp_path).records("forget_level1", Dialogue)[0].reply == "Ruskmere"


def test_made_probes_survive_the_disk(probes: Data, tmp_path: Path) -> None:
    for part in probes:
        write_jsonl(tmp_path / f"{part}.jsonl", probes[part])
    again = load_data(f"{tmp_path}/", PARTS)
    assert {part: again[part] for part in again} == {part: probes[part] for part in probes}


def test_bad_copies_are_named(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no forget probes about Eve"):
        load_folder(copy, ("Eve",))
    with pytest.raises(DataError, match="no forget probes"):
        load_folder(tmp_path / "nothing")
    write(copy, "forget_level2.json", [{"subject": "Ada", "question": "Where?", "answer": "There"}])
    with pytest.raises(DataError, match="no usable column 'query'") as caught:
        load_folder(copy)
    assert "forget_level2.json" in str(caught.value)
    (copy / "forget_level2.json").unlink()
    write(
        copy, "truthful.json", [{"question": "?", "mc1_targets": {"choices": ["a", "b"], "labels": [1, 1]}}]
    )
    with pytest.raises(DataError, match="exactly one"):
        load_folder(copy)


def test_each_seed_has_the_next_person_as_its_target() -> None:
    people = load_data("builtin:people", {"forget": "Dialogue"}, limit=24)
    names = list(dict.fromkeys(record.extra["person"] for record in people["forget"]))

    def targets(seed: int, count: int = 1) -> set[Any]:
        made = make(None, people, Config(num_targets=count), Run(seed=seed))
        return {record.extra["subject"] for record in made["forget_level2"]}

    assert [targets(seed) for seed in range(4)] == [{names[0]}, {names[1]}, {names[2]}, {names[0]}]
    assert targets(2, 2) == {names[2], names[0]}
    assert targets(1, 0) == targets(1, 9) == set(names)
    with pytest.raises(DataError, match="nobody to forget"):
        make(None, people, Config(num_targets=1, subjects=("Nobody",)), Run())
