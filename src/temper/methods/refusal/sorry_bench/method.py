"""Measure how much a system fulfils, class by class and style by style; make the rewordings that need no model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from temper.core.errors import ConfigError, DataError, nearest
from temper.core.types import Json, Row, Run
from temper.data.schemas import Behaviour, Data, Labelled
from temper.methods.refusal.sorry_bench import scoring
from temper.methods.refusal.sorry_bench.card import Config
from temper.methods.refusal.sorry_bench.items import (
    BASE,
    STYLES,
    HumanReply,
    Item,
    chosen,
    human_replies,
    items_of,
)
from temper.methods.refusal.sorry_bench.judging import Asked, FulfilmentJudge, load_judge
from temper.methods.refusal.sorry_bench.scoring import Scored
from temper.ops.generate import generate
from temper.ops.text import MUTATIONS, mutate
from temper.systems.base import Sampling, System

__all__ = ["answered", "facts_of", "make", "measure", "reworded", "write_examples", "write_responses"]


def measure(system: System, data: Data, config: Config, run: Run) -> Iterator[Row]:
    """Rates by class, domain and style on the part test; with a part human, also the judge's agreement with it.

    Leaves every reply with its verdict in `responses.jsonl`, in the columns that the part human is read from.
    """
    every = items_of(data.records("test", Behaviour), config.release, data.source)
    items = chosen(every, config)
    labelled = human_replies(data.records("human", Labelled), every)
    judge = load_judge(config.judge, config, run)
    keyword = load_judge(config.keyword_judge, config, run) if labelled else None
    scored = answered(system, items, judge, config, run)
    write_responses(run.folder, scored, judge.name)
    write_examples(run.folder, scored, config.show_replies)
    rows = _all_rows(scored, labelled, judge, keyword, run)
    yield from scoring.with_facts(rows, facts_of(judge, config))


def answered(
    system: System, items: Sequence[Item], judge: FulfilmentJudge, config: Config, run: Run
) -> list[Scored]:
    """One reply to each item (a lone user turn) and the judge's verdict on it."""
    sampling = Sampling(
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        seed=run.seed,
    )
    replies = [reply.text for reply in generate(system, [item.prompt for item in items], sampling, run)]
    asked = [
        Asked(item.request, item.prompt, item.style, reply)
        for item, reply in zip(items, replies, strict=True)
    ]
    return [Scored(*found) for found in zip(items, replies, judge.judge(asked), strict=True)]


def _all_rows(
    scored: Sequence[Scored],
    labelled: Sequence[HumanReply],
    judge: FulfilmentJudge,
    keyword: FulfilmentJudge | None,
    run: Run,
) -> Iterator[Row]:
    yield from scoring.rate_rows(scored)
    yield from scoring.item_rows(scored)
    if any(one.item.style == BASE for one in scored):
        yield from scoring.delta_rows(scored, run.seed)
    if keyword is not None:
        asked = [Asked(r.item.request, r.item.prompt, r.item.style, r.reply) for r in labelled]
        names = (judge.name, keyword.name)
        yield from scoring.agreement_rows(labelled, judge.judge(asked), keyword.judge(asked), names)


def facts_of(judge: FulfilmentJudge, config: Config) -> dict[str, Json]:
    """What a rate rests on besides the system and the data."""
    sampling = {
        "max_new_tokens": config.max_new_tokens,
        "temperature": config.temperature,
        "top_p": config.top_p,
    }
    return {"judge": judge.name, "judge_revision": judge.revision, "sampling": sampling}


def write_responses(folder: Path | None, scored: Sequence[Scored], judge: str) -> None:
    """Every reply with its verdict; fill in human_score and the file is a part human."""
    if folder is None:
        return
    with (folder / "responses.jsonl").open("w", encoding="utf-8") as file:
        for item, reply, verdict in scored:
            row = {
                "question_id": item.number,
                "prompt_style": item.style,
                "category": item.category.name,
                "choices": [{"turns": [reply]}],
                "human_score": None,
                "judge": judge,
                "judge_score": None if verdict.label is None else int(verdict.label),
                "judge_reason": verdict.reason,
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_examples(folder: Path | None, scored: Sequence[Scored], show_replies: bool) -> None:
    """Prompts and verdicts for the report; replies only where they are asked for."""
    if folder is None:
        return
    words = {True: "fulfilled", False: "not fulfilled", None: "unscored"}
    with (folder / "examples.jsonl").open("w", encoding="utf-8") as file:
        for item, reply, verdict in scored:
            example = {
                "prompt": item.prompt,
                "after": reply if show_replies else f"({len(reply)} characters, in responses.jsonl)",
                "verdict": words[verdict.label],
                "reason": verdict.reason,
                "class": item.category.label,
                "style": item.style,
            }
            file.write(json.dumps(example, ensure_ascii=False) + "\n")


def make(system: System | None, data: Data, config: Config, run: Run) -> Data:
    """The data with every base row in each style of `mutations`; rows that are there already stay as they are."""
    records = data.records("test", Behaviour)
    items_of(records, config.release, data.source)
    _check_mutations(config.mutations)
    plain = [record for record in records if record.extra["prompt_style"] == BASE]
    if not plain:
        raise DataError('There is no row in style "base" to reword', where="part test, column prompt_style")
    there = {(record.extra["question_id"], record.extra["prompt_style"]) for record in records}
    made = [
        reworded(record, style, run.seed)
        for style in config.mutations
        for record in plain
        if (record.extra["question_id"], style) not in there
    ]
    others = {"human": data["human"]} if data.get("human") else {}
    return Data({"test": [*records, *made], **others}, data.source)


def _check_mutations(styles: Sequence[str]) -> None:
    for style in styles:
        if style in STYLES and style not in MUTATIONS:
            raise ConfigError(
                f"Style {style!r} takes a model or a translator to make",
                where="setting mutations", cure="Bring its rows in your own file; measure takes them.",
            )  # fmt: skip
        if style not in MUTATIONS:
            raise ConfigError(
                f"There is no style {style!r}", where="setting mutations", cure=nearest(style, MUTATIONS)
            )


def reworded(record: Behaviour, style: str, seed: int) -> Behaviour:
    """A base row in another style: same number and class; codes come inside an instruction to decode them."""
    prompt = mutate(record.prompt, style, seed)
    extra = {**record.extra, "prompt_style": style, "turns": [prompt]}
    return Behaviour(
        prompt, category=record.category, benign=record.benign, id=f"{record.id}-{style}", extra=extra
    )
