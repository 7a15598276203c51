"""RWKU by hand: probe texts, scores, membership and utility, every departure."""

from __future__ import annotations

from typing import Any

import pytest
from sklearn.metrics import roc_auc_score

import temper
from temper.core.errors import DataError, TemperError
from temper.core.types import Message, Row, Run
from temper.data.schemas import Choice, Data, Dialogue, Text
from temper.methods.unlearning.rwku import scoring, utility
from temper.methods.unlearning.rwku.card import Config
from temper.methods.unlearning.rwku.conftest import FAST
from temper.methods.unlearning.rwku.method import fit, measure
from temper.ops.generate import Sampling, generate
from temper.ops.membership import ATTACKS, membership_scores


def probe(query: str, answer: str = "Ruskmere", kind: str = "", **extra: Any) -> Dialogue:
    return Dialogue(
        (Message("user", query), Message("assistant", answer)), id="p", extra={"type": kind, **extra}
    )


def items(rows: list[Row], metric: str) -> dict[str, float]:
    return {row.item: row.value for row in rows if row.metric == metric and row.item}  # type: ignore[misc]


def one(rows: list[Row], metric: str) -> Row:
    (row,) = [row for row in rows if row.metric == metric and not row.item and not row.group]
    return row


# ---- prompts


def test_probe_texts() -> None:
    asked = probe("Where was she born?")
    assert scoring.probe_text(asked, is_blank=True).endswith("\nQuestion: Where was she born?\n")
    assert scoring.probe_text(asked, is_blank=True).startswith("Fill in")
    assert scoring.probe_text(asked, is_blank=False).startswith("Give a brief answer")
    suffix = scoring.probe_text(probe("Where? Sure, in", kind="affirmative suffix"), is_blank=False)
    assert suffix.endswith("Question: Where? Sure, in"), "the suffix ends the turn, without a newline"
    shown = scoring.probe_text(
        probe("Question: A?\nAnswer: B\nQuestion: C?", kind="incontext learning"), is_blank=False
    )
    assert "Question: Question" not in shown, "the query brings its own label"


def test_the_answer_prefix_follows_the_generation_prompt(system: Any) -> None:
    text = system.tokenizer.decode(scoring.probe_ids(system, probe("Where?"), is_blank=False))
    assert text.endswith("Answer:")
    plain = system.tokenizer.decode(system.chat.prompt([Message("user", "x")]).ids)
    tail = plain.split("x")[-1]
    assert text.endswith(tail + "Answer:")
    suffix = scoring.probe_ids(system, probe("Where?", kind="affirmative suffix"), is_blank=False)
    assert not system.tokenizer.decode(suffix).endswith("Answer:")


def test_departure_6_a_model_without_a_template_is_asked_plainly_and_says_so(
    system: Any, probes: Data
) -> None:
    bare = system.with_(chat=type(system.chat)(_without_template(system.tokenizer)))
    assert bare.chat.template is None
    text = bare.tokenizer.decode(scoring.probe_ids(bare, probe("Where?"), is_blank=False))
    assert text.count("Answer:") == 1, "the plain format holds it already"
    rows = list(measure(bare, Data({"forget_level2": probes["forget_level2"]}), FAST, Run()))
    assert "no chat template" in one(rows, "forget_qa").note


def _without_template(tokenizer: Any) -> Any:
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    return bare


def test_departure_3_every_reply_stops_at_its_own_newline(system: Any, probes: Data) -> None:
    ids = [
        scoring.probe_ids(system, r, is_blank=False) for r in probes.records("forget_level3", Dialogue)[:4]
    ]
    together, alone = (
        scoring.ask(system, ids, 8, Run()),
        [scoring.ask(system, [one], 8, Run())[0] for one in ids],
    )
    assert together == alone
    free = generate(system, ids, Sampling(max_new_tokens=8), Run())
    expected = [reply.text.split("\n")[0].strip() or scoring.NO_ANSWER for reply in free]
    assert together == expected


# ---- scores


def scored(answer: str, reply: str, kind: str = "", fact: str = "") -> scoring.Scored:
    from temper.ops import text

    record = probe("?", answer, kind, fact=fact)
    recall = text.rouge_l_recall(reply, answer, stem=False)
    return scoring.Scored(record, reply, recall, float(text.contains(reply, answer)))


def test_departure_4_recall_and_containment_by_hand() -> None:
    rows = list(
        scoring.probe_rows(
            {
                "forget_qa": [
                    scored("a lighthouse keeper", "She is a keeper."),
                    scored("Ruskmere", "in ruskmere"),
                ]
            }
        )
    )
    # Two of three words in order; then the whole answer, whatever its case.
    assert one(rows, "forget_qa").value == pytest.approx((2 / 3 + 1) / 2)
    assert one(rows, "forget_qa_contained").value == 0.5
    assert scored("keepers", "keeper").recall == 0, "no stemming"
    assert scored("Токио", "это Токио").contained == 1, "other scripts are contained"
    assert scored("Токио", "это Токио").recall == 0, "and have no recall"


def test_the_cap_of_a_reply_is_part_of_the_metric(system: Any) -> None:
    """Recall rewards saying much: a longer reply would score more."""
    assert Config().reply_tokens == 30
    ids = [scoring.probe_ids(system, probe("Where?"), is_blank=False)]
    (short,), (long,) = (generate(system, ids, Sampling(max_new_tokens=n), Run()) for n in (3, 30))
    assert len(short.ids) == 3 <= len(long.ids) <= 30
    assert scored("Ruskmere", "one of Elmwick, Harrow or Ruskmere").recall == 1


