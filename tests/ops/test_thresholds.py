"""Thresholds: worked numbers, a brute-force twin for every choice, and the guarantees the docstrings give."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from temper.core.errors import ConfigError, DataError
from temper.ops import thresholds as th

CASE = [
    [0.02, 0.30, 0.05, 0.08, 0.03, 0.50]
]  # human, incomplete, indeterminate, safety, unsupported, respond


@st.composite
def samples(draw):
    # Few distinct values: ties are the hard part.
    n = draw(st.integers(2, 24))
    scores = draw(st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.7, 0.99, 1.0]), min_size=n, max_size=n))
    labels = draw(st.lists(st.booleans(), min_size=n, max_size=n).filter(lambda x: 0 < sum(x) < len(x)))
    return np.array(scores), np.array(labels)


def counts(scores, labels, threshold):
    refused = scores >= threshold
    return int((refused & labels).sum()), int((refused & ~labels).sum())


@given(samples())
@settings(deadline=None)
def test_sweep_equals_counting_at_every_distinct_score(sample):
    scores, labels = sample
    curve = th.sweep(scores, labels)
    assert curve.threshold.tolist() == [math.inf, *sorted(set(scores), reverse=True)]
    for t, tp, fp in zip(curve.threshold, curve.tp, curve.fp, strict=True):
        assert (tp, fp) == counts(scores, labels, t)


@given(samples())
@settings(deadline=None)
def test_rates_never_fall_as_the_threshold_falls(sample):
    curve = th.sweep(*sample)
    assert (np.diff(curve.tpr) >= 0).all()
    assert (np.diff(curve.fpr) >= 0).all()
    assert curve.tpr[0] == curve.fpr[0] == 0
    assert curve.tpr[-1] == curve.fpr[-1] == 1


@given(samples(), st.randoms())
@settings(deadline=None)
def test_sweep_does_not_depend_on_the_order_of_items(sample, rng):
    scores, labels = sample
    order = list(range(len(scores)))
    rng.shuffle(order)
    a, b = th.sweep(scores, labels), th.sweep(scores[order], labels[order])
    assert a.tp.tolist() == b.tp.tolist()
    assert a.fp.tolist() == b.fp.tolist()


def brute(scores, labels, objective):
    """The best threshold by trying all of them, the highest among equals: (tp, fp)."""
    candidates = [math.inf, *sorted(set(scores), reverse=True)]
    values = [objective(*counts(scores, labels, t)) for t in candidates]
    return counts(scores, labels, candidates[int(np.argmax(values))])


OBJECTIVES = {
    "f1": lambda p, n: lambda tp, fp: 2 * tp / (2 * tp + fp + p - tp),
    "fpr": lambda p, n: lambda tp, fp: tp / p if fp / n <= 0.3 else -1,
    "rate": lambda p, n: lambda tp, fp: -abs((tp + fp) / (p + n) - 0.4),
    "cost": lambda p, n: lambda tp, fp: -(3.0 * (p - tp) + 1.0 * fp),
}


@pytest.mark.parametrize("mode", OBJECTIVES)
@given(sample=samples())
@settings(max_examples=60, deadline=None)
def test_choose_equals_brute_force(mode, sample):
    scores, labels = sample
    choice = th.choose(scores, labels, mode, alpha=0.3, rate=0.4, cost_fn=3.0)
    p, n = int(labels.sum()), int((~labels).sum())
    tp, fp = brute(scores, labels, OBJECTIVES[mode](p, n))
    assert counts(scores, labels, choice.threshold) == (tp, fp)  # the threshold does what the choice says
    assert choice.tpr == tp / p
    assert choice.fpr == fp / n
    assert choice.rate == pytest.approx((tp + fp) / (p + n))


@given(samples(), st.floats(0, 1))
@settings(deadline=None)
def test_false_refusals_stay_within_alpha_whatever_the_ties(sample, alpha):
    scores, labels = sample
    threshold = th.choose(scores, labels, "fpr", alpha=alpha).threshold
    assert counts(scores, labels, threshold)[1] <= alpha * (~labels).sum() + 1e-9
    assert math.isfinite(threshold)


def test_a_threshold_lies_halfway_to_the_next_score():
    assert th.choose([0.9, 0.8, 0.2, 0.1], [1, 1, 0, 0]).threshold == pytest.approx(0.5)


def test_neighbouring_floats_are_still_told_apart():
    low = 0.5
    high = np.nextafter(low, 1)
    choice = th.choose([high, low], [1, 0])
    assert choice.f1 == 1
    assert low < choice.threshold <= high


@pytest.mark.parametrize(("labels", "word"), [([0, 0], "positive"), ([1, 1], "negative")])
def test_an_empty_class_refuses_to_calibrate(labels, word):
    with pytest.raises(DataError, match=f"refuse to calibrate.*no {word}"):
        th.choose([0.1, 0.2], labels)


def test_bad_input_is_named():
    with pytest.raises(DataError, match="not finite"):
        th.sweep([0.1, math.nan], [0, 1])
    with pytest.raises(DataError, match="do not pair up"):
        th.sweep([0.1], [0, 1])
    with pytest.raises(ConfigError, match="wanted rate"):
        th.choose([0.1, 0.2], [0, 1], "rate")
    with pytest.raises(ConfigError, match="Did you mean"):
        th.choose([0.1, 0.2], [0, 1], "f2")


def test_the_worked_category_case():
    incomplete, respond = 1, 5
    assert th.decide(CASE, 0.25, [incomplete]).tolist() == [incomplete]
    assert th.decide(CASE, 0.35, [incomplete]).tolist() == [respond]
    for t in (0.0, 0.05, 0.9):  # leader is not selected: the model's own choice stands
        assert th.decide(CASE, t, [3]).tolist() == [respond]
    assert th.leak(CASE).tolist() == pytest.approx([0.02])


def test_threshold_zero_always_refuses_and_above_one_never():
    assert th.decide(CASE, 0.0).tolist() == [1]
    assert th.decide(CASE, 1.01).tolist() == [5]


def test_sum_and_ratio_rules_by_hand():
    assert th.decide(CASE, 0.45, rule="sum").tolist() == [1]  # .48 together
    assert th.decide(CASE, 0.49, rule="sum").tolist() == [5]
    assert th.decide(CASE, 0.45, [0, 1], rule="sum").tolist() == [5]  # .32 together
    each = [0.5, 0.5, 0.5, 0.05, 0.5]  # safety reaches 1.6 times its threshold, incomplete 0.6 times
    assert th.decide(CASE, each, rule="ratio").tolist() == [3]
    with pytest.raises(ConfigError, match="Unknown rule"):
        th.decide(CASE, 0.5, rule="gates")


def test_the_worked_two_token_case():
    q = th.two_token_q(1.0, 2.0)
    assert q == pytest.approx(0.2689, abs=1e-4)
    assert q >= 0.25  # T = 0.25 refuses, comparing the two does not
    assert q < 0.5
    assert th.threshold_from_bias(1.2) == pytest.approx(0.2315, abs=1e-4)
    assert th.two_token_q(1.0, 2.0, temperature=2) == pytest.approx(0.3775, abs=1e-4)


@given(st.floats(-8, 8), st.floats(-8, 8), st.floats(0.001, 0.999))
@settings(deadline=None)
def test_bias_and_threshold_decide_alike(z_refuse, z_respond, threshold):
    bias = th.bias_from_threshold(threshold)
    margin = z_refuse + bias - z_respond
    if abs(margin) > 1e-9:
        assert (margin > 0) == (th.two_token_q(z_refuse, z_respond) > threshold)
    assert th.threshold_from_bias(bias) == pytest.approx(threshold, rel=1e-9)


def test_bias_at_the_ends():
    assert th.bias_from_threshold(0.0) == math.inf
    assert th.bias_from_threshold(1.0) == -math.inf
    assert th.threshold_from_bias(math.inf) == 0.0
    assert th.threshold_from_bias(-math.inf) == 1.0
    assert th.threshold_from_bias(-800.0) == 1.0
    with pytest.raises(ConfigError):
        th.bias_from_threshold(-1)


def test_control_probs_use_the_whole_vocabulary():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    want = logits.softmax(-1)[0, [3, 1]].tolist()
    assert th.control_probs(logits, [3, 1])[0].tolist() == pytest.approx(want)
    hot = (logits / 2).softmax(-1)[0, [3, 1]].tolist()
    assert th.control_probs(logits, [3, 1], temperature=2.0)[0].tolist() == pytest.approx(hot)
    with pytest.raises(ConfigError):
        th.control_probs(logits, [1], temperature=0.0)


@st.composite
def tables(draw):
    n, c = draw(st.integers(6, 18)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    p = np.round(rng.dirichlet(np.ones(c + 1), n), 1)  # rounded: ties
    gold = np.concatenate([np.arange(c + 1), rng.integers(0, c + 1, n - c - 1)])
    return p, gold


def slow_ascent(p, gold, average, passes):
    """The same ascent, every threshold tried by deciding all items again."""
    num = p.shape[1] - 1
    t = np.full(num, 0.5)
    best = th.category_f1(th.decide(p, t), gold, num, average)
    for _ in range(passes):
        for c in range(num):
            for candidate in [1.1, *sorted(set(p[:, c]), reverse=True)]:
                trial = t.copy()
                trial[c] = candidate
                value = th.category_f1(th.decide(p, trial), gold, num, average)
                if value > best + 1e-12:
                    best, t = value, trial
    return best


@given(tables(), st.sampled_from(["micro", "macro"]))
@settings(max_examples=80, deadline=None)
def test_ascent_equals_its_slow_twin(table, average):
    p, gold = table
    fast = th.choose_by_category(p, gold, average=average)
    assert fast.f1 == pytest.approx(slow_ascent(p, gold, average, 3))
    emitted = th.decide(p, fast.thresholds)
    assert fast.f1 == pytest.approx(th.category_f1(emitted, gold, p.shape[1] - 1, average))
    assert all(b >= a for a, b in zip(fast.history, fast.history[1:], strict=False))


def test_ascent_leaves_unselected_thresholds_alone():
    p = np.array([[0.6, 0.1, 0.3], [0.4, 0.1, 0.5], [0.1, 0.4, 0.5], [0.1, 0.1, 0.8]])
    result = th.choose_by_category(p, [0, 0, 1, 2], selected=[0])
    assert result.thresholds[1] == 0.5
    assert 0.1 < result.thresholds[0] <= 0.4


def test_ascent_refuses_a_category_without_items():
    with pytest.raises(DataError, match="no item of humanizing"):
        th.choose_by_category([[0.5, 0.2, 0.3]] * 2, [1, 2], names=["humanizing", "safety"])
    with pytest.raises(DataError, match="no item of the answered class"):
        th.choose_by_category([[0.5, 0.5]], [0])


def test_macro_and_micro_f1_by_hand():
    emitted, gold = [0, 1, 2, 0], [0, 0, 1, 2]  # C = 2
    assert th.category_f1(emitted, gold, 2, "micro") == pytest.approx(2 / 3)  # tp 2, fp 1, fn 1
    assert th.category_f1(emitted, gold, 2, "macro") == pytest.approx((0.5 + 0.0) / 2)
