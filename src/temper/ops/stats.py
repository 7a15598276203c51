"""Statistics with their intervals: rates, means, paired differences, tests, rankings, calibration, agreement.

Every interval is two-sided at `level`. Whatever resamples takes a seed. Raises DataError where a number
would rest on nothing; no function turns an undefined value into 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from temper.core.errors import ConfigError, DataError

__all__ = [
    "Calibration",
    "Difference",
    "Estimate",
    "Significance",
    "auroc",
    "average_precision",
    "bootstrap",
    "ece",
    "harmonic_mean",
    "holm",
    "kappa",
    "ks",
    "mcnemar",
    "mean_ci",
    "needed_items",
    "paired_difference",
    "permutation",
    "wilson",
]

Array = np.ndarray[Any, np.dtype[Any]]


class Estimate(NamedTuple):
    """A value with its interval, the number of items it rests on, and its standard error if known."""

    value: float
    low: float
    high: float
    n: int
    stderr: float | None = None


class Difference(NamedTuple):
    """Mean of paired differences a - b, its interval, the number of pairs, and a two-sided p-value."""

    value: float
    low: float
    high: float
    n: int
    p: float
    stderr: float | None = None


class Significance(NamedTuple):
    """A test's statistic and p-value; `log10_p` stays readable where p is 1e-20."""

    statistic: float
    p: float

    @property
    def log10_p(self) -> float:
        """log10 of p; the smallest positive float stands in for a p that underflowed."""
        return math.log10(max(self.p, 5e-324))


class Calibration(NamedTuple):
    """Expected calibration error and, per bin that holds an item, mean probability, share true, count."""

    ece: float
    confidence: list[float]
    share: list[float]
    counts: list[int]


def _values(values: Any, name: str = "sample", least: int = 1) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) < least:
        raise DataError(
            f"The {name} holds {array.size} values; at least {least} are needed", where="statistics"
        )
    if not np.isfinite(array).all():
        bad = int(np.flatnonzero(~np.isfinite(array))[0])
        raise DataError(
            f"The {name} holds {array[bad]}", where=f"value {bad}", cure="Leave unscored items out."
        )
    return array


def _pairs(a: Any, b: Any) -> tuple[Array, Array]:
    left, right = _values(a, "first sample"), _values(b, "second sample")
    if len(left) != len(right):
        raise DataError(f"{len(left)} and {len(right)} values cannot be paired", where="statistics")
    return left, right


def wilson(successes: int, n: int, level: float = 0.95) -> Estimate:
    """A rate with Wilson's score interval; good down to small n and at 0 and 1."""
    from scipy.stats import binomtest

    if n < 1:
        raise DataError("A rate over no items is undefined", where="wilson")
    interval = binomtest(int(successes), int(n)).proportion_ci(level, method="wilson")
    rate = successes / n
    return Estimate(rate, float(interval.low), float(interval.high), int(n), math.sqrt(rate * (1 - rate) / n))


def mean_ci(values: Any, level: float = 0.95) -> Estimate:
    """A mean with Student's t interval; one value has an unbounded interval."""
    from scipy.stats import t

    array = _values(values)
    mean, n = float(array.mean()), len(array)
    if n == 1:
        return Estimate(mean, -math.inf, math.inf, 1)
    stderr = float(array.std(ddof=1)) / math.sqrt(n)
    half = float(t.ppf(0.5 + level / 2, n - 1)) * stderr
    return Estimate(mean, mean - half, mean + half, n, stderr)


