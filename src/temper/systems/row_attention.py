"""Attention over rows that stand one behind another in a single sequence, without padding and without a mask.

Registered with transformers under the name `ROWS`. A model that runs it takes one sequence of S tokens, position
ids that begin anew in every row, and `row_lengths`; called without `row_lengths` it runs sdpa as always.

Shape letters: S tokens of all rows, H heads, G rows of equal length.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ROWS", "TYPES", "row_attention", "use_rows"]

ROWS = "temper_rows"
TYPES = frozenset({"bert", "camembert", "distilbert", "electra", "roberta", "xlm-roberta"})
"""Architectures whose attention sees whole rows and knows places by position ids alone."""


def use_rows(model: Any) -> bool:
    """Let the model run this attention, where its architecture allows it; says whether it does."""
    if model.config.model_type not in TYPES or getattr(model.config, "is_decoder", False):
        return False
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ROWS, row_attention)
    AttentionMaskInterface.register(ROWS, sdpa_mask)
    model.set_attn_implementation(ROWS)
    return True


def row_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    row_lengths: Sequence[int] | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Each row attends to itself: query, key and value (1, H, S, d) give (1, S, H, d). Neighbours of equal length run together."""
    if row_lengths is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **rest
        )
    groups = [(length, sum(1 for _ in group)) for length, group in groupby(row_lengths)]
    # One split each: the backward pass of slices would fill a whole tensor of zeros for every group.
    parts = zip(
        *(t[0].split([length * count for length, count in groups], dim=1) for t in (query, key, value)),
        strict=True,
    )
    out = []
    for (length, count), part in zip(groups, parts, strict=True):
        q, k, v = (t.unflatten(1, (count, length)).transpose(0, 1) for t in part)
        seen_GHTd = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling)
        out.append(seen_GHTd.transpose(1, 2).flatten(0, 1))
    return torch.cat(out)[None], None
