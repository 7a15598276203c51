"""What is asked, under which attacks, how alike two models answer, and what of that is selective."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import yaml

from temper.core.types import Row, Run
from temper.methods.unlearning.concept_vectors.card import Config
from temper.methods.unlearning.concept_vectors.items import Item
from temper.ops import text
from temper.ops.generate import Sampling, generate, prompt_ids
from temper.ops.tofu_metrics import mean_row
from temper.systems.causal_lm import CausalLM

__all__ = [
    "Answer",
    "Ask",
    "answers_of",
    "asks_of",
    "behaviour_rows",
    "ids_of",
    "jailbreak",
    "selectivity_of",
    "write_examples",
]

TARGET, COMPLETION, UNRELATED, JAILBREAK = "target", "completion", "unrelated", "jailbreak"
SCORED = (TARGET, UNRELATED)
"""Kinds whose answers are also scored by their log-probability."""


class Ask(NamedTuple):
    """One question: its kind, whose concept and which number, the attack if any, and the user turn."""

    kind: str
    concept: str
    number: int
    attack: str
    user: str

    @property
    def id(self) -> str:
        return f"{self.concept}/{self.attack or self.kind}/{self.number}"


class Answer(NamedTuple):
    """A greedy answer; `logp` is its own mean log-probability a token, where it was asked for."""

    text: str
    ids: list[int]
    logp: float | None = None


@cache
def _prompts() -> dict[str, str]:
    found: dict[str, str] = yaml.safe_load(
        (Path(__file__).parent / "data" / "prompts.yaml").read_text("utf-8")
    )
    return found


def jailbreak(attack: str, item: Item, number: int, page_chars: int) -> str:
    """One target question under one attack; the page is cut after so many characters."""
    return _prompts()[attack].format(
        concept=item.concept,
        question=item.asked.target[number],
        german=item.german[number],
        page=item.text[:page_chars].strip(),
    )


def asks_of(item: Item, config: Config) -> list[Ask]:
    """All that is asked about a concept; the item stays as it is."""
    limit, other = config.num_questions or None, config.num_unrelated or None
    target = item.asked.target[:limit]
    asks = [Ask(TARGET, item.concept, n, "", question) for n, question in enumerate(target)]
    for n, first in enumerate(item.beginnings[:limit]):
        asks.append(Ask(COMPLETION, item.concept, n, "", _prompts()["completion"].format(first=first)))
    asks += [Ask(UNRELATED, item.concept, n, "", q) for n, q in enumerate(item.asked.unrelated[:other])]
    for attack in config.attacks:
        asks += [
            Ask(JAILBREAK, item.concept, n, attack, jailbreak(attack, item, n, config.page_chars))
            for n in range(len(target))
        ]
    return asks


def ids_of(system: CausalLM, ask: Ask, config: Config) -> list[int]:
    """The prompt's ids: by the model's template, or in the paper's plain format (never for attacks)."""
    if not config.plain or ask.kind == JAILBREAK:
        return prompt_ids(system, ask.user)
    framed = ask.user if ask.kind == COMPLETION else f"Question: {ask.user}\n Answer:"
    return system.chat.text_ids(framed)


def answers_of(system: CausalLM, asks: Sequence[Ask], config: Config, run: Run) -> dict[str, Answer]:
    """Greedy answers by user turn; what two concepts ask alike is answered once."""
    different = {ask.user: ask for ask in asks}
    ids = [ids_of(system, ask, config) for ask in different.values()]
    replies = generate(system, ids, Sampling(max_new_tokens=config.reply_tokens, seed=run.seed), run)
    return {
        user: Answer(reply.text.strip(), list(reply.ids))
        for user, reply in zip(different, replies, strict=True)
    }


def behaviour_rows(
    asks: Sequence[Ask], before: Mapping[str, Answer], after: Mapping[str, Answer]
) -> Iterator[Row]:
    """How alike both models answer, by kind and attack; the original's answer is the reference (Departure 1).

    An item is what is drawn by itself: a question, under all attacks together, and for selectivity a concept, whose
    questions share one mean over unrelated answers.
    """
    alike = {ask.id: text.rouge_l_f1(after[ask.user].text, before[ask.user].text, stem=False) for ask in asks}
    blues = {ask.id: text.bleu(after[ask.user].text, before[ask.user].text) for ask in asks}
    for kind in dict.fromkeys(ask.kind for ask in asks):
        here = [ask for ask in asks if ask.kind == kind]
        for name, values in (("rouge_l", alike), ("bleu", blues)):
            yield from _similarity_rows(f"{kind}_{name}", kind, here, values)
    yield from _each("selectivity", TARGET, True, selectivity_of(asks, alike))
    drops = {
        ask.id: before[ask.user].logp - after[ask.user].logp  # type: ignore[operator]
        for ask in asks
        if ask.kind in SCORED
    }
    for kind in SCORED:
        lost_here = {ask.id: drops[ask.id] for ask in asks if ask.kind == kind}
        yield from _each(f"{kind}_drop_nats", kind, kind == TARGET, lost_here)
    # A drop plays the part of what is lost of likeness.
    lost = {name: 1 - drop for name, drop in drops.items()}
    yield from _each("selectivity_nats", TARGET, True, selectivity_of(asks, lost))


def _similarity_rows(
    metric: str, kind: str, asks: Sequence[Ask], values: Mapping[str, float]
) -> Iterator[Row]:
    better = kind == UNRELATED
    attacked: dict[str, list[float]] = {}
    for ask in asks:
        attacked.setdefault(f"{ask.concept}/{kind}/{ask.number}", []).append(values[ask.id])
    yield from _each(metric, kind, better, {item: fmean(found) for item, found in attacked.items()})
    for attack in dict.fromkeys(ask.attack for ask in asks if ask.attack):
        mean = mean_row(metric, [values[ask.id] for ask in asks if ask.attack == attack], kind, better)
        yield Row(**{**vars(mean), "group": attack})


def _each(metric: str, split: str, better: bool, values: Mapping[str, float]) -> Iterator[Row]:
    yield mean_row(metric, list(values.values()), split, better)
    for item, value in values.items():
        yield Row(metric=metric, value=value, item=item, split=split, higher_is_better=better)


def selectivity_of(asks: Sequence[Ask], alike: Mapping[str, float]) -> dict[str, float]:
    """Mean over a concept's target answers of (1 - likeness) - the same over its unrelated ones, by concept."""
    found: dict[tuple[str, str], list[float]] = {}
    for ask in asks:
        if ask.kind in SCORED:
            found.setdefault((ask.concept, ask.kind), []).append(alike[ask.id])
    return {
        concept: fmean(found[concept, UNRELATED]) - fmean(values)
        for (concept, kind), values in found.items()
        if kind == TARGET
    }


def write_examples(
    run: Run, asks: Sequence[Ask], before: Mapping[str, Answer], after: Mapping[str, Answer], most: int = 60
) -> None:
    """At most so many questions with both models' answers, for the report: the first of each concept, kind and attack first."""
    if run.folder is None:
        return
    run.folder.mkdir(parents=True, exist_ok=True)
    with (run.folder / "examples.jsonl").open("w", encoding="utf-8") as file:
        for ask in sorted(asks, key=lambda ask: ask.number)[:most]:
            shown = {
                "id": ask.id,
                "prompt": ask.user,
                "before": before[ask.user].text,
                "after": after[ask.user].text,
            }
            file.write(json.dumps(shown, ensure_ascii=False) + "\n")
