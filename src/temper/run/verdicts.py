"""Verdicts of claims, computed from rows and never typed.

An arm is compared with its baseline, paired, over the seeds that both have: over items where there are enough of them
(each averaged over seeds first), with a bootstrap interval; else over seeds, with Student's t.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple, TypeVar

from temper.core.card import Claim
from temper.core.types import Row
from temper.run.unseen import SEEN

__all__ = ["ArmMean", "Finding", "Verdict", "judge_claim", "select"]

Verdict = Literal["shown", "contradicted", "not shown"]
NUM_RESAMPLES = 10_000
FEWEST_ITEMS = 6
"""Below it even items that all agree are no evidence at 5 % (2^-5 = .03 for six signs), and a bootstrap is blind to that."""
K = TypeVar("K")
Key = tuple[str, str, str, str]
"""Step, split, group and item of a row: what must agree for two rows to be a pair."""


class ArmMean(NamedTuple):
    """One arm's mean of a metric."""

    arm: str
    mean: float
    n: int


class Finding(NamedTuple):
    """A claim's verdict and what it rests on; `difference` is arm minus baseline."""

    claim: str
    verdict: Verdict
    reason: str
    arms: tuple[ArmMean, ...] = ()
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    n: int = 0
    pairing: Literal["items", "seeds", ""] = ""
    seeds: tuple[int, ...] = ()


def judge_claim(claim: Claim, rows: Iterable[Row]) -> Finding:
    """The finding for a claim over the latest rows of its metric."""
    wanted = [row for row in rows if row.metric == claim.metric and row.group != SEEN]
    ours = [row for row in wanted if row.arm == claim.arm]
    if not ours:
        arms = ", ".join(sorted({row.arm or "(none)" for row in wanted})) or "none"
        return Finding(
            claim.id, "not shown", f"no rows of {claim.metric!r} in arm {claim.arm!r}; arms with rows: {arms}"
        )
    if isinstance(claim.baseline, str):
        theirs = [row for row in wanted if row.arm == claim.baseline]
        if not theirs:
            return Finding(
                claim.id, "not shown", f"no rows of {claim.metric!r} in the baseline {claim.baseline!r}"
            )
        ours, theirs = _in_common(ours, theirs)
    else:
        theirs = None
    by_item = _pairs(_by_item(ours), None if theirs is None else _by_item(theirs), claim.baseline)
    if len(by_item[0]) >= FEWEST_ITEMS:
        return _decide(claim, by_item, "items", ours, theirs)
    doubled = _doubled(ours) or (theirs is not None and _doubled(theirs))
    if doubled:
        return Finding(claim.id, "not shown", f"{claim.metric!r} stands more than once for a seed: {doubled}")
    by_seed = _pairs(_by_seed(ours), None if theirs is None else _by_seed(theirs), claim.baseline)
    return _decide(claim, by_seed, "seeds", ours, theirs)


def _in_common(ours: list[Row], theirs: list[Row]) -> tuple[list[Row], list[Row]]:
    """Rows of the seeds that both arms have, and of these the items that both have a value of: no mean is over others."""
    seeds = {_seed(row) for row in ours} & {_seed(row) for row in theirs}
    cells = _cells(ours) & _cells(theirs)

    def counts(row: Row) -> bool:
        return _seed(row) in seeds if row.item is None else (_seed(row), _key(row)) in cells

    return [row for row in ours if counts(row)], [row for row in theirs if counts(row)]


def _cells(rows: Sequence[Row]) -> set[tuple[int, Key]]:
    return {(_seed(row), _key(row)) for row in rows if row.item is not None and row.value is not None}


def _seed(row: Row) -> int:
    return int(row.facts.get("seed", 0))


def _key(row: Row) -> Key:
    return str(row.facts.get("step", "")), row.split, row.group, str(row.item)


def _by_item(rows: Sequence[Row]) -> dict[Key, float]:
    """Mean over seeds for each item."""
    values: dict[Key, list[float]] = {}
    for row in rows:
        if row.item is not None and row.value is not None:
            values.setdefault(_key(row), []).append(row.value)
    return {key: sum(found) / len(found) for key, found in values.items()}


def _whole(rows: Sequence[Row]) -> list[Row]:
    """Rows about a whole set: of the test split where there is one, and not of one category."""
    return _of_test([row for row in rows if row.item is None and row.value is not None])


def _of_test(found: list[Row]) -> list[Row]:
    ungrouped = [row for row in found if not row.group] or found
    return [row for row in ungrouped if row.split == "test"] or ungrouped


