"""Vectors of texts: token states of an encoder, pooled, projected and normalised as its layout says.

On a CPU rows stand one behind another, so that no padding is computed; elsewhere, and for architectures that need
whole batches, rows of like length are padded together.

Shape letters: S tokens of all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from temper.core.errors import NumericsError
from temper.core.types import Run
from temper.ops.batching import plan_batches
from temper.ops.bf16_modules import bf16_modules
from temper.ops.precision import autocast, eval_mode

if TYPE_CHECKING:
    from temper.systems.encoder import Encoder

__all__ = ["embed", "pool", "row_batches", "vectors"]

PACK = 1024
"""Tokens of one pass over rows without padding: more fall out of a core's cache and are no faster."""


def embed(system: Encoder, texts: Sequence[str], run: Run, *, prompt: str = "") -> Tensor:
    """One vector a text, float32 (N, D) on the CPU, without gradient; in order, whatever batch a text stood in.

    In exact mode every text runs alone. `prompt` names one of the system's prompts. With `run.precision` "bf16" the
    layers work in bfloat16 throughout, pooling and all after it in float32. Raises NumericsError for a vector that is
    not finite, DataError for a text without tokens, NeedsError for a system that cannot embed.
    """
    system.require("embed")
    rows = system.ids(texts, prompt)
    out_ND = torch.zeros(len(rows), system.width)
    with eval_mode(system.model), _fast(system, run), torch.inference_mode():
        batches = row_batches(system, [len(row) for row in rows], run)
        for places in run.ticker(batches, total=len(batches), label="embed"):
            out_ND[places] = vectors(system, [rows[place] for place in places]).to(out_ND)
    bad = (~torch.isfinite(out_ND).all(1)).nonzero()
    if len(bad):
        raise NumericsError(
            "The vector is not finite",
            where=f"text {int(bad[0])}",
            cure="Embed in float32, or check the weights.",
        )
    return out_ND


def _fast(system: Encoder, run: Run) -> AbstractContextManager[object]:
    """Where a CPU computes bfloat16 natively the modules themselves do; elsewhere autocast."""
    if run.precision == "bf16" and not run.exact and system.device.type == "cpu":
        return bf16_modules(system.model)
    return autocast(run)


def row_batches(system: Encoder, lengths: Sequence[int], run: Run) -> list[list[int]]:
    """Places of rows in batches within the run's token budget, longest first; in exact mode one a batch."""
    if run.exact or not system.takes_rows:
        return plan_batches(lengths, run)
    batches: list[list[int]] = []
    room, budget = 0, min(run.batch_tokens, PACK)
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        if lengths[place] > room or not batches:
            batches.append([])
            room = budget
        batches[-1].append(place)
        room -= lengths[place]
    return batches


def vectors(system: Encoder, rows: Sequence[Sequence[int]]) -> Tensor:
    """One vector a row of ids, float32 (float64 for float64), (B, D), with gradient; the caller chooses precision and modes."""
    # Rows of equal length must be neighbours to share one attention call.
    order = sorted(range(len(rows)), key=lambda place: -len(rows[place]))
    ordered = [rows[place] for place in order]
    lengths = torch.tensor([len(row) for row in ordered], device=system.device)
    hidden_SD = (_in_a_row if system.takes_rows else _padded)(system, ordered)
    with torch.autocast(system.device.type, enabled=False):
        wide = torch.promote_types(hidden_SD.dtype, torch.float32)
        out_BD = pool(hidden_SD.to(wide), lengths, system.layout.pooling)
        dense = iter(getattr(system.model, "sentence_head", ()))
        for step in system.layout.steps:
            out_BD = next(dense)(out_BD).to(wide) if step == "dense" else nn.functional.normalize(out_BD)
    return out_BD[torch.tensor(order, device=system.device).argsort()]


def _in_a_row(system: Encoder, rows: Sequence[Sequence[int]]) -> Tensor:
    """States of all tokens (S, D), the rows run one behind another."""
    first = system.first_position
    ids_1S = torch.tensor([list(chain.from_iterable(rows))])
    at_1S = torch.tensor([[first + place for row in rows for place in range(len(row))]])
    lengths = [len(row) for row in rows]
    out = system.model(input_ids=ids_1S, position_ids=at_1S, row_lengths=lengths)
    return out.last_hidden_state[0]


def _padded(system: Encoder, rows: Sequence[Sequence[int]]) -> Tensor:
    """States of the real tokens (S, D), the rows run as one padded batch."""
    longest = max(len(row) for row in rows)
    ids_BT = torch.tensor([[*row, *[system.pad_id] * (longest - len(row))] for row in rows])
    mask_BT = torch.tensor([[place < len(row) for place in range(longest)] for row in rows])
    ids_BT, mask_BT = ids_BT.to(system.device), mask_BT.to(system.device)
    hidden_BTD = system.model(input_ids=ids_BT, attention_mask=mask_BT.long()).last_hidden_state
    return hidden_BTD[mask_BT]


def pool(hidden_SD: Tensor, lengths_B: Tensor, modes: Sequence[str]) -> Tensor:
    """Rows of token states that stand one behind another, each made one vector; several modes side by side."""
    return torch.cat([POOLS[mode](hidden_SD, lengths_B) for mode in modes], dim=-1)


def _reduced(hidden_SD: Tensor, lengths_B: Tensor, how: str) -> Tensor:
    return torch.segment_reduce(hidden_SD, how, lengths=lengths_B)


def _weighted_mean(hidden_SD: Tensor, lengths_B: Tensor) -> Tensor:
    """The mean with weights 1, 2, 3, ... along a row."""
    starts_B = lengths_B.cumsum(0) - lengths_B
    weight_S = torch.arange(1, len(hidden_SD) + 1, device=lengths_B.device) - starts_B.repeat_interleave(
        lengths_B
    )
    total_B = lengths_B * (lengths_B + 1) / 2
    return _reduced(hidden_SD * weight_S[:, None], lengths_B, "sum") / total_B[:, None]


POOLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cls": lambda hidden_SD, lengths_B: hidden_SD[lengths_B.cumsum(0) - lengths_B],
    "lasttoken": lambda hidden_SD, lengths_B: hidden_SD[lengths_B.cumsum(0) - 1],
    "max": lambda hidden_SD, lengths_B: _reduced(hidden_SD, lengths_B, "max"),
    "mean": lambda hidden_SD, lengths_B: _reduced(hidden_SD, lengths_B, "mean"),
    "mean_sqrt_len_tokens": lambda hidden_SD, lengths_B: (
        _reduced(hidden_SD, lengths_B, "sum") / lengths_B[:, None].sqrt()
    ),
    "weightedmean": _weighted_mean,
}
"""How a row's states become one vector."""
