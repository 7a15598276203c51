"""What a chat rendered lately, found by its ids: hooks inside a model see ids, and ask here where the user spoke."""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Sequence
from hashlib import blake2b
from typing import Generic, NamedTuple, TypeVar

__all__ = ["LIMIT", "Recent", "Seen"]

S = TypeVar("S")

LIMIT = 65_536
"""Conversations remembered; the oldest goes first."""


class Seen(NamedTuple, Generic[S]):
    """How many leading ids were rendered, and the spans of the messages in them."""

    num_tokens: int
    spans: tuple[S, ...]


class Recent(Generic[S]):
    """Spans of the last `limit` conversations by a hash of their ids; ids themselves are not kept."""

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit = limit
        self._known: OrderedDict[bytes, Seen[S]] = OrderedDict()
        self._lengths: Counter[int] = Counter()

    def add(self, ids: Sequence[int], spans: tuple[S, ...]) -> None:
        """Remember a conversation; one seen before becomes the newest."""
        key = _key(ids)
        if key not in self._known:
            self._lengths[len(ids)] += 1
        self._known[key] = Seen(len(ids), spans)
        self._known.move_to_end(key)
        while len(self._known) > self.limit:
            _, gone = self._known.popitem(last=False)
            self._lengths[gone.num_tokens] -= 1

    def find(self, ids: Sequence[int]) -> Seen[S] | None:
        """The longest remembered conversation that `ids` are or begin with."""
        for length in sorted(
            (n for n, count in self._lengths.items() if count and n <= len(ids)), reverse=True
        ):
            seen = self._known.get(_key(ids[:length]))
            if seen is not None:
                return seen
        return None


def _key(ids: Sequence[int]) -> bytes:
    return blake2b(array("q", ids).tobytes(), digest_size=16).digest()
