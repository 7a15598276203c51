"""Replies to prompts: what is served, evaluated and sampled for training all comes through here.

A reply does not depend on the other prompts of the call. In float32 greedy text is that of one
prompt at a time (rounding may only decide between tokens whose logits tie to about 1e-5); with
`run.exact` even the numbers are the same, bit for bit, because every row runs alone: about as
many times slower as rows would have shared a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch

from temper.core.errors import ConfigError, DataError, NeedsError
from temper.core.types import Message, Run
from temper.ops.decode_backends import (
    Backend,
    PromptRow,
    RowBackend,
    SlotBackend,
    cache_by_position,
    slots_work,
)
from temper.ops.decoding import Decoding, Loop, RowState, Stops, decode, prefill_groups
from temper.ops.draft_verify import CheckedLoop, PairBackend, ReferenceCheck
from temper.ops.hooks import is_hooked
from temper.ops.packed_linear import packed_linears
from temper.ops.precision import autocast
from temper.systems.base import Reply, Sampling, StepRule, System
from temper.systems.causal_lm import CausalLM
from temper.systems.remote import Remote

__all__ = ["Engine", "Prompt", "Reply", "Sampling", "StepRule", "generate", "prompt_ids"]

Prompt = str | Sequence[Message] | Sequence[Mapping[str, str]] | Sequence[int]
"""One user message, a conversation, or finished token ids."""

Engine = Literal["auto", "rows", "vllm"]
"""auto: rows share forward passes where the model allows; rows: one at a time; vllm: that engine."""

DECODE_WIDTH = 64
"""Rows that decode together at most."""
PACK_FROM_TOKENS = 512
"""Replies of so many tokens in all repay laying out the weights for decoding."""
MIN_SHARED_PREFIX = 16
"""A common prefix shorter than this is not worth a forward pass of its own."""


def generate(
    system: System,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    run: Run,
    *,
    rules: Sequence[StepRule] = (),
    num_samples: int = 1,
    engine: Engine = "auto",
    width: int = DECODE_WIDTH,
) -> list[Reply]:
    """`num_samples` replies to each prompt, in the order of the prompts, a prompt's samples together.

    `rules` come after the system's own step rules. A row draws from (sampling.seed, its prompt's
    number, its sample's number) alone. Reply ids include the end token if the model wrote one;
    text leaves out special tokens and ends before a stop string. A reply that meets the end of
    the model's context ends there with finish "length"; a prompt that leaves no room for one
    token is a DataError that names it.
    """
    if num_samples < 1 or width < 1:
        raise ConfigError(f"num_samples={num_samples}, width={width}", cure="Both must be at least 1.")
    if isinstance(system, Remote):
        return _remote(system, prompts, sampling, run, rules, num_samples)
    if not isinstance(system, CausalLM):
        raise NeedsError(f"A {system.kind} system cannot generate", cure="Use a CausalLM or Remote system.")
    if not prompts:
        return []
    rules = (*system.step_rules, *rules)
    check = next((rule for rule in rules if isinstance(rule, ReferenceCheck)), None)
    # What writes, and what reads along.
    systems = [system] if check is None else [system, check.reference]
    room = min((s.max_tokens for s in systems if s.max_tokens is not None), default=None)
    rows = [PromptRow(n, _checked_ids(system, prompt, n, room)) for n, prompt in enumerate(prompts)]
    if engine == "vllm":
        from temper.ops.vllm_engine import generate_vllm

        return generate_vllm(system, rows, sampling, run, rules, num_samples)
    replies: dict[tuple[int, int], Reply] = {}
    with torch.no_grad(), _evaluating(systems), autocast(run):
        finished = _decode(systems, rows, sampling, run, rules, num_samples, engine, width, room)
        total = len(rows) * num_samples
        for state in run.ticker(finished, total=total, label="generate"):
            replies[state.prompt.number, state.sample] = _reply(system, state, sampling, rules)
    return [replies[row.number, sample] for row in rows for sample in range(num_samples)]


def prompt_ids(system: CausalLM, prompt: Prompt) -> list[int]:
    """The ids a prompt becomes: rewritten and rendered by the system's template, unless they are ids already."""
    if isinstance(prompt, str):
        prompt = [Message("user", prompt)]
    if all(isinstance(part, int) for part in prompt):
        return list(prompt)  # type: ignore[arg-type]
    return list(system.chat.prompt(system.rewritten(_messages(prompt))).ids)


def _messages(prompt: Sequence[Any]) -> list[Message]:
    return [part if isinstance(part, Message) else Message(part["role"], part["content"]) for part in prompt]


def _checked_ids(system: CausalLM, prompt: Prompt, number: int, room: int | None) -> list[int]:
    ids = prompt_ids(system, prompt)
    if not ids:
        raise DataError("A prompt has no tokens", where=f"prompt {number}", cure="Give it some text.")
    if room is not None and len(ids) >= room:
        raise DataError(
            f"A prompt of {len(ids)} tokens leaves no room for a reply in a context of {room}",
            where=f"prompt {number}",
            cure="Shorten it, or use a model with a longer context.",
        )
    return ids


