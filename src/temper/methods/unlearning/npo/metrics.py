"""The TOFU report on a model, with memorisation, membership and fluency; one row an item and one a split.

Everything is teacher-forced except the replies, which are greedy (Departure 3). Ratios stay in the log domain.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from temper.core.types import Row, Run
from temper.data.schemas import Data, Dialogue
from temper.methods.unlearning.npo.card import Config
from temper.methods.unlearning.npo.reference import Reference, load_reference
from temper.ops import stats
from temper.ops.batching import Batch, Example, collate, encode, plan_batches
from temper.ops.logprobs import position_logit_chunks, response_logprobs
from temper.ops.membership import min_k
from temper.ops.precision import autocast, eval_mode
from temper.ops.tofu_metrics import fluency_rows, raw_rows, write_examples
from temper.systems.causal_lm import CausalLM

__all__ = [
    "FACTS",
    "Answer",
    "answer_tokens",
    "extraction_strength",
    "forget_quality",
    "forget_truth",
    "kept_truth",
    "log_truth_ratio",
    "measure",
    "membership_auc",
    "privleak",
    "reference_rows",
    "split_scores",
    "truth_scores",
    "utility_row",
    "wrong_answers",
]

logger = logging.getLogger(__name__)

FACTS = ("neighbours", "world_facts")
"""Splits of real facts: wrong answers stand beside the plain one, and probability is a share among them."""
SPLITS = ("forget", "retain", "holdout", *FACTS)
UTILITY = ("probability", "rouge", "truth_ratio")
MIN_K = 0.4
"""Share of the least likely tokens that the membership score averages."""


class Answer(NamedTuple):
    """An answer's token log-probabilities in nats and whether each token is the greedy one."""

    logp_T: Tensor
    greedy_T: Tensor


def log_truth_ratio(wrong_K: Sequence[float], right: float, agg: str) -> float:
    """Log of R from mean log-probabilities a token: the wrong answers' mean probability over the right one's (Departure 8)."""
    wrong = torch.tensor(wrong_K, dtype=torch.float64)
    pooled = wrong.mean() if agg == "geometric" else wrong.logsumexp(0) - math.log(len(wrong_K))
    return float(pooled) - right


def forget_truth(log_ratio: float) -> float:
    """min(R, 1/R): 1 where right and wrong answers are equally likely."""
    return math.exp(-abs(log_ratio))


def kept_truth(log_ratio: float) -> float:
    """max(0, 1 - R): 1 where the wrong answers are impossible."""
    return max(0.0, -math.expm1(min(log_ratio, 0.0)))


def extraction_strength(greedy_T: Tensor) -> float:
    """1 - k / |T|, k the first position from which on every token is the greedy one; 0 where the last one is not."""
    wrong = (~greedy_T).nonzero()
    first = int(wrong[-1]) + 1 if len(wrong) else 0
    return 1 - first / len(greedy_T)


def privleak(auc: float, auc_ref: float) -> float | None:
    """Percent by which membership shows more (negative) or is hidden more (positive) than in the reference."""
    return None if auc_ref == 1 else 100 * ((1 - auc) - (1 - auc_ref)) / (1 - auc_ref)


def forget_quality(ratios: Sequence[float], reference: Sequence[float]) -> stats.Significance:
    """Two-sample KS test on truth ratios, or any increasing function of them."""
    return stats.ks(ratios, reference)


def answer_tokens(system: CausalLM, examples: Sequence[Example], run: Run) -> list[Answer]:
    """Log-probability and greediness of every scored token, in the examples' order."""
    found: list[Answer] = [Answer(torch.zeros(0), torch.zeros(0))] * len(examples)
    plan = plan_batches([len(example.ids) for example in examples], run)
    for rows in run.ticker(plan, total=len(plan), label="answers"):
        batch = collate([examples[row] for row in rows], system.pad_id, system.device, rows=rows)
        for row, answer in zip(rows, _batch_answers(system, batch, run), strict=True):
            found[row] = answer
    return found


def _batch_answers(system: CausalLM, batch: Batch, run: Run) -> list[Answer]:
    scored_BT = batch.scored_BT[:, 1:]
    rest_S, sizes = batch.ids_BT[:, 1:][scored_BT], scored_BT.sum(1).tolist()
    logp, greedy = [], []
    with eval_mode(system.model), torch.no_grad(), autocast(run):
        for logits_CV in position_logit_chunks(system.model, batch, F.pad(scored_BT, (0, 1))):
            target_C, rest_S = rest_S[: len(logits_CV)], rest_S[len(logits_CV) :]
            logp.append(logits_CV.gather(-1, target_C[:, None])[:, 0] - logits_CV.logsumexp(-1))
            greedy.append(logits_CV.argmax(-1) == target_C)
    rows = zip(torch.cat(logp).cpu().split(sizes), torch.cat(greedy).cpu().split(sizes), strict=True)
    return [Answer(*row) for row in rows]


def wrong_answers(record: Dialogue) -> list[str]:
    """The row's wrong answers; none where it has no column for them."""
    found = record.extra.get("perturbed_answer") or []
    return [found] if isinstance(found, str) else [str(answer) for answer in found]


def _examples(system: CausalLM, record: Dialogue, replies: Sequence[str], config: Config) -> list[Example]:
    where = f"row {record.id}"
    return [
        encode(system, (record.prompt, reply), max_tokens=config.max_tokens, where=where) for reply in replies
    ]