def bootstrap(
    sample: Any,
    statistic: Callable[..., Any] = np.mean,
    *,
    seed: int = 0,
    num_resamples: int = 2000,
    level: float = 0.95,
    method: Literal["bca", "percentile"] = "percentile",
) -> Estimate:
    """A statistic with its bootstrap interval; a tuple of arrays is resampled by item, together.

    A sample without spread (or one whose resamples all agree) gives an interval of width 0.
    """
    from scipy.stats import bootstrap as scipy_bootstrap

    arrays = tuple(_values(a) for a in (sample if isinstance(sample, tuple) else (sample,)))
    value = float(statistic(*arrays))
    if all(np.ptp(a) == 0 for a in arrays):
        return Estimate(value, value, value, len(arrays[0]), 0.0)
    result = scipy_bootstrap(
        arrays, statistic, paired=True, vectorized=False, n_resamples=num_resamples, confidence_level=level,
        method="BCa" if method == "bca" else "percentile", rng=np.random.default_rng(seed),
    )  # fmt: skip
    low, high = result.confidence_interval
    return Estimate(value, float(low), float(high), len(arrays[0]), float(result.standard_error))


def paired_difference(
    a: Any,
    b: Any,
    *,
    method: Literal["bootstrap", "t"] = "bootstrap",
    seed: int = 0,
    level: float = 0.95,
    num_resamples: int = 2000,
) -> Difference:
    """Mean of a - b over pairs: "bootstrap" with a sign-flip p over items, "t" over a few seeds.

    One pair has an unbounded interval and p = 1: nothing can be said from it.
    """
    left, right = _pairs(a, b)
    gap = left - right
    if len(gap) == 1:
        return Difference(float(gap[0]), -math.inf, math.inf, 1, 1.0)
    if np.ptp(gap) == 0:
        return Difference(float(gap[0]), float(gap[0]), float(gap[0]), len(gap), _exact_sign_p(gap), 0.0)
    if method == "t":
        return _by_t(gap, level)
    if method != "bootstrap":
        raise ConfigError(f"Unknown method {method!r}", cure="Use bootstrap or t.")
    interval = bootstrap(gap, seed=seed, num_resamples=num_resamples, level=level)
    p = permutation(left, right, paired=True, seed=seed).p
    return Difference(interval.value, interval.low, interval.high, len(gap), p, interval.stderr)


def _exact_sign_p(gap: Array) -> float:
    # Equal differences: of the 2^n sign flips only two are as extreme.
    return min(1.0, 2.0 ** (1 - len(gap))) if gap[0] else 1.0


def _by_t(gap: Array, level: float) -> Difference:
    from scipy.stats import ttest_1samp

    mean = mean_ci(gap, level)
    return Difference(
        mean.value, mean.low, mean.high, len(gap), float(ttest_1samp(gap, 0.0).pvalue), mean.stderr
    )


def permutation(
    a: Any, b: Any, *, paired: bool = True, seed: int = 0, num_resamples: int = 4999
) -> Significance:
    """Two-sided permutation test on the difference of means; exact where all permutations fit the budget."""
    from scipy.stats import permutation_test

    left, right = _pairs(a, b) if paired else (_values(a), _values(b))
    if paired and not (left - right).any():
        return Significance(0.0, 1.0)

    def gap(x: Array, y: Array, axis: int) -> Array:
        return np.asarray(x.mean(axis=axis) - y.mean(axis=axis))

    result = permutation_test(
        (left, right), gap, permutation_type="samples" if paired else "independent", vectorized=True,
        n_resamples=num_resamples, rng=np.random.default_rng(seed),
    )  # fmt: skip
    return Significance(float(result.statistic), float(result.pvalue))


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> Significance:
    """Exact McNemar test of two yes/no answers on the same items; the statistic is (only a) - (only b)."""
    from scipy.stats import binomtest

    left, right = np.asarray(a, dtype=bool), np.asarray(b, dtype=bool)
    _pairs(left, right)
    only_a, only_b = int((left & ~right).sum()), int((~left & right).sum())
    p = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    return Significance(float(only_a - only_b), float(p))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given; reject where the adjusted one is <= level."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    raised = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    out = np.empty_like(p)
    out[order] = np.minimum(raised, 1.0)
    return [float(x) for x in out]


def _both_classes(scores: Any, labels: Any) -> tuple[Array, Array]:
    score, label = _pairs(scores, np.asarray(labels).astype(bool))
    truth = label.astype(bool)
    if truth.all() or not truth.any():
        raise DataError(
            "All items have the same label", where="ranking metric", cure="Both classes are needed."
        )
    return score, truth


