"""Counting verdicts, loading by name, known answers, and the checked-in accuracy."""

import json

import pytest

from temper import judges
from temper.core.errors import ConfigError, DataError, NeedsError
from temper.judges.accuracy import BUILTIN, HUMAN, measure_judge
from temper.judges.answers import AnswerJudge
from temper.judges.base import Judge, Verdict, content_hash
from temper.judges.loading import ACCURACY, NAMES
from temper.judges.train_classifier import LabelledReply


def verdict(label):
    return Verdict(label, 0.5, "")


def test_unscored_counts_for_neither_side():
    got = judges.tally([verdict(True), verdict(None), verdict(False), verdict(None)])
    assert got.rate == 0.5
    assert (got.yes, got.num_scored, got.num_unscored) == (1, 2, 2)
    assert got.unscored_share == 0.5
    assert judges.tally([verdict(None)]).rate is None
    assert judges.tally([]).unscored_share == 0


def test_content_hash_sees_borders():
    assert content_hash("ab", "c") != content_hash("a", "bc")
    assert content_hash("a") == content_hash(b"a")


@pytest.mark.parametrize("name", [n for n in NAMES if n != "refusal-classifier"])
def test_offline_judges_load_by_name(name):
    judge = judges.load(name)
    assert judge.name == name
    assert judge.judge([("Say hi.", "I'm sorry, I cannot do that.")])[0].label is True


def test_an_unknown_judge_gets_the_nearest_name():
    with pytest.raises(ConfigError, match="refusal-rules"):
        judges.load("refusal-rule")
    with pytest.raises(NeedsError, match="ModelJudge"):
        judges.load("model:tiny:llama+runs/x")


@pytest.mark.parametrize(
    ("rule", "reply", "reference", "label"),
    [
        ("exact", "The harbour.", "harbour", True),
        ("exact", "the old harbour", "harbour", False),
        ("contains", "It was Mara Lyn, of course", "Mara Lyn", True),
        ("contains", "Maralyn", "Mara Lyn", False),
        ("rouge", "she was born in the port of Ostrin", "born in Ostrin", True),
        ("rouge", "nothing alike", "born in Ostrin", False),
        ("number", "3 + 4 makes 7, so the answer is 1,250.0", "1250", True),
        ("number", "1250 or rather 7", "1250", False),
        ("number", "many", "1250", False),
    ],
)
def test_answers(rule, reply, reference, label):
    assert AnswerJudge({"q": [reference]}, rule).judge([("q", reply)])[0].label is label


def test_answers_take_the_best_reference_and_leave_unknown_prompts_unscored():
    judge = AnswerJudge({"q": ["blue", "azure"]}, "contains")
    assert [v.label for v in judge.judge([("q", "azure sky"), ("other", "blue")])] == [True, None]
    with pytest.raises(DataError, match="no number"):
        AnswerJudge({"q": ["none"]}, "number").judge([("q", "1")])
    with pytest.raises(ConfigError, match="contains"):
        AnswerJudge({}, "contain")


class Fixed(Judge):
    name, question, revision = "fixed", "?", "r"

    def __init__(self, labels):
        self.labels = labels

    def judge(self, pairs):
        return [verdict(label) for label in self.labels]


def test_accuracy_by_hand():
    rows = [LabelledReply("p", "r", gold) for gold in (True, True, True, False, False, True)]
    got = measure_judge(Fixed([True, True, False, True, False, None]), rows, "hand")
    assert (got.n, got.num_pos, got.unscored_share) == (6, 4, pytest.approx(1 / 6, abs=1e-4))
    assert got.precision == got.recall == got.f1 == pytest.approx(2 / 3, abs=1e-4)
    assert got.precision_low < got.precision < got.precision_high
    assert got.kappa == pytest.approx((3 / 5 - 13 / 25) / (12 / 25), abs=1e-4)


def test_accuracy_of_a_judge_that_never_says_yes():
    rows = [LabelledReply("p", "r", True), LabelledReply("p", "r", False)]
    got = measure_judge(Fixed([False, False]), rows, "hand")
    assert got.precision is None  # 0 of 0, not 0
    assert got.recall == 0
    silent = measure_judge(Fixed([None, None]), rows, "hand")
    assert (silent.unscored_share, silent.f1, silent.kappa) == (1.0, None, None)


def test_checked_in_accuracy_is_of_the_judges_as_they_are():
    rows = judges.measured()
    for name in NAMES:
        mine = {row.data: row for row in rows if row.judge == name}
        assert set(mine) == {BUILTIN, f"{HUMAN}:test", f"{HUMAN}:extra"}, (
            f"measure {name}: python -m temper.judges.accuracy"
        )
        revision = judges.load(name).revision
        assert {row.revision for row in mine.values()} == {revision}, (
            f"{name} changed: python -m temper.judges.accuracy"
        )


def test_checked_in_accuracy_keeps_counts_only():
    for line in ACCURACY.read_text().splitlines():
        texts = [value for value in json.loads(line).values() if isinstance(value, str)]
        assert all(len(text) < 60 for text in texts)
