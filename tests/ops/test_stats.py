"""Statistics against hand values, scipy and scikit-learn."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from temper.core.errors import ConfigError, DataError
from temper.ops import stats


def test_wilson_by_hand():
    got = stats.wilson(8, 10)
    z, p, n = 1.959963984540054, 0.8, 10
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert (got.value, got.n) == (0.8, 10)
    assert (got.low, got.high) == pytest.approx((centre - half, centre + half))
    assert stats.wilson(0, 10).low == pytest.approx(0, abs=1e-12)
    assert stats.wilson(0, 10).high > 0.2
    with pytest.raises(DataError):
        stats.wilson(0, 0)


def test_mean_ci_by_hand():
    got = stats.mean_ci([1, 2, 3])
    half = 4.302652729749464 * 1 / math.sqrt(3)  # t(0.975, 2)
    assert (got.value, got.low, got.high) == pytest.approx((2, 2 - half, 2 + half))
    assert stats.mean_ci([5.0])[1:3] == (-math.inf, math.inf)
    with pytest.raises(DataError):
        stats.mean_ci([])
    with pytest.raises(DataError, match="Leave unscored"):
        stats.mean_ci([1, math.nan])


@pytest.mark.parametrize("method", ["bca", "percentile"])
def test_bootstrap_covers_and_repeats(method):
    sample = np.random.default_rng(1).normal(3, 1, 200)
    a = stats.bootstrap(sample, method=method, seed=4)
    assert a == stats.bootstrap(sample, method=method, seed=4)
    assert a != stats.bootstrap(sample, method=method, seed=5)
    t = stats.mean_ci(sample)
    assert (a.low, a.high) == pytest.approx((t.low, t.high), abs=0.03)


def test_bootstrap_resamples_pairs_together():
    x = np.arange(30.0)
    got = stats.bootstrap((x, 2 * x), lambda a, b: float(np.abs(b - 2 * a).max()))
    assert got[:3] == (0.0, 0.0, 0.0)  # would not hold if the two were drawn apart


def test_constant_sample_has_no_spread():
    assert stats.bootstrap([2.0, 2.0, 2.0])[:3] == (2, 2, 2)


def test_paired_difference_over_items_and_seeds():
    rng = np.random.default_rng(0)
    base = rng.normal(0, 5, 60)
    got = stats.paired_difference(base + 1 + rng.normal(0, 0.5, 60), base)
    assert got.low > 0.5
    assert got.high < 1.5
    assert got.p < 0.01
    seeds = stats.paired_difference([0.8, 0.9, 0.85], [0.5, 0.55, 0.6], method="t")
    from scipy.stats import ttest_rel

    assert seeds.p == pytest.approx(ttest_rel([0.8, 0.9, 0.85], [0.5, 0.55, 0.6]).pvalue)
    assert seeds.low > 0
    with pytest.raises(ConfigError):
        stats.paired_difference([1, 2], [0, 4], method="z")


def test_one_pair_says_nothing():
    got = stats.paired_difference([1.0], [0.0])
    assert (got.low, got.high, got.p) == (-math.inf, math.inf, 1.0)


def test_equal_differences_have_the_exact_sign_flip_p():
    got = stats.paired_difference([1.0, 2.0, 3.0], [0.5, 1.5, 2.5])
    assert got[:5] == (0.5, 0.5, 0.5, 3, 0.25)
    assert stats.paired_difference([1.0, 2.0], [1.0, 2.0]).p == 1.0


def test_permutation_is_exact_on_small_samples():
    assert stats.permutation([1, 2, 3, 4], [0, 0, 0, 0]).p == pytest.approx(2 / 16)
    assert stats.permutation([3, 4], [1, 2], paired=False).p == pytest.approx(2 / 6)
    assert stats.permutation([1, 2], [1, 2]).p == 1


def test_mcnemar_by_hand():
    a = [True] * 9 + [False] + [True] * 5
    b = [False] * 9 + [True] + [True] * 5
    got = stats.mcnemar(a, b)
    assert got.statistic == 8
    assert got.p == pytest.approx(2 * (1 + 10) / 2**10)
    assert stats.mcnemar([True], [True]).p == 1


def test_holm_by_hand():
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([0.6, 0.5]) == [1.0, 1.0]
    assert stats.holm([]) == []


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.2, 0.5, 0.9]), st.booleans()), min_size=2, max_size=40))
@settings(deadline=None)
def test_ranking_metrics_equal_scikit_learn(rows):
    from sklearn.metrics import average_precision_score, roc_auc_score

    scores, labels = zip(*rows, strict=True)
    if len(set(labels)) == 1:
        with pytest.raises(DataError):
            stats.auroc(scores, labels)
        return
    assert stats.auroc(scores, labels) == pytest.approx(roc_auc_score(labels, scores))
    assert stats.average_precision(scores, labels) == pytest.approx(average_precision_score(labels, scores))


def test_ece_by_hand():
    got = stats.ece([0.05, 0.1, 0.95, 1.0, 0.0], [0, 1, 1, 1, 0])
    assert got.counts == [3, 2]
    assert got.confidence == pytest.approx([0.05, 0.975])
    assert got.share == pytest.approx([1 / 3, 1.0])
    assert got.ece == pytest.approx(3 / 5 * (1 / 3 - 0.05) + 2 / 5 * 0.025)
    with pytest.raises(DataError):
        stats.ece([1.2], [1])


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=2, max_size=30))
@settings(deadline=None)
def test_kappa_equals_scikit_learn(rows):
    from sklearn.metrics import cohen_kappa_score

    a, b = zip(*rows, strict=True)
    if len({*a, *b}) == 1:
        assert stats.kappa(a, b) == 1
    else:
        assert stats.kappa(a, b) == pytest.approx(cohen_kappa_score(a, b))


def test_kappa_on_a_known_table():
    a = [1] * 25 + [0] * 25
    b = [1] * 20 + [0] * 5 + [1] * 10 + [0] * 15
    assert stats.kappa(a, b) == pytest.approx(0.4)


def test_ks_by_hand_and_its_tiny_p():
    assert stats.ks([1, 2, 3, 4], [5, 6, 7, 8]).statistic == 1
    assert stats.ks([1, 2, 3], [1, 2, 3]).p == pytest.approx(1)
    far = stats.ks(np.arange(300), np.arange(300) + 1000)
    assert -400 < far.log10_p < -100


def test_ks_is_blind_to_inversion():
    rng = np.random.default_rng(0)
    a, b = rng.uniform(0.1, 2, 50), rng.uniform(0.2, 3, 50)
    assert stats.ks(a, b).p == pytest.approx(stats.ks(1 / a, 1 / b).p)


def test_harmonic_mean():
    assert stats.harmonic_mean([1, 0.5]) == pytest.approx(2 / 3)
    assert stats.harmonic_mean([0.9, 0.0]) == 0.0
    with pytest.raises(DataError):
        stats.harmonic_mean([-0.1, 1])
    with pytest.raises(DataError):
        stats.harmonic_mean([])


def test_needed_items_by_hand():
    z = 1.959963984540054 + 0.8416212335729143
    assert stats.needed_items(0.5, 0.1) == math.ceil((z * 5) ** 2) == 197
    assert stats.needed_items(0.5, -0.1) == 197
    assert stats.needed_items(0.01, 1.0) == 2
    with pytest.raises(ConfigError):
        stats.needed_items(1, 0)


def test_needed_items_reaches_its_power():
    rng = np.random.default_rng(0)
    n = stats.needed_items(1.0, 0.5)
    hits = [
        stats.paired_difference(rng.normal(0.5, 1, n), np.zeros(n), method="t").low > 0 for _ in range(400)
    ]
    assert 0.72 < np.mean(hits) < 0.88