def auroc(scores: Any, labels: Any) -> float:
    """Probability that a positive scores above a negative, ties counting half. Raises DataError for one class."""
    from scipy.stats import rankdata

    score, truth = _both_classes(scores, labels)
    num_pos, num_neg = int(truth.sum()), int((~truth).sum())
    return float((rankdata(score)[truth].sum() - num_pos * (num_pos + 1) / 2) / (num_pos * num_neg))


def average_precision(scores: Any, labels: Any) -> float:
    """Precision averaged over the steps of recall, tied scores taken together (no interpolation)."""
    from temper.ops.thresholds import sweep

    score, truth = _both_classes(scores, labels)
    curve = sweep(score, truth)
    precision = curve.tp[1:] / (curve.tp[1:] + curve.fp[1:])
    return float((np.diff(curve.tp) / curve.num_pos * precision).sum())


def ece(probabilities: Any, labels: Any, bins: int = 10) -> Calibration:
    """Expected calibration error: |mean probability - share true| over equal-width bins, weighted by count.

    Bins are closed above, (0, .1], (.1, .2] ...; 0 itself falls into the first.
    """
    prob, truth = _pairs(probabilities, np.asarray(labels, dtype=np.float64))
    if prob.min() < 0 or prob.max() > 1:
        raise DataError("A probability lies outside [0, 1]", where="ece")
    which = np.clip(np.ceil(prob * bins).astype(int) - 1, 0, bins - 1)
    count = np.bincount(which, minlength=bins)
    used = np.flatnonzero(count)
    confidence = np.bincount(which, prob, minlength=bins)[used] / count[used]
    share = np.bincount(which, truth, minlength=bins)[used] / count[used]
    error = float((np.abs(confidence - share) * count[used]).sum() / len(prob))
    return Calibration(error, confidence.tolist(), share.tolist(), count[used].tolist())


def kappa(a: Sequence[Any], b: Sequence[Any]) -> float:
    """Cohen's kappa, (p_o - p_e) / (1 - p_e); two raters who agree on one constant label give 1."""
    if len(a) != len(b) or not len(a):
        raise DataError(f"{len(a)} and {len(b)} labels cannot be compared", where="kappa")
    labels = sorted({*a, *b}, key=str)
    left = np.array([labels.index(x) for x in a])
    right = np.array([labels.index(x) for x in b])
    observed = float((left == right).mean())
    shares = [np.bincount(x, minlength=len(labels)) / len(x) for x in (left, right)]
    expected = float((shares[0] * shares[1]).sum())
    return 1.0 if expected == 1 else (observed - expected) / (1 - expected)


def ks(a: Any, b: Any) -> Significance:
    """Two-sample Kolmogorov-Smirnov test, two-sided."""
    from scipy.stats import ks_2samp

    result = ks_2samp(_values(a, "first sample"), _values(b, "second sample"))
    return Significance(float(result.statistic), float(result.pvalue))


def harmonic_mean(values: Any) -> float:
    """Harmonic mean; 0 as soon as one value is 0. Raises DataError for a negative one."""
    array = _values(values)
    if array.min() < 0:
        raise DataError(f"A harmonic mean needs values >= 0, got {array.min()}", where="harmonic_mean")
    return 0.0 if array.min() == 0 else float(len(array) / (1 / array).sum())


def needed_items(sd: float, effect: float, *, power: float = 0.8, level: float = 0.95) -> int:
    """Pairs a two-sided paired test needs to see a mean difference `effect` when differences spread by `sd`.

    Normal approximation, n = ((z_{1-a/2} + z_power) sd / effect)^2 rounded up, at least 2.
    """
    from scipy.stats import norm

    if effect == 0:
        raise ConfigError("No number of items shows a difference of 0", where="needed_items")
    z = float(norm.ppf(0.5 + level / 2) + norm.ppf(power))
    return max(2, math.ceil((z * sd / effect) ** 2))
