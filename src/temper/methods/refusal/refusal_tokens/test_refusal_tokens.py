"""The rules of the gate and its thresholds by hand, and Departures 2, 3, 5, 6 and 8."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from temper.core.errors import DataError
from temper.methods.refusal.refusal_tokens.calibration import choose_thresholds
from temper.methods.refusal.refusal_tokens.card import Config
from temper.methods.refusal.refusal_tokens.conftest import NAMES, emitted, gate, two_tokens
from temper.methods.refusal.refusal_tokens.gate import (
    COMPARE,
    FREE,
    Controls,
    ReadOut,
    decide_bias,
    decide_columns,
)
from temper.methods.refusal.refusal_tokens.scoring import off_effect
from temper.ops import thresholds
from temper.ops.search_prompt import PrefixesReply

CARD_P = np.array([[0.02, 0.30, 0.05, 0.08, 0.03, 0.50]])  # ..., respond; leak .02


def test_two_token_case_by_hand() -> None:
    p = gate().read(two_tokens()).p_NK[0]
    assert p[0] == pytest.approx(1 / (1 + math.e), abs=1e-6)
    assert emitted(gate(selected=("refuse",)), two_tokens()) == 1, "T = -1 compares: 0.2689 < 0.7311"
    assert emitted(gate(selected=("refuse",), refuse=0.25), two_tokens()) == 0
    assert emitted(gate(selected=("refuse",), refuse=0.28), two_tokens()) == 1


def test_bias_is_the_threshold_in_other_words() -> None:
    assert thresholds.threshold_from_bias(1.2) == pytest.approx(0.2315, abs=1e-4)
    assert int(decide_bias(two_tokens(), [0, 1], np.array([1.2]))) == 0
    assert int(decide_bias(two_tokens(), [0, 1], np.array([0.9]))) == 1
    for refuse in np.linspace(-3, 3, 25):
        for threshold in (0.05, 0.2689, 0.5, 0.9):
            logits = two_tokens(float(refuse), 0.3)
            by_gate = emitted(gate(selected=("refuse",), refuse=threshold), logits)
            by_bias = emitted(gate(mode="bias", selected=("refuse",), refuse=threshold), logits)
            assert by_gate == by_bias


@pytest.mark.parametrize(("threshold", "column"), [(0.0, 0), (2.0, 1)])
def test_ends_of_the_dial(threshold: float, column: int) -> None:
    for refuse in (-20.0, 0.0, 20.0):
        for mode in ("gate", "bias"):
            assert (
                emitted(gate(mode=mode, selected=("refuse",), refuse=threshold), two_tokens(refuse)) == column
            )


def test_temperature_keeps_the_ranking_of_two() -> None:
    p = thresholds.control_probs(two_tokens(), [0, 1], 2.0)[0]
    assert p[0] == pytest.approx(0.3775, abs=1e-4)


@pytest.mark.parametrize(
    ("selected", "threshold", "column"),
    [
        (("incomplete",), 0.25, 1),
        (("incomplete",), 0.35, 5),
        (("safety",), 0.0, 5),
        (("safety",), 0.9, 5),
        ((), 0.0, 5),
    ],
)
def test_category_case_by_hand(selected: tuple[str, ...], threshold: float, column: int) -> None:
    read = ReadOut(CARD_P, np.array([5]))
    chosen = np.array([name in selected for name in NAMES])
    assert decide_columns(read, np.full(5, threshold), chosen)[0] == column


def test_unselected_leader_leaves_the_model_its_own_argmax() -> None:
    read = ReadOut(np.array([[0.02, 0.05, 0.01, 0.01, 0.01, 0.1]]), np.array([FREE]))
    assert decide_columns(read, np.full(5, 0.0), np.array([True, False, True, True, True]))[0] == FREE


def test_departure_2_each_category_has_its_threshold() -> None:
    p = np.array([[0.4, 0.1, 0.5], [0.1, 0.4, 0.5]])
    read, both = ReadOut(p, np.array([2, 2])), np.array([True, True])
    assert decide_columns(read, np.array([0.3, 0.45]), both).tolist() == [0, 2]
    assert decide_columns(read, np.array([0.45, 0.3]), both).tolist() == [2, 1]


def test_sum_and_ratio_rules_by_hand() -> None:
    read, every = ReadOut(CARD_P, np.array([5])), np.ones(5, dtype=bool)
    assert decide_columns(read, np.full(5, 0.47), every, "sum")[0] == 1, "sum over refusals is .48"
    assert decide_columns(read, np.full(5, 0.49), every, "sum")[0] == 5
    ratio = np.array([0.5, 0.5, 0.5, 0.07, 0.5])
    assert decide_columns(read, ratio, every, "ratio")[0] == 3, "safety: .08 / .07 is the only ratio above 1"
    assert decide_columns(read, np.full(5, 0.31), every, "ratio")[0] == 5


def test_departure_8_a_refusal_at_exactly_the_threshold_is_one() -> None:
    read = ReadOut(np.array([[0.25, 0.75]]), np.array([1]))
    assert decide_columns(read, np.array([0.25]), np.array([True]))[0] == 0
    tie = ReadOut(np.array([[0.2, 0.2, 0.6]]), np.array([2]))
    assert decide_columns(tie, np.array([0.1, 0.1]), np.array([True, True]))[0] == 0


def test_compare_is_per_row() -> None:
    logits = torch.cat([two_tokens(3.0, 2.0), two_tokens(1.0, 2.0)])
    rule = gate(selected=("refuse",))
    assert rule(logits, [0, 0], [{}, {}]).argmax(-1).tolist() == [0, 1]


def test_departure_5_control_tokens_never_reappear() -> None:
    rule = gate(selected=("refuse",))
    logits = torch.tensor([[9.0, 8.0, 1.0, 0.5]])
    out = rule(logits, [3], [{}])
    assert out.argmax().item() == 2
    assert torch.isinf(out[0, :2]).all()
    assert torch.equal(out[0, 2:], logits[0, 2:]), "other logits stay as they are"


def test_state_tells_verdict_category_and_force() -> None:
    rule = gate(NAMES, selected=("incomplete",), incomplete=0.25)
    states = [rule.start([]), rule.start([])]
    logits = torch.log(torch.tensor([[*CARD_P[0], 0.02], [0.01, 0.01, 0.01, 0.01, 0.01, 0.05, 0.90]]))
    rule(logits, [0, 0], states)
    assert (states[0]["verdict"], states[0]["category"], states[0]["forced"]) == (
        "refuse",
        "incomplete",
        True,
    )
    assert states[0]["p"]["safety"] == pytest.approx(0.08, abs=1e-6)
    assert states[0]["leak"] == pytest.approx(0.02, abs=1e-6)
    assert (states[1]["verdict"], states[1]["category"]) == ("none", None), (
        "an unselected leader: the model's own word"
    )


def test_departure_6_a_control_id_in_the_prompt_is_refused() -> None:
    with pytest.raises(DataError, match="control ids"):
        gate().start([7, 1, 3])


def test_controls_round_trip() -> None:
    controls = Controls((10, 11), ("a", "b"), 12)
    assert Controls.from_json(controls.to_json()) == controls
    assert controls.ids == [10, 11, 12]
    assert [controls.column(x) for x in ("a", "b", None)] == [0, 1, 2]
    assert COMPARE < 0


def test_thresholds_by_category_maximise_the_average_that_is_asked_for() -> None:
    """A row of b that a leads is a right refusal (micro) and a wrong a (macro), so only macro cuts it off."""
    read = ReadOut(
        np.array([[0.7, 0.1, 0.2], [0.6, 0.1, 0.3], [0.1, 0.6, 0.3], [0.2, 0.1, 0.7]]), np.zeros(4)
    )
    controls = Controls((1, 2), ("a", "b"), 3)
    micro = choose_thresholds(read, [0, 1, 1, 2], controls, Config())
    macro = choose_thresholds(read, [0, 1, 1, 2], controls, Config(average="macro"))
    assert micro["a"] < 0.6 < macro["a"] < 0.7
    only_b = choose_thresholds(read, [0, 1, 1, 2], controls, Config(average="macro", selected=("b",)))
    assert only_b["a"] == 0.5, "a category that is not selected keeps its start"


def test_departure_3_the_temperature_stays_what_it_is() -> None:
    rule = gate(selected=("refuse",), refuse=0.3)
    rule.temperature = 2.0
    first, second = emitted(rule, two_tokens()), emitted(rule, two_tokens())
    assert first == second == 0, "sigmoid(-0.5) = .3775 >= .3, in every call"


def test_off_effect_by_hand() -> None:
    rule = gate(("a", "b"))
    p = np.array([[0.8, 0.1, 0.1], [0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.1, 0.1, 0.8]])
    read = ReadOut(p, p.argmax(axis=1))
    of_a, of_b = np.array([True, True, False, False]), np.array([False, False, True, False])
    assert off_effect(read, rule, 0, {0: of_a, 1: of_b}) == (1.0, 0.0)
    assert off_effect(read, rule, 1, {0: of_a, 1: of_b}) == (1.0, 0.0)


def test_an_answer_opens_with_the_respond_token() -> None:
    assert gate(NAMES).reply_prefix_ids() == [5]
    assert isinstance(gate(NAMES), PrefixesReply)
