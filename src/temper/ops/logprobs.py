"""Log-probabilities of the tokens that matter: those of replies, and of the first token after a prompt.

Same value whatever the padding, the batch or its order (1e-5 in float32; bit for bit in exact mode).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn

from temper.core.errors import DataError, NumericsError
from temper.core.types import Run
from temper.ops.batching import Batch, Example, collate, pad_id, plan_batches
from temper.ops.precision import autocast, eval_mode
from temper.ops.projection import (
    gather_logprobs,
    head_is_plain,
    head_of,
    selected_logits,
    token_logprobs,
    wanted_hidden,
)
from temper.store.cache import Cache

if TYPE_CHECKING:
    from temper.systems.causal_lm import CausalLM

__all__ = [
    "NextToken",
    "Scored",
    "mean_by_row",
    "next_token_logits",
    "position_logits",
    "reference_logprobs",
    "response_logprobs",
    "score_batch",
    "sum_by_row",
]


class Scored(NamedTuple):
    """Every scored token's log-probability in nats, row by row in order, and the row of the batch it stands in."""

    logp_S: Tensor
    row_S: Tensor
    num_rows: int


class NextToken(NamedTuple):
    """Logits of some ids at the first token after each prompt, (N, K), the logsumexp over all ids, and the best id."""

    logits_NK: Tensor
    logsumexp_N: Tensor
    top_N: Tensor


def score_batch(model: nn.Module, batch: Batch) -> Scored:
    """Log-probabilities of the batch's scored tokens in float32, with gradient.

    Equals gathering the targets from log_softmax over the model's full logits. Raises DataError for a row
    without a scored token.
    """
    scored_BT = batch.scored_BT[:, 1:]
    _require_scored(scored_BT.sum(1).tolist(), batch.rows)
    target_S = batch.ids_BT[:, 1:][scored_BT]
    row_S = scored_BT.nonzero()[:, 0]
    # The token at t is predicted at t - 1; nothing is asked of the last position.
    at_BT = nn.functional.pad(scored_BT, (0, 1))
    if head_is_plain(model):
        hidden_SD, num_ids = wanted_hidden(model, _inputs(batch), at_BT)
        logp_S = token_logprobs(head_of(model), hidden_SD, target_S, num_ids)
    else:
        logp_S = gather_logprobs(selected_logits(model, _inputs(batch), at_BT), target_S)
    return Scored(logp_S, row_S, len(batch.ids_BT))


def _inputs(batch: Batch) -> dict[str, Tensor]:
    """What the model gets; under a causal mask no token sees the padding to its right, so none is masked there."""
    if batch.side == "right":
        return {"input_ids": batch.ids_BT}
    positions = (batch.mask_BT.long().cumsum(1) - 1).clamp(min=0)
    return {"input_ids": batch.ids_BT, "attention_mask": batch.mask_BT.long(), "position_ids": positions}


def _require_scored(counts: Sequence[int], rows: Sequence[int]) -> None:
    for row, count in zip(rows, counts, strict=True):
        if not count:
            raise DataError(
                "The row has no token to score",
                where=f"row {row}",
                cure="Its reply is empty or was truncated away: raise max_tokens or drop the row.",
            )


def position_logits(model: nn.Module, batch: Batch, at_BT: Tensor) -> Tensor:
    """The model's logits in float32 at the positions marked in `at_BT`, (S, V), row by row, with gradient.

    Position t holds the distribution of token t + 1. Memory is S x V: mark few, or split them over calls.
    """
    return selected_logits(model, _inputs(batch), at_BT).float()


def sum_by_row(scored: Scored) -> Tensor:
    """Log-probability of each row's scored tokens, (B,), in nats."""
    zeros = scored.logp_S.new_zeros(scored.num_rows)
    return zeros.index_add(0, scored.row_S, scored.logp_S)


def mean_by_row(scored: Scored) -> Tensor:
    """Mean log-probability over each row's scored tokens, (B,), in nats per token."""
    return sum_by_row(scored) / torch.bincount(scored.row_S, minlength=scored.num_rows)


@overload
def response_logprobs(
    system: CausalLM, examples: Sequence[Example], *, run: Run, reduce: Literal["sum", "mean"] = "sum"
) -> Tensor: ...
@overload
def response_logprobs(
    system: CausalLM, examples: Sequence[Example], *, run: Run, reduce: Literal["tokens"]
) -> list[Tensor]: ...
def response_logprobs(
    system: CausalLM,
    examples: Sequence[Example],
    *,
    run: Run,
    reduce: Literal["sum", "mean", "tokens"] = "sum",
) -> Tensor | list[Tensor]:
    """Log-probability of each example's scored tokens in nats, in the examples' order, on the CPU, no gradient.

    "sum" and "mean" give shape (N,), "tokens" a tensor for each example. Raises DataError for an example without
    a scored token and NumericsError for a value that is not finite.
    """
    _require_scored([sum(example.scored) for example in examples], range(len(examples)))
    found: list[Tensor] = [torch.zeros(0)] * len(examples)
    for batch in _batches(system, examples, run, "log-probs"):
        with _scoring(system, run):
            scored = score_batch(system.model, batch)
        parts = scored.logp_S.cpu().split(torch.bincount(scored.row_S, minlength=scored.num_rows).tolist())
        for row, part in zip(batch.rows, parts, strict=True):
            found[row] = part
    _require_finite(found)
    if reduce == "tokens":
        return found
    return torch.stack(
        [part.sum() if reduce == "sum" else part.mean() for part in found] or [torch.zeros(())]
    )[: len(found)]


