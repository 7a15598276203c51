"""Thresholds: sweeps over every distinct score, the ways to choose one, and rules over category probabilities.

An item is positive (refused) iff `score >= threshold`. Equal scores always move together, so a tie can
never be split and no choice depends on the order of the items.

Shape letters: N items, C refusal categories; `p_NC1` has C columns of refusal tokens and then "respond".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from temper.core.errors import ConfigError, DataError, nearest

__all__ = [
    "RULES",
    "Ascent",
    "Choice",
    "Sweep",
    "bias_from_threshold",
    "category_f1",
    "choose",
    "choose_by_category",
    "control_probs",
    "decide",
    "f1_score",
    "gate_rule",
    "leak",
    "ratio_rule",
    "sum_rule",
    "sweep",
    "threshold_from_bias",
    "two_token_q",
]

Array = np.ndarray[Any, np.dtype[Any]]
Mode = Literal["f1", "fpr", "rate", "cost"]
Average = Literal["micro", "macro"]


class Sweep(NamedTuple):
    """Counts at every threshold, from "refuse nothing" (+inf) down to "refuse all" (the lowest score)."""

    threshold: Array
    tp: Array
    fp: Array
    num_pos: int
    num_neg: int

    @property
    def tpr(self) -> Array:
        """Share of positives refused."""
        return self.tp / self.num_pos

    @property
    def fpr(self) -> Array:
        """Share of negatives refused."""
        return self.fp / self.num_neg

    @property
    def f1(self) -> Array:
        """F1 of refusing; 0 where nothing is refused."""
        return f1_score(self.tp, self.fp, self.num_pos)

    @property
    def rate(self) -> Array:
        """Share of all items refused."""
        return (self.tp + self.fp) / (self.num_pos + self.num_neg)


class Choice(NamedTuple):
    """A chosen threshold and what it does on the calibration sample."""

    threshold: float
    tpr: float
    fpr: float
    precision: float
    f1: float
    rate: float
    num_pos: int
    num_neg: int


class Ascent(NamedTuple):
    """One threshold a category, the F1 they reach, and F1 after each pass (index 0: the start)."""

    thresholds: Array
    f1: float
    history: list[float]


def f1_score(tp: Any, fp: Any, num_pos: Any) -> Any:
    """2 TP / (TP + FP + positives), elementwise; 0 where TP is 0."""
    return 2 * np.asarray(tp) / np.maximum(np.asarray(tp) + np.asarray(fp) + np.asarray(num_pos), 1)


def sweep(scores_N: Any, labels_N: Any) -> Sweep:
    """Counts of refused positives and negatives at every distinct score: the exact ROC.

    Raises DataError when a class is empty (a rate over nothing) or a score is not finite.
    """
    scores, labels = _checked(scores_N, labels_N)
    order = np.argsort(-scores, kind="stable")
    scores, labels = scores[order], labels[order]
    last = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)  # last item of every tie
    tp = np.append(0, np.cumsum(labels)[last])
    fp = np.append(0, np.cumsum(~labels)[last])
    return Sweep(np.append(np.inf, scores[last]), tp, fp, int(labels.sum()), int((~labels).sum()))


def _checked(scores_N: Any, labels_N: Any) -> tuple[Array, Array]:
    scores, labels = np.asarray(scores_N, dtype=np.float64), np.asarray(labels_N).astype(bool)
    if scores.shape != labels.shape or scores.ndim != 1:
        raise DataError(
            f"{scores.shape} scores and {labels.shape} labels do not pair up", where="threshold sweep"
        )
    if not np.isfinite(scores).all():
        raise DataError("A score is not finite", where=f"item {int(np.flatnonzero(~np.isfinite(scores))[0])}")
    for name, count in (("positive", int(labels.sum())), ("negative", int((~labels).sum()))):
        if count == 0:
            _refuse(f"the calibration sample has no {name} item")
    return scores, labels


def _refuse(why: str) -> None:
    raise DataError(
        f"refuse to calibrate: {why}", where="calibration part",
        cure="Add rows of that class; a rate over no items is undefined.",
    )  # fmt: skip


def choose(
    scores_N: Any,
    labels_N: Any,
    mode: Mode = "f1",
    *,
    alpha: float = 0.05,
    rate: float | None = None,
    cost_fn: float = 1.0,
    cost_fp: float = 1.0,
) -> Choice:
    """The threshold that is best on the sample: one of four meanings of best.

    f1    largest F1
    fpr   largest TPR among those with FPR <= `alpha`, guaranteed on this sample whatever the ties
    rate  share refused nearest to `rate` (labels only fill the reported rates)
    cost  smallest `cost_fn` x misses + `cost_fp` x false refusals
    Among equals the highest threshold wins (fewest refusals). The threshold lies halfway to the next lower
    score, so rounding in a later run cannot flip the item it rests on.
    """
    curve = sweep(scores_N, labels_N)
    if mode == "f1":
        best = curve.f1
    elif mode == "fpr":
        best = np.where(curve.fpr <= alpha, curve.tpr, -1.0)
    elif mode == "rate":
        if rate is None:
            raise ConfigError("mode 'rate' needs the wanted rate", cure="Pass rate=0.1 for one in ten.")
        best = -np.abs(curve.rate - rate)
    elif mode == "cost":
        best = -(cost_fn * (curve.num_pos - curve.tp) + cost_fp * curve.fp)
    else:
        raise ConfigError(
            f"Unknown way to choose {mode!r}", cure=nearest(mode, ("f1", "fpr", "rate", "cost"))
        )
    return _choice(curve, int(np.argmax(best)))


def _choice(curve: Sweep, at: int) -> Choice:
    tp, fp = int(curve.tp[at]), int(curve.fp[at])
    return Choice(
        _between(curve.threshold, at), tp / curve.num_pos, fp / curve.num_neg, tp / (tp + fp) if tp + fp else 0.0,
        float(curve.f1[at]), float(curve.rate[at]), curve.num_pos, curve.num_neg,
    )  # fmt: skip


def _between(threshold: Array, at: int) -> float:
    """A threshold that decides like `threshold[at]`, as far as possible from any score."""
    if at == 0:
        return float(np.nextafter(threshold[1], np.inf))  # finite, so that JSON can hold it
    if at == len(threshold) - 1:
        return float(threshold[at])
    upper, lower = float(threshold[at]), float(threshold[at + 1])
    middle = lower + (upper - lower) / 2
    return middle if middle > lower else upper


# Rules over categories: each gives the emitted column, C meaning "respond".


def gate_rule(p_NC1: Array, threshold_C: Array, selected_C: Array) -> Array:
    """The leading refusal category, if selected, is emitted iff it reaches its threshold, else "respond".

    A leading category that is not selected leaves the model's own argmax over the given columns. A negative
    threshold compares with "respond" instead.
    """
    leader = p_NC1[:, :-1].argmax(axis=1)
    reached = p_NC1[np.arange(len(p_NC1)), leader] >= _bar(p_NC1, threshold_C[leader])
    gated = np.where(reached, leader, p_NC1.shape[1] - 1)
    return np.where(selected_C[leader], gated, p_NC1.argmax(axis=1))


def _bar(p_NC1: Array, threshold_N: Array) -> Array:
    """What a refusal must reach: its threshold, or the probability of "respond" where that is negative."""
    return np.where(threshold_N < 0, p_NC1[:, -1], threshold_N)


def sum_rule(p_NC1: Array, threshold_C: Array, selected_C: Array) -> Array:
    """The leading selected category is emitted iff the selected ones together reach its threshold."""
    chosen = np.where(selected_C, p_NC1[:, :-1], -np.inf)
    leader = chosen.argmax(axis=1)
    total = np.where(selected_C, p_NC1[:, :-1], 0.0).sum(axis=1)
    return np.where(total >= _bar(p_NC1, threshold_C[leader]), leader, p_NC1.shape[1] - 1)


def ratio_rule(p_NC1: Array, threshold_C: Array, selected_C: Array) -> Array:
    """The selected category with the largest p/threshold is emitted iff that ratio reaches 1."""
    ratio = np.where(selected_C, p_NC1[:, :-1] / np.maximum(threshold_C, 1e-300), -np.inf)
    leader = ratio.argmax(axis=1)
    return np.where(ratio.max(axis=1) >= 1, leader, p_NC1.shape[1] - 1)


RULES: dict[str, Callable[[Array, Array, Array], Array]] = {
    "gate": gate_rule,
    "sum": sum_rule,
    "ratio": ratio_rule,
}


def decide(
    p_NC1: Any,
    thresholds: float | Sequence[float] | Array,
    selected: Sequence[int] | None = None,
    rule: str = "gate",
) -> Array:
    """The emitted column of each item (C = respond); one threshold for all categories or one each."""
    p = np.asarray(p_NC1, dtype=np.float64)
    if rule not in RULES:
        raise ConfigError(f"Unknown rule {rule!r}", cure=nearest(rule, RULES))
    num = p.shape[1] - 1
    return RULES[rule](
        p, np.broadcast_to(np.asarray(thresholds, dtype=np.float64), num), _selected(selected, num)
    )


def _selected(selected: Sequence[int] | None, num: int) -> Array:
    return np.ones(num, dtype=bool) if selected is None else np.isin(np.arange(num), list(selected))


def category_f1(emitted_N: Any, gold_N: Any, num_categories: int, average: Average = "macro") -> float:
    """macro: mean over categories of one-against-rest F1; micro: F1 of refusing at all, all items pooled."""
    emitted, gold = np.asarray(emitted_N), np.asarray(gold_N)
    if average == "micro":
        refused, due = emitted < num_categories, gold < num_categories
        return float(f1_score((refused & due).sum(), (refused & ~due).sum(), due.sum()))
    each = []
    for c in range(num_categories):
        hit, due = emitted == c, gold == c
        each.append(float(f1_score((hit & due).sum(), (hit & ~due).sum(), due.sum())))
    return float(np.mean(each))


def choose_by_category(
    p_NC1: Any,
    gold_N: Any,
    *,
    average: Average = "macro",
    passes: int = 3,
    start: float = 0.5,
    selected: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
) -> Ascent:
    """Coordinate ascent over one threshold a category under the gate rule; F1 never falls.

    `gold_N` holds category numbers, C meaning "should be answered". Only `selected` thresholds move; a
    threshold moves only where F1 gets strictly larger. Stops early once a pass changes nothing.
    Raises DataError if a selected category, or "should be answered", has no item.
    """
    p, gold = np.asarray(p_NC1, dtype=np.float64), np.asarray(gold_N, dtype=np.int64)
    num = p.shape[1] - 1
    chosen = _selected(selected, num)
    for c in (*np.flatnonzero(chosen), num):
        if not (gold == c).any():
            _refuse(
                f"no item of {'the answered class' if c == num else names[c] if names else f'category {c}'}"
            )
    threshold = np.full(num, float(start))
    best = category_f1(gate_rule(p, threshold, chosen), gold, num, average)
    history = [best]
    for _ in range(passes):
        for c in np.flatnonzero(chosen):
            threshold[c], best = _ascend(p, gold, threshold, chosen, int(c), average, best)
        history.append(best)
        if history[-1] == history[-2]:
            break
    return Ascent(threshold, best, history)


def _ascend(
    p: Array, gold: Array, threshold: Array, chosen: Array, c: int, average: Average, best: float
) -> tuple[float, float]:
    """The best threshold of one category, others fixed, by one cumulative sum over the items it leads."""
    num = p.shape[1] - 1
    led = p[:, :-1].argmax(axis=1) == c
    if not led.any():
        return float(threshold[c]), best
    due = gold == c if average == "macro" else gold < num
    order = np.argsort(-p[led, c], kind="stable")
    score, hit = p[led, c][order], due[led][order]
    last = np.append(np.flatnonzero(np.diff(score)), len(score) - 1)
    tp, fp = np.append(0, np.cumsum(hit)[last]), np.append(0, np.cumsum(~hit)[last])
    emitted = gate_rule(p, threshold, chosen)[~led]
    if average == "micro":
        elsewhere = emitted < num
        tp, fp = tp + (elsewhere & due[~led]).sum(), fp + (elsewhere & ~due[~led]).sum()
        value = f1_score(tp, fp, due.sum())
    else:
        # Items that others lead cannot be emitted as c, so only this category's F1 moves.
        emitted_now = gate_rule(p, threshold, chosen)
        own = _own_f1(emitted_now, gold, c)
        value = best + (f1_score(tp, fp, due.sum()) - own) / num
    at = int(np.argmax(value))
    if value[at] <= best + 1e-12:
        return float(threshold[c]), best
    return _between(np.append(np.inf, score[last]), at), float(value[at])


def _own_f1(emitted: Array, gold: Array, c: int) -> float:
    hit, due = emitted == c, gold == c
    return float(f1_score((hit & due).sum(), (hit & ~due).sum(), due.sum()))


# Probabilities at the first position, and the bias that equals a threshold.


def control_probs(logits_NV: Tensor, ids: Sequence[int], temperature: float = 1.0) -> Array:
    """Probability of each control id under softmax(logits / temperature) over the FULL vocabulary, (N, len(ids))."""
    if not temperature > 0:
        raise ConfigError(f"temperature {temperature} is not positive", where="control_probs")
    columns = torch.as_tensor(list(ids), device=logits_NV.device)
    # In pieces: a float64 copy of all rows would weigh more than the model.
    pieces = [_log_probs(piece_BV, columns, temperature) for piece_BV in logits_NV.detach().split(16)]
    return torch.cat(pieces or [torch.zeros(0, len(columns))]).exp().cpu().numpy()


def _log_probs(logits_BV: Tensor, columns_K: Tensor, temperature: float) -> Tensor:
    scaled_BV = logits_BV.double() / temperature
    return scaled_BV[:, columns_K] - scaled_BV.logsumexp(dim=-1, keepdim=True)


def leak(p_NC1: Any) -> Array:
    """Mass on tokens that are no control token, per item; above 1e-2 the two kinds of threshold part ways."""
    return np.clip(1.0 - np.asarray(p_NC1, dtype=np.float64).sum(axis=1), 0.0, 1.0)


def two_token_q(z_refuse: float, z_respond: float, temperature: float = 1.0) -> float:
    """p_refuse / (p_refuse + p_respond) from two logits: sigmoid of their difference."""
    return threshold_from_bias((z_respond - z_refuse) / temperature)


def bias_from_threshold(threshold: float) -> float:
    """The logit bias on the refusal token that decides like `q >= threshold`: -logit(T); 0 forces, 1 suppresses."""
    if not 0 <= threshold <= 1:
        raise ConfigError(
            f"{threshold} is no probability", where="bias_from_threshold", cure="Give 0 <= T <= 1."
        )
    if threshold in (0.0, 1.0):
        return math.inf if threshold == 0 else -math.inf
    return math.log1p(-threshold) - math.log(threshold)


def threshold_from_bias(bias: float) -> float:
    """The threshold on q that decides like a logit bias: sigmoid(-b), without overflow at either end."""
    if bias >= 0:
        small = math.exp(-bias)
        return small / (1 + small)
    return 1 / (1 + math.exp(bias))
