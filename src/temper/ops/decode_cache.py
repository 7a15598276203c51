"""Preallocated key and value buffers in which rows of different lengths decode together.

Row b of the batch lives in slot b of every layer's buffer, its text at columns 0, 1, 2...; so a
column is a position, whatever the other rows do. A pass writes its columns in place; rows
leave by moving the last row into their slot; buffers grow in strides. On a CPU a buffer takes up
memory only where rows have tokens, and a step attends few rows at a time, to no more columns than
the longest of them has: prompts come longest first, so neighbours have similar lengths.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

__all__ = ["SlotCache", "attend_by_spans"]

STRIDE = 64
"""Columns added beyond what is needed when buffers grow."""
SPAN_ROWS = 8
"""Rows that attend together on a CPU."""
BY_SPANS = "temper_spans"
"""The name that models know this attention by."""
_SPANS: ContextVar[list[tuple[int, int, int]]] = ContextVar("spans")


class _Plan:
    """What every layer must know about the step under way."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.capacity = 0
        self.num_rows = 0
        self.key_len = 0
        self.slot_B1 = self.position_BT = torch.zeros(0, 1, dtype=torch.long)
        self.flat: dict[int, Tensor] = {}
        self.lengths: dict[int, int] = {}
        """Columns that hold a row's tokens, by slot."""

    def flat_of(self, heads: int) -> Tensor:
        """Where each row's new columns stand, a head after another, in a buffer seen as rows of one head's size."""
        if heads not in self.flat:
            head_H = torch.arange(heads, device=self.slot_B1.device)
            first_BH = (self.slot_B1 * heads + head_H) * self.capacity
            self.flat[heads] = (first_BH[:, :, None] + self.position_BT[:, None]).flatten()
        return self.flat[heads]


class _SlotLayer(CacheLayerMixin):
    """One layer's buffers, shape (width, key heads, capacity, head size)."""

    is_sliding = False
    keys: Any
    values: Any

    def __init__(self, plan: _Plan) -> None:
        super().__init__()
        self.plan = plan

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Buffers like the given (B, heads, T, size) states; zeros, for junk times weight 0 must be 0."""
        self.keys = self._buffer(key_states)
        self.values = self._buffer(value_states)
        self.is_initialized = True

    def _buffer(self, like_BHTD: Tensor) -> Tensor:
        _, heads, _, size = like_BHTD.shape
        shape = (self.plan.width, heads, self.plan.capacity, size)
        if like_BHTD.device.type != "cpu":
            return like_BHTD.new_zeros(shape)
        # Fresh pages are zeros already and take up no memory until they are written.
        num_bytes = math.prod(shape) * like_BHTD.element_size()
        pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return torch.frombuffer(pages, dtype=like_BHTD.dtype).view(shape)

    def grow(self) -> None:
        if not self.is_initialized:
            return
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = self._buffer(old)
            by_slot = old.device.type == "cpu"
            for slot, length in self.plan.lengths.items() if by_slot else [(slice(None), old.shape[2])]:
                new[slot, :, :length] = old[slot, :, :length]
            setattr(self, name, new)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the columns of a row's tokens and give back all columns seen so far, (B, heads, K, size)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self._write(self.keys, key_states), self._write(self.values, value_states)

    def _write(self, buffer: Any, states_BHTD: Tensor) -> Tensor:
        size = buffer.shape[-1]
        own = states_BHTD.reshape(-1, size).to(buffer.dtype)
        buffer.view(-1, size).index_copy_(0, self.plan.flat_of(buffer.shape[1]), own)
        return buffer[: self.plan.num_rows, :, : self.plan.key_len]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.plan.key_len, 0

    def get_seq_length(self) -> int:
        return max(self.plan.key_len - 1, 0)

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1


class SlotCache(Cache):
    """Key and value buffers for up to `width` rows; give it to a model's forward as past_key_values."""

    def __init__(self, num_layers: int, width: int) -> None:
        self.plan = _Plan(width)
        self.slots = [_SlotLayer(self.plan) for _ in range(num_layers)]
        super().__init__(layers=list(self.slots))

    def load(self, slot: int, keys_L: list[Tensor], values_L: list[Tensor]) -> None:
        """Put a row's prefilled states, (heads, T, size) a layer, into a slot from column 0."""
        self.reserve(keys_L[0].shape[1] + 1)
        self.plan.lengths[slot] = keys_L[0].shape[1]
        for layer, keys_HTD, values_HTD in zip(self.slots, keys_L, values_L, strict=True):
            if not layer.is_initialized:
                layer.lazy_initialization(keys_HTD[None], values_HTD[None])
            layer.keys[slot, :, : keys_HTD.shape[1]] = keys_HTD
            layer.values[slot, :, : values_HTD.shape[1]] = values_HTD

    def reserve(self, length: int) -> None:
        """Make room for rows of `length` tokens."""
        if length > self.plan.capacity:
            self.plan.capacity = length + max(STRIDE, length // 8)
            for layer in self.slots:
                layer.grow()

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` columns of one slot over another."""
        self.plan.lengths[target] = length
        for layer in self.slots:
            layer.keys[target, :, :length] = layer.keys[source, :, :length]
            layer.values[target, :, :length] = layer.values[source, :, :length]

    def begin_pass(self, position_BT: list[list[int]], device: torch.device) -> Tensor:
        """Say where the next forward pass writes: token t of row b at position_BT[b][t]; gives that as a tensor."""
        plan = self.plan
        plan.num_rows, plan.key_len = len(position_BT), max(map(max, position_BT)) + 1
        self.reserve(plan.key_len)
        plan.lengths |= {slot: max(position_T) + 1 for slot, position_T in enumerate(position_BT)}
        plan.slot_B1 = torch.arange(len(position_BT), device=device)[:, None]
        plan.position_BT = torch.tensor(position_BT, device=device)
        plan.flat = {}
        return plan.position_BT


@contextmanager
def attend_by_spans(model: Any, position_B: Sequence[int]) -> Iterator[None]:
    """Inside the block a step that writes row b at position_B[b] reads few columns beyond; sdpa on a CPU only."""
    config = model.config.get_text_config()
    if config._attn_implementation != "sdpa" or model.device.type != "cpu":
        yield
        return
    starts = range(0, len(position_B), SPAN_ROWS)
    token = _SPANS.set([(n, n + SPAN_ROWS, max(position_B[n : n + SPAN_ROWS]) + 1) for n in starts])
    config._attn_implementation = BY_SPANS
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"
        _SPANS.reset(token)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any
) -> tuple[Tensor, None]:
    """What transformers' own `sdpa` gives, (B, 1, H, size), a span of rows at a time."""
    whole = ALL_ATTENTION_FUNCTIONS["sdpa"]
    parts = []
    if attention_mask is not None:
        attention_mask = attention_mask.expand(len(query), -1, -1, -1)
    for start, stop, num_keys in _SPANS.get():
        rows = slice(start, stop)
        mask = None if attention_mask is None else attention_mask[rows, ..., :num_keys]
        keys, values = key[rows, :, :num_keys], value[rows, :, :num_keys]
        parts.append(whole(module, query[rows], keys, values, mask, **more)[0])
    return torch.cat(parts), None


AttentionInterface.register(BY_SPANS, _attend)
AttentionMaskInterface.register(BY_SPANS, sdpa_mask)