def truth_scores(
    system: CausalLM,
    records: Sequence[Dialogue],
    answers: Sequence[Answer],
    split: str,
    config: Config,
    run: Run,
) -> list[tuple[float, list[float]] | None]:
    """For each row the mean log-probability of the right answer (facts: the plain one) and of the wrong ones."""
    jobs: list[Example] = []
    spans: list[tuple[int, int] | None] = []
    for record in records:
        wrong = wrong_answers(record)
        right = [] if split in FACTS else [str(record.extra.get("paraphrased_answer") or record.reply)]
        spans.append((len(jobs), len(jobs) + len(right) + len(wrong)) if wrong else None)
        jobs += _examples(system, record, [*right, *wrong], config) if wrong else []
    mean_N = response_logprobs(system, jobs, reduce="mean", run=run).tolist() if jobs else []
    found: list[tuple[float, list[float]] | None] = []
    for span, answer in zip(spans, answers, strict=True):
        if span is None:
            found.append(None)
            continue
        values = mean_N[slice(*span)]
        found.append((float(answer.logp_T.mean()), values) if split in FACTS else (values[0], values[1:]))
    return found


def split_scores(
    system: CausalLM, records: Sequence[Dialogue], split: str, config: Config, run: Run
) -> dict[str, list[float | None]]:
    """Metric -> value for each row; None where a row has no wrong answers to compare with."""
    examples = [encode(system, record, train_on="last", max_tokens=config.max_tokens) for record in records]
    answers = answer_tokens(system, examples, run)
    truths = truth_scores(system, records, answers, split, config, run)
    ratios = [None if truth is None else log_truth_ratio(truth[1], truth[0], config.agg) for truth in truths]
    reported = forget_truth if split in ("forget", "holdout") else kept_truth
    return {
        "probability": [_probability(a, t, split) for a, t in zip(answers, truths, strict=True)],
        "truth_ratio": [None if ratio is None else reported(ratio) for ratio in ratios],
        "log_truth_ratio": ratios,
        "exact_memorisation": [float(answer.greedy_T.float().mean()) for answer in answers],
        "extraction_strength": [extraction_strength(answer.greedy_T) for answer in answers],
        "min_k_nats": [min_k(answer.logp_T, MIN_K) for answer in answers],
    }


def _probability(answer: Answer, truth: tuple[float, list[float]] | None, split: str) -> float | None:
    own = float(answer.logp_T.mean())
    if split not in FACTS:
        return math.exp(own)
    if truth is None:
        return None
    return float(torch.tensor([own, *truth[1]], dtype=torch.float64).softmax(0)[0])


def measure(system: CausalLM, data: Data, config: Config, run: Run) -> Iterator[Row]:
    """Every split's rows, then what is made of several: utility, forget quality, PrivLeak."""
    reference = load_reference(config, system, data, run, split_scores)
    means: dict[tuple[str, str], float] = {}
    items: dict[str, list[float]] = {}
    for split in [name for name in SPLITS if name in data]:
        records: Sequence[Any] = data[split][: config.max_rows]
        scores = split_scores(system, records, split, config, run)
        rows = list(raw_rows(scores, [record.id for record in records], split))
        if config.reply_tokens:
            replies, more = fluency_rows(system, records, split, config.reply_tokens, run)
            rows += more
            if split == "forget":
                write_examples(run, records, replies)
        for row in rows:
            if row.item is None and row.value is not None:
                means[split, row.metric.removeprefix(f"{split}_")] = row.value
            elif row.value is not None:
                items.setdefault(row.metric, []).append(row.value)
        yield from rows
    yield utility_row(means)
    yield from reference_rows(items, reference)


def utility_row(means: Mapping[tuple[str, str], float]) -> Row:
    """Harmonic mean of the nine numbers, 0 when one is 0; None when one is missing, naming it."""
    wanted = [(split, metric) for split in ("retain", *FACTS) for metric in UTILITY]
    missing = [f"{split} {metric}" for split, metric in wanted if (split, metric) not in means]
    note = f"missing: {', '.join(missing)}" if missing else ""
    value = None if missing else stats.harmonic_mean([means[key] for key in wanted])
    return Row(
        metric="model_utility", value=value, n=len(wanted) - len(missing), higher_is_better=True, note=note
    )


def reference_rows(items: Mapping[str, list[float]], reference: Reference | None) -> Iterator[Row]:
    """Forget quality and PrivLeak; None with the reason where there is nothing to compare with, never a made-up p."""
    why = "no retain-only model: set reference to its system spec or to the rows of its measure"
    ratios = items.get("forget_log_truth_ratio", [])
    known = reference.items.get("forget_log_truth_ratio", []) if reference else []
    p = forget_quality(ratios, known) if ratios and known else None
    note = (
        "" if p else why if reference is None else "no truth ratios on forget rows, here or in the reference"
    )
    for metric, value in (("forget_quality", p and p.p), ("forget_quality_log10_p", p and p.log10_p)):
        yield Row(metric=metric, value=value, n=len(ratios), split="forget", higher_is_better=True, note=note)
    auc, auc_ref = membership_auc(items), membership_auc(reference.items) if reference else None
    yield Row(
        metric="membership_auc",
        value=auc,
        split="forget",
        note="" if auc is not None else "needs holdout rows",
    )
    leak = privleak(auc, auc_ref) if auc is not None and auc_ref is not None else None
    note = (
        ""
        if leak is not None
        else why
        if reference is None
        else "needs holdout rows, here and in the reference"
    )
    yield Row(metric="privleak", value=leak, split="forget", note=note)


def membership_auc(items: Mapping[str, Sequence[float]]) -> float | None:
    """Probability that a forget row scores above a holdout row; None without both."""
    members, others = items.get("forget_min_k_nats", []), items.get("holdout_min_k_nats", [])
    if not members or not others:
        return None
    return stats.auroc([*members, *others], [1] * len(members) + [0] * len(others))
