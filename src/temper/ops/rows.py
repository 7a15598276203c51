"""Which rows a forward pass works on, published by the generation engine for whoever hooks into the model.

A hook sees tensors, not prompts. The engine therefore says, before every forward pass, which prompts
the rows of the batch belong to and where in their texts the rows stand; `current_rows()` reads it
from inside a hook, a steering function or a bias provider. Outside the engine it is None.

Columns of hidden states and of keys are real positions of the text: the engine pads on the right.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

__all__ = ["Rows", "current_rows", "publish_rows"]


class Rows(NamedTuple):
    """The rows of one forward pass, in batch order.

    index_B        which of the prompts given to `generate` each row answers
    prompt_ids_B   their prompts
    start_B        position in its text of each row's first query token
    length_B       number of real query tokens of each row; later columns are padding
    key_len        number of key columns the attention sees; column k is position k of the text
    """

    index_B: list[int]
    prompt_ids_B: list[list[int]]
    start_B: list[int]
    length_B: list[int]
    key_len: int


_CURRENT: ContextVar[Rows | None] = ContextVar("temper_rows", default=None)


def current_rows() -> Rows | None:
    """The rows of the forward pass under way, or None outside the generation engine."""
    return _CURRENT.get()


@contextmanager
def publish_rows(rows: Rows) -> Iterator[None]:
    """Make `rows` what `current_rows()` answers inside the block."""
    token = _CURRENT.set(rows)
    try:
        yield
    finally:
        _CURRENT.reset(token)
