"""Keys and values of a text that many rows begin with: read by any number of forward passes, changed by none.

transformers' own caches grow with every forward pass that is given one. Here a pass sees the prefix in front of its
own tokens and leaves it as it was, so one prefix serves every batch, and a shorter one is a view of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from temper.core.errors import NeedsError

__all__ = ["PrefixCache"]


class _PrefixLayer(CacheLayerMixin):
    """One layer's prefix, (1, key heads, T, size), or None before anything was read."""

    is_sliding = False
    keys: Any
    values: Any

    def __init__(self, keys: Tensor | None, values: Tensor | None) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.is_initialized = True
        self.seen: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the prefix is there from the start."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Prefix and own states together; the prefix stays as it is, what was seen is kept for `extended`."""
        self.seen = self._behind(self.keys, key_states), self._behind(self.values, value_states)
        return self.seen

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

    @torch.no_grad()
    def extended(self, model: Any, ids: Sequence[int]) -> PrefixCache:
        """The prefix with `ids` behind it; costs a forward pass over them, without the vocabulary projection.

        Raises NeedsError for a model that ignores the cache.
        """
        if not ids:
            return self
        device = model.get_input_embeddings().weight.device
        # Cropped to itself: what the pass leaves behind goes with the copy.
        own = self.first(self.num_tokens)
        model(input_ids=torch.tensor([list(ids)], device=device), past_key_values=own, logits_to_keep=1)
        if own.prefix[0].seen is None:
            raise NeedsError(
                f"{type(model).__name__} reads no keys and values it is given",
                cure="Run it over whole texts.",
            )
        return PrefixCache([layer.seen or (None, None) for layer in own.prefix])


def _first(
    keys: Tensor | None, values: Tensor | None, num_tokens: int
) -> tuple[Tensor | None, Tensor | None]:
    if keys is None or values is None:  # a layer that a shortened model never reaches
        return None, None
    return keys[..., :num_tokens, :], values[..., :num_tokens, :]