@contextmanager
def _evaluating(systems: Sequence[CausalLM]) -> Iterator[None]:
    """Dropout off inside the block."""
    training = [module for system in systems for module in system.model.modules() if module.training]
    for system in systems:
        system.model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _decode(
    systems: Sequence[CausalLM],
    rows: list[PromptRow],
    sampling: Sampling,
    run: Run,
    rules: Sequence[StepRule],
    num_samples: int,
    engine: Engine,
    width: int,
    room: int | None,
) -> Iterator[RowState]:
    system, width = systems[0], min(width, num_samples * len(rows))

    def limit_of(row: PromptRow) -> int:
        return sampling.max_new_tokens if room is None else min(sampling.max_new_tokens, room - len(row.ids))

    backends, shared, width = _backends(
        systems, rows, run, engine, width, max(len(r.ids) + limit_of(r) for r in rows)
    )
    groups = prefill_groups(rows, run.batch_tokens, shared)
    stops = Stops(system.stop_ids, tuple(sampling.stop), lambda ids: _text(system, ids))
    with ExitStack() as stack:
        half = torch.is_autocast_enabled(system.device.type)
        if not half and num_samples * sum(map(limit_of, rows)) >= PACK_FROM_TOKENS:
            for one, backend in zip(systems, backends, strict=True):
                if isinstance(backend, SlotBackend):
                    stack.enter_context(packed_linears(one.model, width))
        loop = _loop(backends, rules, sampling, stops)
        yield from decode(loop, groups, width=width, num_samples=num_samples, limit_of=limit_of)


def _loop(
    backends: Sequence[Backend], rules: Sequence[StepRule], sampling: Sampling, stops: Stops
) -> Decoding:
    """Token by token, or in checked blocks where one of the rules asks for it."""
    for rule in rules:
        if isinstance(rule, ReferenceCheck):
            return CheckedLoop(Loop(PairBackend(*backends), rules, sampling, stops), rule)
    return Loop(backends[0], rules, sampling, stops)


def _backends(
    systems: Sequence[CausalLM], rows: list[PromptRow], run: Run, engine: Engine, width: int, longest: int
) -> tuple[Sequence[Backend], int, int]:
    """A backend a model, the number of prompt tokens it shares among rows, and how many rows it takes at once."""
    if (
        run.exact
        or engine == "rows"
        or not all(slots_work(system.model, system.device, longest) for system in systems)
    ):
        forgets = len(systems) > 1
        keep = [not forgets or cache_by_position(system.model, longest) for system in systems]
        rowwise = zip(systems, keep, strict=True)
        return [RowBackend(system.model, system.device, kept) for system, kept in rowwise], 0, 1
    prefix = [] if any(is_hooked(system.model) for system in systems) else _shared_prefix(rows)
    return (
        [SlotBackend(system.model, system.device, width, prefix) for system in systems],
        len(prefix),
        width,
    )


def _shared_prefix(rows: list[PromptRow]) -> list[int]:
    """Leading ids common to all prompts, leaving each at least one of its own; [] where too short to pay."""
    if len(rows) < 2:
        return []
    # Every list lies between the least and the greatest, so what those two share all share.
    least, greatest = min(row.ids for row in rows), max(row.ids for row in rows)
    pairs = zip(least, greatest, strict=False)
    common = next((n for n, (a, b) in enumerate(pairs) if a != b), len(least))
    length = min(common, min(len(row.ids) for row in rows) - 1)
    return rows[0].ids[:length] if length >= MIN_SHARED_PREFIX else []


def _text(system: CausalLM, ids: list[int]) -> str:
    return str(system.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _reply(system: CausalLM, state: RowState, sampling: Sampling, rules: Sequence[StepRule]) -> Reply:
    ids = state.ids
    text = _text(system, ids[:-1] if ids[-1] in system.stop_ids else ids)
    cuts = [text.find(string) for string in sampling.stop if string in text]
    if cuts:
        text = text[: min(cuts)]
    finish: Literal["stop", "length"] = "stop" if state.finish == "stop" else "length"
    info = {rule.name: found for rule, found in zip(rules, state.states, strict=True)}
    return Reply(text, ids, finish, len(state.prompt.ids), info)


def _remote(
    system: Remote,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    run: Run,
    rules: Sequence[StepRule],
    num_samples: int,
) -> list[Reply]:
    """An endpoint draws samples itself; sample k asks with seed + k."""
    if rules:
        raise NeedsError(
            "An endpoint cannot run step rules",
            where=", ".join(r.name for r in rules),
            cure="Use local weights.",
        )
    conversations = []
    for number, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            prompt = [Message("user", prompt)]
        if any(isinstance(part, int) for part in prompt):
            raise NeedsError(
                "An endpoint takes messages, not token ids", where=f"prompt {number}", cure="Give text."
            )
        conversations.append(_messages(prompt))
    from dataclasses import replace

    drawn = [
        system.complete(conversations, replace(sampling, seed=sampling.seed + sample))
        for sample in range(num_samples)
    ]
    return [replies[number] for number in range(len(prompts)) for replies in drawn]
