"""Choosing the next token: greedy, or a seeded draw with temperature, top-k and top-p, all rows at once.

A row draws from uniforms of its own, fixed before it starts, by inverting the cumulative
distribution; so what it draws does not depend on the rows beside it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from temper.systems.base import Sampling

__all__ = ["choose_tokens", "keep_top", "row_uniforms"]

NUCLEUS_GUESS = 256
"""Candidates looked at before the whole vocabulary is sorted for top-p."""


def row_uniforms(seed: int, index: int, sample: int, count: int) -> Tensor:
    """`count` uniforms in [0, 1), float64; a function of seed, prompt index and sample number alone."""
    bits = np.random.SeedSequence([seed % 2**64, index, sample])
    return torch.from_numpy(np.random.Generator(np.random.PCG64(bits)).random(count))


def choose_tokens(logits_BV: Tensor, sampling: Sampling, uniform_B: Tensor | None) -> Tensor:
    """One token id a row, shape (B,); greedy takes the lowest id among equal logits."""
    if sampling.temperature == 0 or uniform_B is None:
        return logits_BV.argmax(dim=-1)
    scaled_BV = logits_BV.float() / sampling.temperature
    if sampling.top_k == 0 and sampling.top_p >= 1.0:
        return _invert(torch.softmax(scaled_BV, dim=-1), uniform_B)
    probs_BK, ids_BK = keep_top(scaled_BV, sampling.top_k, sampling.top_p)
    return ids_BK.gather(1, _invert(probs_BK, uniform_B)[:, None])[:, 0]


def keep_top(logits_BV: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """Probabilities (descending, dropped ones 0, not renormalised) and their ids, both (B, K).

    Keeps the `top_k` most likely tokens (0: all), then of those, renormalised, the fewest whose
    probabilities reach `top_p`; at least one.
    """
    size = logits_BV.shape[-1]
    if 0 < top_k < size:
        kept_BK, ids_BK = logits_BV.topk(top_k, dim=-1)
        return _nucleus(torch.softmax(kept_BK, dim=-1), top_p), ids_BK
    probs_BV = torch.softmax(logits_BV, dim=-1)
    if size > NUCLEUS_GUESS:
        # Sorting a whole vocabulary costs more than a small model's forward pass; the nucleus is
        # nearly always among a few hundred tokens.
        guess_BK, ids_BK = probs_BV.topk(NUCLEUS_GUESS, dim=-1)
        if bool((guess_BK.sum(-1) >= top_p).all()):
            return _nucleus(guess_BK, top_p), ids_BK
    sorted_BV, ids_BV = probs_BV.sort(dim=-1, descending=True, stable=True)
    return _nucleus(sorted_BV, top_p), ids_BV


def _nucleus(probs_BK: Tensor, top_p: float) -> Tensor:
    if top_p >= 1.0:
        return probs_BK
    before_BK = probs_BK.cumsum(-1) - probs_BK
    keep_BK = before_BK < top_p
    keep_BK[:, 0] = True
    return probs_BK * keep_BK


def _invert(probs_BK: Tensor, uniform_B: Tensor) -> Tensor:
    """The first column whose cumulative probability exceeds the uniform share of the row's total."""
    total_BK = probs_BK.double().cumsum(-1)
    target_B1 = uniform_B.to(total_BK.device)[:, None] * total_BK[:, -1:]
    found_B = torch.searchsorted(total_BK, target_B1, right=True)[:, 0]
    # u can round up to the whole total: the last column with any probability is meant then.
    last_B = probs_BK.shape[-1] - 1 - (probs_BK.flip(-1) > 0).int().argmax(-1)
    return torch.minimum(found_B, last_B)
