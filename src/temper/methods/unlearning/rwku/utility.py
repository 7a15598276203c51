"""What a model can still do: general questions, reasoning, truthfulness, facts and fluency; and membership scores."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from temper.core.errors import DataError
from temper.core.types import Row, Run
from temper.data.schemas import Choice, Data, Dialogue, Text
from temper.methods.unlearning.rwku.card import Config
from temper.methods.unlearning.rwku.scoring import BRIEF, PREFIX, answer_ids, ask
from temper.ops import stats, text
from temper.ops.choices import choice_logprobs, encode_replies
from temper.ops.generate import Sampling, generate
from temper.ops.logprobs import next_token_logits
from temper.ops.membership import ATTACKS, membership_scores
from temper.ops.tofu_metrics import mean_row
from temper.systems.causal_lm import CausalLM

__all__ = ["membership_rows", "ngram_entropy", "reasoned_answer", "token_f1", "utility_rows"]

LETTERS = "ABCDEFGHIJ"
ENTROPY_WEIGHTS = {2: 2 / 3, 3: 4 / 3}
SIDES = ("forget", "retain", "unseen")


def token_f1(reply: str, answers: Sequence[str]) -> float:
    """Best F1 between the reply's words and an answer's, articles and punctuation left out (SQuAD)."""
    return max(_f1(text.normalise(reply).split(), text.normalise(answer).split()) for answer in answers)


def _f1(found: Sequence[str], gold: Sequence[str]) -> float:
    if not found or not gold:
        return float(list(found) == list(gold))
    common = (Counter(found) & Counter(gold)).total()
    return 2 * common / (len(found) + len(gold))


def reasoned_answer(reply: str) -> str:
    """What stands after "the answer is", up to the next full stop; "" where nothing does."""
    found = re.search(r"the answer is (.*?)\.", reply, flags=re.IGNORECASE | re.DOTALL)
    return found.group(1).strip() if found else ""


def ngram_entropy(reply: str) -> float:
    """(2/3 H_2 + 4/3 H_3) / 2 in bits over a reply's words: 0 for a loop or a very short reply (Departure 7)."""
    words = text.words(reply)
    return sum(weight * _entropy(words, n) for n, weight in ENTROPY_WEIGHTS.items()) / len(ENTROPY_WEIGHTS)


def _entropy(words: Sequence[str], n: int) -> float:
    grams = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    total = grams.total()
    return sum(-c / total * math.log2(c / total) for c in grams.values()) if total else 0.0


def _general(system: CausalLM, records: Sequence[Choice], config: Config, run: Run) -> list[float]:
    """Whether the most likely letter after the answer prefix is the right one, examples first where a row brings them."""
    ids = [answer_ids(system, _lettered(record)) for record in records]
    columns = [system.chat.continuation_ids(f" {letter}", PREFIX)[0] for letter in LETTERS]
    logits_NK = next_token_logits(system, ids, run, columns=columns).logits_NK
    return [
        float(int(logits_K[: len(record.choices)].argmax()) == record.answer)
        for logits_K, record in zip(logits_NK, records, strict=True)
    ]


def _lettered(record: Choice) -> str:
    if len(record.choices) > len(LETTERS):
        raise DataError(f"{len(record.choices)} choices, {len(LETTERS)} at most", where=f"row {record.id}")
    shown = [
        _question(str(row["question"]), row["choices"]) + f"{PREFIX} {LETTERS[int(row['answer'])]}\n"
        for row in record.extra.get("examples") or []
    ]
    return "\n".join(
        ["Answer with the letter of the right choice.", *shown, _question(record.question, record.choices)]
    )


def _question(question: str, choices: Sequence[str]) -> str:
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
    return "\n".join([f"Question: {question}", *lines]) + "\n"


