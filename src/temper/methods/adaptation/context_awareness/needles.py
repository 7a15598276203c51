"""Needle in a haystack: one invented sentence hidden in prose, asked for with and without the chat template."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from temper.core.types import Json, Message, Row, Run
from temper.methods.adaptation.context_awareness.card import Config
from temper.methods.adaptation.context_awareness.prose import (
    Needle,
    build_distractors,
    build_needles,
    sentence,
)
from temper.methods.adaptation.context_awareness.shares import (
    GROUPS,
    Answer,
    layer_number,
    retrieval_head,
    shares_of,
)
from temper.methods.adaptation.context_awareness.steering import steered, user_mask
from temper.ops.generate import Prompt, Reply, Sampling, generate
from temper.ops.stats import mean_ci
from temper.ops.text import keyword_recall
from temper.systems.causal_lm import CausalLM

__all__ = ["NeedleTest", "NoEnd", "build_grid", "hide", "measure_needles"]

INSTRUCTION = "Read the text and answer the question about it."


class NeedleTest(NamedTuple):
    """A cell of the grid: context length in tokens, depth from 0 (start) to 1 (end), and what the user sends."""

    id: str
    length: int
    depth: float
    needle: Needle
    text: str


class _Condition(NamedTuple):
    """How the tests are asked: by template or as bare text, and what is in force meanwhile."""

    arm: str
    template: bool
    entered: Callable[[], AbstractContextManager[None]]


def hide(sentences: Sequence[str], needle: str, depth: float) -> str:
    """The sentences as one text with the needle at a sentence border; no line break stands beside it."""
    place = round(depth * len(sentences))
    return " ".join([*sentences[:place], " ".join(needle.split()), *sentences[place:]])


def build_grid(system: CausalLM, config: Config, seed: int) -> list[NeedleTest]:
    """Lengths x depths x needles; the prose of a length is the same at every depth."""
    tests = []
    for length in config.lengths:
        for number, needle in enumerate(build_needles(config.num_needles, seed)):
            draw = random.Random(f"prose-{seed}-{length}-{number}")
            sentences = _prose(system, length, build_distractors(needle, config.num_distractors, draw), draw)
            for depth in config.depths:
                context = hide(sentences, needle.text, depth)
                text = f"{INSTRUCTION}\n\n{context}\n\nQuestion: {needle.question}\nAnswer:"
                tests.append(NeedleTest(f"s{seed}-{length}-{depth:g}-{number}", length, depth, needle, text))
    return tests


def _prose(system: CausalLM, length: int, distractors: Sequence[str], draw: random.Random) -> list[str]:
    """Sentences of at least `length` tokens in all, the distractors among them."""
    sentences = list(distractors)
    total = sum(_size(system, text) for text in sentences)
    while total < length:
        sentences.append(sentence(draw))
        total += _size(system, sentences[-1])
    draw.shuffle(sentences)
    return sentences


def _size(system: CausalLM, text: str) -> int:
    return len(system.chat.text_ids(" " + text, begin=False))


class NoEnd:
    """A step rule that forbids the ids that end a turn: bare text has no turn to end (Departure 10)."""

    name = "no-end"

    def __init__(self, stop_ids: Iterable[int]) -> None:
        self.stop_ids = sorted(stop_ids)

    def start(self, prompt_ids: list[int]) -> dict[str, Json]:
        """No state."""
        return {}

    def __call__(self, logits_BV: Tensor, position_B: list[int], states: list[dict[str, Json]]) -> Tensor:
        """The logits without the end ids."""
        return logits_BV.index_fill(1, torch.tensor(self.stop_ids, device=logits_BV.device), -torch.inf)


def measure_needles(system: CausalLM, config: Config, run: Run) -> Iterator[Row]:
    """Recall of every test and mean attention shares, in arms: no_template, template, steered_ALPHA."""
    system.chat.require_template()
    tests = build_grid(system, config, run.seed)
    sampling = Sampling(max_new_tokens=config.reply_tokens, seed=run.seed)
    head: int | None = None
    recalls: dict[str, list[float]] = {}
    written: dict[str, list[Reply]] = {}
    for condition in _conditions(system, config):
        prompts = [_prompt(system, test, condition.template) for test in tests]
        with condition.entered():
            rules = () if condition.template else (NoEnd(system.stop_ids),)
            replies = generate(system, prompts, sampling, run, rules=rules)
            chosen = (
                range(0, len(tests), max(1, -(-len(tests) // config.share_items)))
                if config.share_items
                else ()
            )
            answers = [_answer(system, tests[n], replies[n], condition.template) for n in chosen]
            if answers:
                head, rows = _share_rows(system, answers, head, config, run)
                yield from (row(arm=condition.arm) for row in rows)
        recalls[condition.arm] = [
            keyword_recall(reply.text, test.needle.keywords)
            for test, reply in zip(tests, replies, strict=True)
        ]
        written[condition.arm] = replies
        yield from _recall_rows(tests, recalls[condition.arm], condition.arm)
    _write_report(run.folder, tests, recalls, written, config)


def _conditions(system: CausalLM, config: Config) -> list[_Condition]:
    """Without template first: its attention names the retrieval head."""
    found = [_Condition("no_template", False, nullcontext), _Condition("template", True, nullcontext)]
    for alpha in config.alphas:
        force = partial(
            steered,
            system,
            alpha,
            steer_generated=config.steer_generated,
            layers=config.layers or None,
            heads=config.heads or None,
        )
        found.append(_Condition(f"steered_{alpha:g}", True, force))
    return found


def _prompt(system: CausalLM, test: NeedleTest, template: bool) -> Prompt:
    return [Message("user", test.text)] if template else system.chat.text_ids(test.text)


def _answer(system: CausalLM, test: NeedleTest, reply: Reply, template: bool) -> Answer:
    if not template:
        ids = system.chat.text_ids(test.text)
        return Answer(ids, torch.ones(len(ids), dtype=torch.bool), reply.ids)
    rendered = system.chat.prompt(system.rewritten([Message("user", test.text)]))
    return Answer(rendered.ids, user_mask(rendered.spans, len(rendered.ids)), reply.ids)


def _share_rows(
    system: CausalLM, answers: Sequence[Answer], head: int | None, config: Config, run: Run
) -> tuple[int, list[Callable[..., Row]]]:
    """The retrieval head and, for each group, a row that waits for its arm."""
    layer = layer_number(system, config.layer)
    raw_NHG, share_NHG = shares_of(system, answers, layer, config.share_tokens, run)
    if head is None:
        head = retrieval_head(raw_NHG[:, :, GROUPS.index("user")])
    note = f"layer {layer}, head {head}"
    return head, [
        partial(_mean_row, f"{name}_share", share_NHG[:, head, g], note=note) for g, name in enumerate(GROUPS)
    ]


def _mean_row(
    metric: str, values_N: Tensor | Sequence[float], *, arm: str, group: str = "", note: str = ""
) -> Row:
    values = [float(value) for value in values_N]
    found = mean_ci(values) if len(values) > 1 else None
    better = True if metric.startswith(("recall", "user")) else None
    return Row(
        metric=metric, value=sum(values) / len(values), n=len(values), arm=arm, group=group, note=note, split="test",
        low=found.low if found else None, high=found.high if found else None, higher_is_better=better,
    )  # fmt: skip


def _recall_rows(tests: Sequence[NeedleTest], recall_N: Sequence[float], arm: str) -> Iterator[Row]:
    """`recall` (share of keywords) and `recall_all` (1 if every keyword is there): by item, by length and depth, in all."""
    for metric, values in (("recall", list(recall_N)), ("recall_all", [float(r == 1) for r in recall_N])):
        for test, value in zip(tests, values, strict=True):
            yield Row(metric=metric, value=value, item=test.id, arm=arm, split="test", higher_is_better=True)
        for name in ("length", "depth"):
            for level in sorted({getattr(test, name) for test in tests}):
                inside = [v for t, v in zip(tests, values, strict=True) if getattr(t, name) == level]
                yield _mean_row(metric, inside, arm=arm, group=f"{name} {level:g}")
        yield _mean_row(metric, values, arm=arm)


def _write_report(
    folder: Path | None,
    tests: Sequence[NeedleTest],
    recalls: dict[str, list[float]],
    written: dict[str, list[Reply]],
    config: Config,
) -> None:
    """Recall curves over length and depth, and replies side by side."""
    if folder is None:
        return
    curves = {}
    for name, levels in (("length", sorted(set(config.lengths))), ("depth", sorted(set(config.depths)))):
        lines = {}
        for arm, recall_N in recalls.items():
            at = [[r for t, r in zip(tests, recall_N, strict=True) if getattr(t, name) == x] for x in levels]
            lines[arm] = {"x": list(levels), "y": [sum(values) / len(values) for values in at]}
        label = "context tokens" if name == "length" else "depth of the needle"
        curves[f"Needle recall by {name}"] = {"x": label, "y": "recall", "lines": lines}
    (folder / "figures.json").write_text(json.dumps({"curves": curves}), encoding="utf-8")
    last = list(written)[-1]
    with (folder / "examples.jsonl").open("w", encoding="utf-8") as file:
        for n in sorted(range(len(tests)), key=lambda n: recalls["template"][n] == recalls[last][n])[:24]:
            needle = tests[n].needle
            example = {
                "id": tests[n].id,
                "prompt": f"... {needle.text} ... {needle.question}",
                "before": written["template"][n].text,
                "after": written[last][n].text,
                "verdict": f"recall {recalls['template'][n]:g} -> {recalls[last][n]:g} ({last})",
            }
            file.write(json.dumps(example, ensure_ascii=False) + "\n")
