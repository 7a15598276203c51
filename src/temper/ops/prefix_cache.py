"""Keys and values of a text that many rows begin with: read by any number of forward passes, changed by none.

transformers' own caches grow with every forward pass that is given one. Here a pass sees the prefix in front of its
own tokens and leaves it as it was, so one prefix serves every batch, and a shorter one is a view of it.

Inside `read_once` attention multiplies all rows' queries with the one prefix, and no key is repeated for a row or a
query head; elsewhere every layer in turn joins a copy of the prefix to each row. There, too, rows that leave the
prefix at different places can stand behind one another as a single row (`Packed`): everything but attention sees
their tokens alone, with no padding.

Here W counts a packed row's own tokens at most, S the tokens of all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import sdpa_mask

from temper.core.errors import NeedsError

__all__ = ["Packed", "PrefixCache", "packed", "read_once"]

READ_ONCE = "temper_prefix"
"""The name that models know this attention by."""


class Packed(NamedTuple):
    """Where packed tokens stand when each row has a line of its own, ends aligned, and what each may see there."""

    token_BW: Tensor
    """The packed token of each place; any where a row has none."""
    place_S: Tensor
    """The place of each packed token, counted line by line."""
    seen_B1WK: Tensor
    """Over the prefix and then the line."""
    position_S: Tensor
    """Positions in the whole text."""


def packed(starts: Sequence[int], end: int, device: torch.device) -> Packed:
    """Rows that read a prefix up to their start and hold the positions from there to `end` themselves.

    The prefix is that of the last start.
    """
    start_B = torch.tensor(starts, device=device)
    least, most = min(starts), max(starts)
    place_W = torch.arange(least, end, device=device)
    own_BW = place_W >= start_B[:, None]
    token_BW = (own_BW.flatten().cumsum(0) - 1).clamp_min(0).view(own_BW.shape)
    prefix_BK = torch.arange(most, device=device) < start_B[:, None]
    before_BWK = prefix_BK[:, None].expand(-1, len(place_W), -1)
    causal_BWW = (place_W <= place_W[:, None]) & own_BW[:, None]
    seen = torch.cat([before_BWK, causal_BWW], dim=-1)[:, None]
    position_S = place_W.expand(len(starts), -1)[own_BW]
    return Packed(token_BW, own_BW.flatten().nonzero()[:, 0], seen, position_S)


_READ: ContextVar[tuple[PrefixCache, Packed | None]] = ContextVar("read")


class _PrefixLayer(CacheLayerMixin):
    """One layer's prefix, (1, key heads, T, size), or None before anything was read."""

    is_sliding = False
    keys: Any
    values: Any

    def __init__(self, keys: Tensor | None, values: Tensor | None) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.is_initialized = True
        self.records = self.apart = False
        self.seen: tuple[Tensor | None, Tensor | None] = (None, None)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the prefix is there from the start."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Prefix and own states together, or inside `read_once` the own alone; the prefix stays as it is."""
        if self.apart:
            return key_states, value_states
        keys, values = self._behind(self.keys, key_states), self._behind(self.values, value_states)
        if self.records:
            self.seen = keys.detach(), values.detach()
        return keys, values

    def _behind(self, prefix: Tensor | None, own: Tensor) -> Tensor:
        if prefix is None:
            return own
        return torch.cat([prefix.expand(len(own), -1, -1, -1).to(own.dtype), own], dim=-2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return 0 if self.keys is None else int(self.keys.shape[-2])

    def get_max_length(self) -> int:
        return -1


class PrefixCache(Cache):
    """Give it to a model's forward as `past_key_values`; rows of any number then continue the prefix."""

    def __init__(self, layers: Sequence[tuple[Tensor | None, Tensor | None]]) -> None:
        self.prefix = [_PrefixLayer(keys, values) for keys, values in layers]
        super().__init__(layers=list(self.prefix))

    @classmethod
    def empty(cls, model: Any) -> PrefixCache:
        """The prefix of no tokens."""
        return cls([(None, None)] * model.config.get_text_config().num_hidden_layers)

    @property
    def num_tokens(self) -> int:
        """Length of the prefix."""
        return self.prefix[0].get_seq_length()

    def first(self, num_tokens: int) -> PrefixCache:
        """The first `num_tokens` of the prefix, sharing its memory."""
        if num_tokens == 0:
            return PrefixCache([(None, None)] * len(self.prefix))
        return PrefixCache([_first(layer.keys, layer.values, num_tokens) for layer in self.prefix])

    def recorder(self) -> PrefixCache:
        """The same prefix, for one pass of one row: it keeps what the pass saw for `recorded`."""
        own = self.first(self.num_tokens)
        for layer in own.prefix:
            layer.records = True
        return own

    def recorded(self) -> PrefixCache:
        """The prefix with the pass's own tokens behind it. Raises NeedsError where the model ignored the cache."""
        if self.prefix[0].seen[0] is None:
            raise NeedsError(
                "The model reads no keys and values it is given", cure="Run it over whole texts."
            )
        return PrefixCache([layer.seen for layer in self.prefix])

    @torch.no_grad()
    def extended(self, model: Any, ids: Sequence[int]) -> PrefixCache:
        """The prefix with `ids` behind it; costs a forward pass over them, without the vocabulary projection.

        Raises NeedsError for a model that ignores the cache.
        """
        if not ids:
            return self
        device = model.get_input_embeddings().weight.device
        own = self.recorder()
        model(input_ids=torch.tensor([list(ids)], device=device), past_key_values=own, logits_to_keep=1)
        return own.recorded()


def _first(
    keys: Tensor | None, values: Tensor | None, num_tokens: int
) -> tuple[Tensor | None, Tensor | None]:
    if keys is None or values is None:  # a layer that a shortened model never reaches
        return None, None
    return keys[..., :num_tokens, :], values[..., :num_tokens, :]


@contextmanager
def read_once(model: Any, cache: PrefixCache, rows: Packed | None = None) -> Iterator[None]:
    """Inside the block a pass of `model` over `cache` repeats no key of it; without gradient.

    With `rows` the pass gets their tokens as one row, and must be given their positions and any mask of four
    dimensions, which is not looked at: for models whose every layer sees the whole text (`cache_by_position`).
    A change for models that attend by `sdpa` through transformers' interface; one that does so in its own way raises
    there. Nothing changes for other attention, or where the prefix is empty.
    """
    config = model.config.get_text_config()
    if config._attn_implementation != "sdpa" or not cache.num_tokens:
        yield
        return
    token = _READ.set((cache, rows))
    config._attn_implementation = READ_ONCE
    for layer in cache.prefix:
        layer.apart = True
    try:
        yield
    finally:
        for layer in cache.prefix:
            layer.apart = False
        config._attn_implementation = "sdpa"
        _READ.reset(token)


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """softmax(q [prefix keys, own keys]^T scaling + mask) [prefix values, own values], (B, T, H, width).

    All heads' and rows' queries of a key head meet its prefix in one product: (key heads, group x B x T, width).
    """
    if any(more.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        raise RuntimeError("this attention is more than a softmax of products")
    cache, rows = _READ.get()
    layer = cache.prefix[module.layer_idx]
    states = (query, key, value)
    if rows is None:
        query, key, value = (state.transpose(0, 1) for state in states)
    else:
        query, key, value = (state[0][:, rows.token_BW] for state in states)
        attention_mask = rows.seen_B1WK
    heads, width = len(key), query.shape[-1]
    query = (query * (width**-0.5 if scaling is None else scaling)).unflatten(0, (heads, -1))
    before = query.reshape(heads, -1, width) @ layer.keys[0].to(query.dtype).mT
    scores = torch.cat([before.view(*query.shape[:-1], -1), query @ key[:, None].mT], dim=-1)
    if attention_mask is not None:
        scores.masked_fill_(~attention_mask[:, 0], torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    first = before.shape[-1]
    out = weights[..., first:] @ value[:, None]
    out += (weights[..., :first].reshape(heads, -1, first) @ layer.values[0].to(value.dtype)).view(out.shape)
    out = out.flatten(0, 1)  # (H, B, T, width): a head is (key head, its place in the group)
    if rows is None:
        return out.permute(1, 2, 0, 3), None
    return out.flatten(1, 2)[:, rows.place_S].transpose(0, 1)[None], None


AttentionInterface.register(READ_ONCE, _attend)
AttentionMaskInterface.register(READ_ONCE, sdpa_mask)