def _truthful(system: CausalLM, records: Sequence[Choice], config: Config, run: Run) -> list[float]:
    """Whether the true answer is the most likely whole reply (MC1; Departure 8)."""
    items = [
        encode_replies(system, record.question, record.choices, where=f"row {record.id}")
        for record in records
    ]
    return [
        float(int(logp_K.argmax()) == record.answer)
        for logp_K, record in zip(choice_logprobs(system, items, run), records, strict=True)
    ]


def _answers(record: Dialogue) -> list[str]:
    found = record.extra.get("answers") or ([record.reply] if record.reply else [])
    if not found:
        raise DataError("The question has no answer", where=f"row {record.id}", cure="Give a column answers.")
    return [str(answer) for answer in found]


def _factual(system: CausalLM, records: Sequence[Dialogue], config: Config, run: Run) -> list[float]:
    ids = [answer_ids(system, f"{BRIEF}\nQuestion: {record.prompt[-1].content}\n") for record in records]
    replies = ask(system, ids, config.reply_tokens, run)
    return [token_f1(reply, _answers(record)) for reply, record in zip(replies, records, strict=True)]


def _reasoned(system: CausalLM, records: Sequence[Dialogue], config: Config, run: Run) -> list[float]:
    asked = [
        f"{record.extra.get('cot') or ''}\n\nQ: {record.prompt[-1].content}\nA:".strip() for record in records
    ]
    sampling = Sampling(max_new_tokens=config.reason_tokens, seed=run.seed)
    ids = [answer_ids(system, user, prefix="") for user in asked]
    return [
        float(any(text.exact_match(reasoned_answer(reply.text), answer) for answer in _answers(record)))
        for reply, record in zip(generate(system, ids, sampling, run), records, strict=True)
    ]


def _fluent(system: CausalLM, records: Sequence[Dialogue], config: Config, run: Run) -> list[float]:
    if not config.fluency_tokens:
        return []
    sampling = Sampling(max_new_tokens=config.fluency_tokens, seed=run.seed)
    ids = [answer_ids(system, record.prompt[-1].content, prefix="") for record in records]
    return [ngram_entropy(reply.text) for reply in generate(system, ids, sampling, run)]


Measure = Callable[..., list[float]]
UTILITY: dict[str, tuple[type, Measure]] = {
    "utility_general": (Choice, _general),
    "utility_reason": (Dialogue, _reasoned),
    "utility_truthfulness": (Choice, _truthful),
    "utility_factuality": (Dialogue, _factual),
    "utility_fluency": (Dialogue, _fluent),
}


def utility_rows(system: CausalLM, data: Data, config: Config, run: Run) -> Iterator[Row]:
    """Mean and items of each utility part that the data has."""
    for part, (kind, measure) in UTILITY.items():
        records: Sequence[Any] = data.records(part, kind)[: config.max_rows or None]
        values = measure(system, records, config, run) if records else []
        if not values:
            continue
        yield mean_row(part, values, "utility", True)
        for record, value in zip(records, values, strict=True):
            yield Row(metric=part, value=value, item=record.id, split="utility", higher_is_better=True)


def membership_rows(system: CausalLM, data: Data, config: Config, run: Run) -> Iterator[Row]:
    """Mean score of each attack on each set of texts (Departure 1), and how well it tells forget texts from unseen ones."""
    scores: dict[str, dict[str, list[float]]] = {}
    for side in SIDES:
        texts = data.records(f"mia_{side}", Text)[: config.max_rows or None]
        if texts:
            scores[side] = membership_scores(
                system, texts, run, share=config.min_k, max_tokens=config.max_tokens
            )
            for attack in ATTACKS:
                better = False if side == "forget" else None
                yield mean_row(f"mia_{side}_{attack}", scores[side][attack], side, better)
    if not {"forget", "unseen"} <= set(scores):
        return
    for attack in ATTACKS:
        seen, unseen = scores["forget"][attack], scores["unseen"][attack]
        auc = stats.auroc([*seen, *unseen], [1] * len(seen) + [0] * len(unseen))
        yield Row(metric=f"mia_auc_{attack}", value=auc, n=len(seen) + len(unseen), split="forget")
