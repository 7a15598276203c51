"""Log-probabilities of the tokens that matter: those of replies, and of the first token after a prompt.

Same value whatever the padding, the batch or its order (1e-5 in float32; bit for bit in exact mode). What rows begin
with in common is computed once, and so is a position that several of them ask about.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn

from temper.core.errors import DataError, NumericsError
from temper.core.types import Run
from temper.ops.batching import Batch, Example, plan_batches
from temper.ops.families import families, score_families
from temper.ops.packed import can_pack
from temper.ops.prefix_tree import TreePass, reading, tree_passes
from temper.ops.projection import (
    CHUNK_LOGITS,
    gather_logprobs,
    head_is_plain,
    head_of,
    selected_logits,
    token_logprobs,
    wanted_hidden,
)
from temper.store.cache import Cache
from temper.systems.freed_memory import all_memory_kept

if TYPE_CHECKING:
    from temper.systems.causal_lm import CausalLM

__all__ = [
    "NextToken",
    "Scored",
    "mean_by_row",
    "next_token_logits",
    "position_logit_chunks",
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


def position_logit_chunks(model: nn.Module, batch: Batch, at_BT: Tensor) -> Iterator[Tensor]:
    """`position_logits` in order, a chunk of positions at a time where the head allows it."""
    return _logit_chunks(model, _inputs(batch), at_BT)


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
    ids = [example.ids for example in examples]
    # The token at t is predicted at t - 1.
    at = [[t - 1 for t, scored in enumerate(example.scored) if scored] for example in examples]
    found: list[Tensor] = [torch.zeros(0)] * len(examples)
    with reading(system, run, sum(map(len, ids)), sum(map(len, at))):
        for one in tree_passes(system, ids, at, run, "log-probs"):
            target_S = torch.tensor([ids[row][t + 1] for row in one.rows for t in at[row]])
            logp_S = _target_logprobs(system.model, one, target_S)
            parts = logp_S.split([len(at[row]) for row in one.rows])
            for row, part in zip(one.rows, parts, strict=True):
                found[row] = part
    _require_finite(found)
    if reduce == "tokens":
        return found
    return torch.stack(
        [part.sum() if reduce == "sum" else part.mean() for part in found] or [torch.zeros(())]
    )[: len(found)]


def _target_logprobs(model: nn.Module, one: TreePass, target_S: Tensor) -> Tensor:
    """Log-probability of a token after each of the pass's wanted positions, row by row, float32, on the CPU."""
    node_S, start = torch.cat(one.node_S), 0
    logp_S = torch.zeros(len(node_S))
    for logits_CV in _logit_chunks(model, one.inputs, one.at_BT):
        here_S = (node_S >= start) & (node_S < start + len(logits_CV))
        node_S1, target_S1 = (node_S[here_S] - start)[:, None], target_S[here_S][:, None]
        row = torch.cat([node_S1, target_S1], 1).to(logits_CV.device)
        logp_S[here_S] = (logits_CV[row[:, 0], row[:, 1]] - logits_CV.logsumexp(-1)[row[:, 0]]).cpu()
        start += len(logits_CV)
    return logp_S


def _logit_chunks(model: nn.Module, inputs: dict[str, Tensor], at_BT: Tensor) -> Iterator[Tensor]:
    """The logits at the chosen positions in float32, in order, a chunk at a time where the head allows it."""
    if not head_is_plain(model):
        yield selected_logits(model, inputs, at_BT).float()
        return
    hidden_SD, num_ids = wanted_hidden(model, inputs, at_BT)
    for hidden_CD in hidden_SD.split(max(1, CHUNK_LOGITS // num_ids)):
        yield head_of(model)(hidden_CD).float()


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
    logp_N = (_line_logprobs if _reads_lines(system, run) else response_logprobs)(system, examples, run=run)
    cache.put(key, {"logp_N": logp_N.numpy()})
    return logp_N


def _reads_lines(system: CausalLM, run: Run) -> bool:
    """In bf16 on a CPU, as training reads the same rows; a tree's many small passes cast every weight in each."""
    fast = run.precision == "bf16" and not run.exact and torch.device(system.device).type == "cpu"
    return fast and can_pack(system.model) and head_is_plain(system.model)


def _line_logprobs(system: CausalLM, examples: Sequence[Example], *, run: Run) -> Tensor:
    """`response_logprobs` summed, for a model that packs: few large passes without padding, beginnings read once."""
    _require_scored([sum(example.scored) for example in examples], range(len(examples)))
    logp_N, found = torch.zeros(len(examples)), families(examples, run.batch_tokens)
    batches = plan_batches([family.num_tokens for family in found], run, packed=True)
    with reading(system, run, 0, 0), all_memory_kept():
        for batch in run.ticker(batches, total=len(batches), label="log-probs"):
            logp_S, row_S = score_families(system.model, [found[index] for index in batch])
            logp_N.index_add_(0, row_S.cpu(), logp_S.cpu())
    _require_finite(list(logp_N))
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
    ids_K = (
        None if columns is None else torch.as_tensor(list(columns), dtype=torch.long, device=system.device)
    )
    num = len(prompts_ids)
    out, totals, tops = torch.zeros(num, len(columns or ())), torch.zeros(num), torch.zeros(num).long()
    with reading(system, run, sum(map(len, prompts_ids)), num):
        for one in tree_passes(
            system, prompts_ids, [[len(ids) - 1] for ids in prompts_ids], run, "first tokens"
        ):
            node_B, rows_B, start = torch.cat(one.node_S), torch.tensor(one.rows), 0
            for logits_CV in _logit_chunks(system.model, one.inputs, one.at_BT):
                here_B = (node_B >= start) & (node_B < start + len(logits_CV))
                at_N, node_N = rows_B[here_B], node_B[here_B] - start
                if ids_K is not None:
                    logits_CV = logits_CV / temperature
                    totals[at_N] = logits_CV.logsumexp(-1).cpu()[node_N]
                    tops[at_N] = logits_CV.argmax(-1).cpu()[node_N]
                kept_CK = (logits_CV if ids_K is None else logits_CV[:, ids_K]).cpu()
                if not out.shape[1]:  # the vocabulary's size is known now
                    out = kept_CK.new_empty(num, kept_CK.shape[1])
                out[at_N] = kept_CK[node_N]
                start += len(logits_CV)
    return out if columns is None else NextToken(out, totals, tops)
