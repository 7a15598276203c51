"""Ranking metrics by query, through ir-measures: MRR@k, nDCG@k, recall, MAP. All 0 to 1, higher is better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from temper.core.errors import ConfigError, DataError, NeedsError

__all__ = ["ir_values"]

NAMES = {"MRR": "RR", "MAP": "AP"}
"""Names of means, and what they are means of."""


def ir_values(
    qrels: Mapping[str, Mapping[str, int]], ranked: Mapping[str, Sequence[str]], metrics: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Metric -> query -> its value, for every query of `qrels`.

    `ranked` holds each query's document ids, best first; a query that it lacks found nothing and counts 0. Metrics are
    written MRR@10, nDCG@10, R@100, MAP, or as ir-measures writes its own. Raises DataError without judged queries, and
    for a document that stands twice under one query; ConfigError for an unknown metric.
    """
    if not qrels:
        raise DataError("No query has a judgement", cure="Give at least one query with a relevant document.")
    try:
        import ir_measures
    except ImportError:
        raise NeedsError(
            "Ranking metrics need ir-measures", cure="pip install 'temper-ml[retrieval]'"
        ) from None
    parsed = {_parsed(ir_measures, name): name for name in metrics}
    values: dict[str, dict[str, float]] = {name: dict.fromkeys(qrels, 0.0) for name in metrics}
    for found in ir_measures.iter_calc(list(parsed), qrels, _scores(ranked)):
        values[parsed[found.measure]][found.query_id] = float(found.value)
    return values


def _scores(ranked: Mapping[str, Sequence[str]]) -> dict[str, dict[str, float]]:
    """Ranks as falling scores: the measures sort by score and would break ties their own way."""
    out = {}
    for query, documents in ranked.items():
        out[query] = {name: float(-rank) for rank, name in enumerate(documents)}
        if len(out[query]) < len(documents):
            raise DataError(f"The ranking of query {query!r} holds a document twice", cure="Keep the first.")
    return out


def _parsed(library, name: str):  # type: ignore[no-untyped-def]
    head, at, cutoff = name.partition("@")
    try:
        measure = library.parse_measure(NAMES.get(head, head) + at + cutoff)
        measure.validate_params()
    except (NameError, SyntaxError, ValueError, TypeError, AssertionError):
        raise ConfigError(
            f"There is no ranking metric {name!r}", cure="Write e.g. MRR@10, nDCG@10, R@100 or MAP."
        ) from None
    return measure