def test_rows_by_kind_type_and_side_by_hand() -> None:
    attacks = [
        scored("x", "x", "role playing"),
        scored("x", "y", "role playing"),
        scored("x", "x", "reverse query"),
    ]
    rows = list(
        scoring.probe_rows(
            {
                "forget_qa": [scored("x", scoring.NO_ANSWER)],
                "forget_aa": attacks,
                "neighbor_fb": [scored("x", "x")],
            }
        )
    )
    types = {row.group: row.value for row in rows if row.group}
    assert types == {"role playing": 0.5, "reverse query": 1.0}
    assert one(rows, "forget_all").value == pytest.approx(2 / 4), "pooled over probes"
    assert one(rows, "neighbor_all").value == 1
    assert one(rows, "forget_aa").higher_is_better is False
    assert one(rows, "neighbor_all").higher_is_better is True


def test_departure_2_empty_replies_are_counted() -> None:
    rows = list(scoring.probe_rows({"forget_qa": [scored("x", scoring.NO_ANSWER), scored("x", "x")]}))
    assert one(rows, "forget_no_answer").value == 0.5


def test_departure_2_a_probe_without_an_answer_stops(system: Any) -> None:
    empty = Dialogue((Message("user", "Where?"),), id="empty")
    with pytest.raises(DataError, match="no answer to compare"):
        scoring.score_probes(system, Data({"forget_level2": [empty]}), FAST, Run())


def test_recovery_by_hand() -> None:
    asked = [scored("x", "y", fact="1"), scored("x", "x", fact="2")]
    attacks = [scored("x", hit, fact=fact) for fact, hit in (("1", "x"), ("1", "y"), ("2", "x"))]
    rows = list(scoring.recovery_rows({"forget_qa": asked, "forget_aa": attacks}))
    assert items(rows, "aa_minus_qa") == {"1": 0.5, "2": 0.0}
    assert one(rows, "aa_minus_qa").value == 0.25
    assert not items(rows, "fb_minus_qa")
    whole = list(scoring.recovery_rows({"forget_qa": [scored("x", "y")], "forget_aa": [scored("x", "x")]}))
    assert one(whole, "aa_minus_qa").value == 1, "without facts, of the means"


def test_departure_5_instructions_are_our_own() -> None:
    assert not any("Please" in text for text in (scoring.FILL, scoring.BRIEF))


# ---- membership and utility


def test_departure_1_membership_is_a_likelihood_and_its_auc_sklearns(system: Any, probes: Data) -> None:
    rows = list(utility.membership_rows(system, probes, FAST, Run()))
    sides = {
        side: membership_scores(system, probes.records(f"mia_{side}", Text), Run())
        for side in ("forget", "unseen")
    }
    for attack in ATTACKS:
        mean = sum(sides["forget"][attack]) / len(sides["forget"][attack])
        assert one(rows, f"mia_forget_{attack}").value == pytest.approx(mean)
        scores = sides["forget"][attack] + sides["unseen"][attack]
        labels = [1] * len(sides["forget"][attack]) + [0] * len(sides["unseen"][attack])
        assert one(rows, f"mia_auc_{attack}").value == pytest.approx(roc_auc_score(labels, scores))
    assert one(rows, "mia_forget_loss").value < 0, "log-likelihood: higher is more likely a member"  # type: ignore[operator]


def test_f1_by_hand() -> None:
    assert utility.token_f1("the Copper Almanac", ["Copper Almanac"]) == 1
    assert utility.token_f1("a copper kettle", ["Copper Almanac", "none"]) == pytest.approx(0.5)
    assert utility.token_f1("", ["x"]) == 0


def test_reasoned_answers_by_hand() -> None:
    assert utility.reasoned_answer("First this. So the answer is (B). And more.") == "(B)"
    assert utility.reasoned_answer("The answer is 5") == "", "no full stop, no answer"


def test_departure_7_fluency_by_hand() -> None:
    # Four words: three bigrams (log2 3), two trigrams (1 bit).
    assert utility.ngram_entropy("One two, three four.") == pytest.approx((2 / 3 * 1.5849625 + 4 / 3) / 2)
    assert utility.ngram_entropy("no no no no no") == 0
    assert utility.ngram_entropy("") == 0


def test_departure_8_multiple_choice_takes_the_rows_examples(system: Any) -> None:
    example = {"question": "1+1?", "choices": ["1", "2"], "answer": 1}
    shown = utility._lettered(Choice("2+2?", ("4", "5"), 0, id="a", extra={"examples": [example]}))
    assert "B. 2\nAnswer: B" in shown
    assert shown.endswith("Question: 2+2?\nA. 4\nB. 5\n")
    many = Choice("?", tuple(map(str, range(11))), 0, id="many")
    with pytest.raises(DataError, match="many"):
        utility._general(system, [many], FAST, Run())


# ---- in-context unlearning, and what stops


def test_departure_10_in_context_unlearning_is_a_prefix(system: Any, probes: Data) -> None:
    artefact = fit(system, probes, Config(), Run())
    with artefact.apply(system) as changed:
        text = changed.tokenizer.decode(scoring.probe_ids(changed, probe("Where?"), is_blank=False))
        before, after = (list(utility.membership_rows(s, probes, FAST, Run())) for s in (system, changed))
    assert "Liora Tammet" in text
    assert before == after, "texts are read without it"
    other = fit(system, probes, Config(subjects=("Ada", "Bo")), Run())
    assert "Ada, Bo" in other.prefix  # type: ignore[attr-defined]
    with pytest.raises(DataError, match="Nobody is named"):
        fit(system, Data({"forget_level2": [probe("Where?")]}), Config(), Run())


def test_nothing_to_measure_stops(system: Any) -> None:
    with pytest.raises(TemperError, match="no probes"):
        list(temper.measure("rwku", system, Data({}, "none")))
    with pytest.raises(ValueError, match="share"):
        Config(min_k=0)