def _batches(system: CausalLM, examples: Sequence[Example], run: Run, label: str) -> Iterator[Batch]:
    plan = plan_batches([len(example.ids) for example in examples], run)
    for rows in run.ticker(plan, total=len(plan), label=label):
        yield collate([examples[row] for row in rows], pad_id(system), system.device, rows=rows)


@contextmanager
def _scoring(system: CausalLM, run: Run) -> Iterator[None]:
    """No gradient, no dropout, the run's precision."""
    with eval_mode(system.model), torch.no_grad(), autocast(run):
        yield


def _require_finite(found: Sequence[Tensor]) -> None:
    for row, part in enumerate(found):
        if not bool(torch.isfinite(part).all()):
            raise NumericsError(
                "A log-probability is not finite",
                where=f"row {row}",
                cure="Score in float32, or check the weights.",
            )


def reference_logprobs(system: CausalLM, examples: Sequence[Example], run: Run) -> Tensor:
    """`response_logprobs(..., reduce="sum")`, kept in the store's cache; shape (N,).

    A hit needs the same weights, template, rows, precision and batching.
    """
    import numpy as np

    cache = Cache("reference-logprobs")
    key = _reference_key(system, examples, run)
    hit = cache.get(key)
    if hit is not None:
        return torch.from_numpy(np.array(hit["logp_N"]))
    logp_N = response_logprobs(system, examples, run=run)
    cache.put(key, {"logp_N": logp_N.numpy()})
    return logp_N


def _reference_key(system: CausalLM, examples: Sequence[Example], run: Run) -> dict[str, str | int | bool]:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr((list(example.ids), [int(bool(flag)) for flag in example.scored])).encode())
    return {
        "what": "sum of scored log-probabilities",
        "system": system.fingerprint,
        "template": system.chat.sha256,
        "examples": digest.hexdigest(),
        "precision": run.precision,
        "exact": run.exact,
        "batch_tokens": run.batch_tokens,
        "device": torch.device(run.device).type,
        "dtype": str(next(system.model.parameters()).dtype),
    }


@overload
def next_token_logits(system: CausalLM, prompts_ids: Sequence[list[int]], run: Run) -> Tensor: ...
@overload
def next_token_logits(
    system: CausalLM,
    prompts_ids: Sequence[list[int]],
    run: Run,
    *,
    columns: Sequence[int],
    temperature: float = 1.0,
) -> NextToken: ...
def next_token_logits(
    system: CausalLM,
    prompts_ids: Sequence[list[int]],
    run: Run,
    *,
    columns: Sequence[int] | None = None,
    temperature: float = 1.0,
) -> Tensor | NextToken:
    """Logits of the first token after each prompt in float32, (N, V), in the prompts' order, on the CPU.

    With `columns`, only those ids' logits, the logsumexp over all ids and the best id, so memory is N x K; there
    logits are divided by `temperature`. A system's step rules are not applied. Raises DataError for an empty prompt.
    """
    for row, ids in enumerate(prompts_ids):
        if not ids:
            raise DataError("The prompt has no token", where=f"row {row}", cure="Give it some text.")
    examples = [Example(ids, [False] * len(ids)) for ids in prompts_ids]
    ids_K = (
        None if columns is None else torch.as_tensor(list(columns), dtype=torch.long, device=system.device)
    )
    logits: list[Tensor] = [torch.zeros(0)] * len(examples)
    totals, tops = torch.zeros(len(examples)), torch.zeros(len(examples), dtype=torch.long)
    for batch in _batches(system, examples, run, "first tokens"):
        last_BT = batch.mask_BT & ~batch.mask_BT.roll(-1, dims=1)
        last_BT[:, -1] = batch.mask_BT[:, -1]
        with _scoring(system, run):
            logits_BV = position_logits(system.model, batch, last_BT)
        if ids_K is not None:
            logits_BV = logits_BV / temperature
            totals[batch.rows], tops[batch.rows] = logits_BV.logsumexp(-1).cpu(), logits_BV.argmax(-1).cpu()
        kept = (logits_BV if ids_K is None else logits_BV[:, ids_K]).cpu()
        for row, values in zip(batch.rows, kept, strict=True):
            logits[row] = values
    stacked = torch.stack(logits) if logits else torch.zeros(0, 0 if columns is None else len(columns))
    return stacked if columns is None else NextToken(stacked, totals, tops)