def _by_seed(rows: Sequence[Row]) -> dict[int, float]:
    """The figure of a whole set for each seed; the mean over the items of such a set where there is none."""
    values: dict[int, list[float]] = {}
    for row in _whole(rows) or _of_test([row for row in rows if row.item is not None]):
        if row.value is not None:
            values.setdefault(_seed(row), []).append(row.value)
    return {seed: sum(found) / len(found) for seed, found in values.items()}


def _doubled(rows: Sequence[Row]) -> str:
    seen: set[int] = set()
    for row in _whole(rows):
        seed = _seed(row)
        if seed in seen:
            return f"seed {seed}, step {row.facts.get('step')}, split {row.split!r}, group {row.group!r}"
        seen.add(seed)
    return ""


def _pairs(
    ours: Mapping[K, float], theirs: Mapping[K, float] | None, baseline: str | float
) -> tuple[list[float], list[float]]:
    if theirs is None:
        return list(ours.values()), [float(baseline)] * len(ours)
    keys = [key for key in ours if key in theirs]
    return [ours[key] for key in keys], [theirs[key] for key in keys]


def _decide(
    claim: Claim,
    pairs: tuple[list[float], list[float]],
    pairing: Literal["items", "seeds"],
    ours: Sequence[Row],
    theirs: Sequence[Row] | None,
) -> Finding:
    a, b = pairs
    seeds = tuple(sorted({_seed(row) for row in ours}))
    arms = [ArmMean(claim.arm, sum(a) / len(a), len(a))] if a else []
    if a and theirs is not None:
        arms.append(ArmMean(str(claim.baseline), sum(b) / len(b), len(b)))
    base = {"arms": tuple(arms), "n": len(a), "pairing": pairing, "seeds": seeds}
    if not a:
        return Finding(claim.id, "not shown", "arm and baseline have no seed or item in common", **base)  # type: ignore[arg-type]
    if len(a) == 1:
        return Finding(claim.id, "not shown", "one seed", difference=a[0] - b[0], **base)  # type: ignore[arg-type]
    from temper.ops.stats import bootstrap, mean_ci

    differences = [x - y for x, y in zip(a, b, strict=True)]
    gap = bootstrap(differences, num_resamples=NUM_RESAMPLES) if pairing == "items" else mean_ci(differences)
    verdict, reason = _verdict(claim, gap.low, gap.high)
    return Finding(
        claim.id,
        verdict,
        reason,
        difference=gap.value,
        low=_finite(gap.low),
        high=_finite(gap.high),
        **base,  # type: ignore[arg-type]
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _verdict(claim: Claim, low: float, high: float) -> tuple[Verdict, str]:
    """Where the interval of arm minus baseline lies against the claim's margin."""
    if claim.direction == "higher":
        edge, good, bad = claim.margin, low > claim.margin, high < claim.margin
    else:
        edge, good, bad = -claim.margin, high < -claim.margin, low > -claim.margin
    if good:
        return "shown", f"the interval lies {'above' if claim.direction == 'higher' else 'below'} {edge:g}"
    if bad:
        return (
            "contradicted",
            f"the interval lies {'below' if claim.direction == 'higher' else 'above'} {edge:g}",
        )
    return "not shown", f"the interval holds {edge:g}"


def select(rows: Sequence[Row]) -> list[Row]:
    """The rows that count: of each arm the settings run last, of each of their seeds the last run.

    A row's facts name its `run` and its `condition` (everything of its cell but the seed).
    """
    last_condition: dict[str, str] = {}
    last_run: dict[tuple[str, str, int], str] = {}
    for row in rows:
        condition = str(row.facts.get("condition", row.facts.get("settings", "")))
        arm = _cell_arm(row)
        last_condition[arm] = condition
        last_run[arm, condition, int(row.facts.get("seed", 0))] = str(row.facts.get("run", ""))
    return [row for row in rows if _counts(row, last_condition, last_run)]


def _cell_arm(row: Row) -> str:
    return str(row.facts.get("cell_arm", row.arm))


def _counts(row: Row, conditions: Mapping[str, str], runs: Mapping[tuple[str, str, int], str]) -> bool:
    arm, condition = _cell_arm(row), str(row.facts.get("condition", row.facts.get("settings", "")))
    seed = int(row.facts.get("seed", 0))
    return conditions[arm] == condition and runs[arm, condition, seed] == str(row.facts.get("run", ""))
