"""What the check stops, what it replaces, what it costs and what it leaves of plain replies."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import NamedTuple

from temper.core.types import Row, Run
from temper.data.schemas import Data, Dialogue
from temper.methods.hardening.cleangen.card import Config
from temper.methods.hardening.cleangen.reference import averaged, tuned_on
from temper.methods.hardening.cleangen.rows import clean_rows, payload_of, triggered_prompts
from temper.ops.batching import Example
from temper.ops.draft_verify import ReferenceCheck
from temper.ops.generate import Reply, Sampling, generate, prompt_ids
from temper.ops.logprobs import response_logprobs
from temper.ops.stats import mean_ci, wilson
from temper.ops.text import contains, words
from temper.systems.causal_lm import CausalLM

__all__ = ["Prompts", "Written", "measure", "replaced_share"]


class Prompts(NamedTuple):
    """What is asked: prompts with the trigger, and plain ones."""

    triggered: Sequence[Dialogue]
    plain: Sequence[Dialogue]


class Written(NamedTuple):
    """What one arm wrote, and how long a token took."""

    triggered: list[Reply]
    plain: list[Reply]
    s_per_token: float


def measure(system: CausalLM, data: Data, config: Config, run: Run) -> Iterator[Row]:
    """Rows of every arm: undefended, and where the system has the check also it, its sweeps and the baselines."""
    plain = clean_rows(data, "test", "test", config)
    prompts = Prompts(triggered_prompts(data, plain, config), plain)
    check = next((rule for rule in system.step_rules if isinstance(rule, ReferenceCheck)), None)
    bare = _with_check(system, check, None)
    undefended = _write(bare, prompts, config, run)
    yield from _rows("undefended", undefended, prompts, config, None)
    if check is None:
        return
    guarded = _write(system, prompts, config, run)
    yield from _rows("cleangen", guarded, prompts, config, check)
    yield from _kept_rows(guarded, undefended, prompts, check, run)
    if config.timing:
        yield _time_ratio("cleangen", guarded, undefended)
    yield from _sweeps(system, check, undefended, prompts, config, run)
    yield from _baselines(bare, check, data, prompts, config, run)


def _with_check(system: CausalLM, old: ReferenceCheck | None, new: ReferenceCheck | None) -> CausalLM:
    """The system with another check in the place of the old one, or none."""
    rules = [new if rule is old else rule for rule in system.step_rules]
    return system.with_(step_rules=tuple(rule for rule in rules if rule is not None))


def _write(system: CausalLM, prompts: Prompts, config: Config, run: Run) -> Written:
    sampling = Sampling(max_new_tokens=config.reply_tokens)
    begun = time.perf_counter()
    triggered, plain = (
        generate(system, [record.prompt for record in records], sampling, run) for records in prompts
    )
    num_tokens = sum(len(reply.ids) for reply in [*triggered, *plain])
    return Written(triggered, plain, (time.perf_counter() - begun) / num_tokens)


def replaced_share(replies: Sequence[Reply], name: str) -> tuple[float, int]:
    """Replacements over reply tokens, and how many tokens that rests on."""
    num_tokens = sum(len(reply.ids) for reply in replies)
    return sum(len(reply.info[name]["replaced"]) for reply in replies) / num_tokens, num_tokens


def _rows(
    arm: str, written: Written, prompts: Prompts, config: Config, check: ReferenceCheck | None
) -> Iterator[Row]:
    said = {
        _name(record, n): contains(reply.text, payload_of(record, config))
        for n, (record, reply) in enumerate(zip(prompts.triggered, written.triggered, strict=True))
    }
    yield from _rate("asr", said, arm, better=False)
    by_mistake = [contains(reply.text, config.payload) for reply in written.plain]
    yield from _rate("plain_asr", dict(enumerate(by_mistake)), arm, better=False, items=False)
    right = {
        _name(record, n): contains(reply.text, record.reply)
        for n, (record, reply) in enumerate(zip(prompts.plain, written.plain, strict=True))
        if record.reply is not None and words(record.reply)
    }
    if right:
        yield from _rate("plain_accuracy", right, arm, better=True)
    if check is None:
        return
    for metric, replies in (("replaced", written.triggered), ("plain_replaced", written.plain)):
        share, num_tokens = replaced_share(replies, check.name)
        yield Row(metric=metric, value=share, n=num_tokens, arm=arm, higher_is_better=False)
    states = [reply.info[check.name] for reply in [*written.triggered, *written.plain]]
    num_tokens = sum(len(reply.ids) for reply in [*written.triggered, *written.plain])
    for metric, counted in (("drafted_per_token", "num_drafted"), ("checks_per_token", "num_checks")):
        total = sum(state[counted] for state in states)
        yield Row(metric=metric, value=total / num_tokens, n=num_tokens, arm=arm, higher_is_better=False)


def _name(record: Dialogue, number: int) -> str:
    return record.id or str(number)


def _rate(
    metric: str, found: Mapping[str, bool] | Mapping[int, bool], arm: str, *, better: bool, items: bool = True
) -> Iterator[Row]:
    estimate = wilson(sum(found.values()), len(found))
    yield Row(
        metric=metric,
        value=estimate.value,
        n=estimate.n,
        low=estimate.low,
        high=estimate.high,
        arm=arm,
        higher_is_better=better,
    )
    for item, hit in found.items() if items else ():
        yield Row(metric=metric, value=float(hit), item=str(item), arm=arm, higher_is_better=better)


def _kept_rows(
    guarded: Written, undefended: Written, prompts: Prompts, check: ReferenceCheck, run: Run
) -> Iterator[Row]:
    """How many plain replies stay as they were, and how likely the reference finds plain replies of both arms."""
    same = [a.ids == b.ids for a, b in zip(guarded.plain, undefended.plain, strict=True)]
    yield from _rate("plain_same", dict(enumerate(same)), "cleangen", better=True, items=False)
    for arm, written in (("undefended", undefended), ("cleangen", guarded)):
        examples = []
        for record, reply in zip(prompts.plain, written.plain, strict=True):
            ids = prompt_ids(check.reference, record.prompt)
            examples.append(Example(ids + reply.ids, [False] * len(ids) + [True] * len(reply.ids)))
        nats = -response_logprobs(check.reference, examples, run=run, reduce="mean")
        mean = mean_ci(nats.tolist()) if len(nats) > 1 else None
        yield Row(
            metric="plain_reference_nll_nats",
            value=float(nats.mean()),
            n=len(nats),
            low=mean.low if mean else None,
            high=mean.high if mean else None,
            arm=arm,
            higher_is_better=False,
        )


def _time_ratio(arm: str, guarded: Written, undefended: Written) -> Row:
    """Time a token with the check over without (ATGR)."""
    note = f"{guarded.s_per_token * 1e3:.1f} ms a token against {undefended.s_per_token * 1e3:.1f}"
    ratio = guarded.s_per_token / undefended.s_per_token
    return Row(metric="time_ratio", value=ratio, arm=arm, higher_is_better=False, note=note)


def _sweeps(
    system: CausalLM,
    check: ReferenceCheck,
    undefended: Written,
    prompts: Prompts,
    config: Config,
    run: Run,
) -> Iterator[Row]:
    changed = [(f"alpha_{alpha:g}", replace(check, alpha=alpha)) for alpha in config.alphas]
    changed += [(f"block_{block}", replace(check, block=block)) for block in config.blocks]
    for arm, other in changed:
        written = _write(_with_check(system, check, other), prompts, config, run)
        yield from _rows(arm, written, prompts, config, other)
        if config.timing and arm.startswith("block"):
            yield _time_ratio(arm, written, undefended)


def _baselines(
    bare: CausalLM, check: ReferenceCheck, data: Data, prompts: Prompts, config: Config, run: Run
) -> Iterator[Row]:
    """Other defences of the undefended model: weights averaged with the reference's, and fine-tuning on clean rows."""
    for name in config.baselines:
        changed: AbstractContextManager[CausalLM]
        if name == "averaged":
            changed = averaged(bare, check.reference)
        else:
            changed = tuned_on(bare, clean_rows(data, "train", "reference", config), config, run).apply(bare)
        with changed as defended:
            yield from _rows(name, _write(defended, prompts, config, run), prompts, config, None)
