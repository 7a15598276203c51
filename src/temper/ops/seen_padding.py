"""Where the real tokens of a forward pass are, seen from inside it.

Hidden states say nothing of padding. The decoder stack (the module that owns the layers) is told:
by its attention mask, by the engine's published rows, or by having none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from temper.core.errors import ModelError
from temper.ops.rows import Rows, current_rows
from temper.systems import anchors

__all__ = ["Pass", "decoder_stack", "past_length", "watch_padding"]


class Pass:
    """The forward pass under way: its rows by real positions, and each row's left padding."""

    def __init__(self) -> None:
        self.rows: Rows | None = None
        self.pad_B: list[int] = []
        self.number = 0
        """Grows by one a forward pass."""
        self._prompts: list[list[int]] = []

    def begin(self, ids_BT: Tensor | None, num_rows: int, num_queries: int, mask: Any, past: int) -> None:
        """Work out the rows of a new pass; the engine's own account comes first."""
        self.number += 1
        published = current_rows()
        if published is not None:
            self.rows, self.pad_B = published, [0] * num_rows
            return
        key_len = past + num_queries
        real_BK = torch.ones(num_rows, key_len, dtype=torch.bool)
        if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] == key_len:
            real_BK = mask.bool().cpu().expand(num_rows, key_len)
        self.pad_B = real_BK.int().argmax(1).tolist()
        queries_BT = real_BK[:, past:]
        if past == 0:
            ids = [[]] * num_rows if ids_BT is None else ids_BT.tolist()
            keep = queries_BT.tolist()
            self._prompts = [
                [i for i, k in zip(row, kept, strict=False) if k] for row, kept in zip(ids, keep, strict=True)
            ]
        starts = [max(past - pad, 0) for pad in self.pad_B]
        prompts = self._prompts if len(self._prompts) == num_rows else [[]] * num_rows
        self.rows = Rows(list(range(num_rows)), prompts, starts, queries_BT.sum(1).tolist(), key_len)

    def last_column(self, hidden_BTD: Tensor) -> Tensor:
        """Column of each row's last real query token, (B,)."""
        assert self.rows is not None
        past = self.rows.key_len - hidden_BTD.shape[1]
        first = [max(pad - past, 0) for pad in self.pad_B]
        return torch.tensor([a + n - 1 for a, n in zip(first, self.rows.length_B, strict=True)])


def past_length(values: Any, layer: int = 0) -> int:
    """Tokens already in the cache found among `values`; 0 without one."""
    for value in values:
        if hasattr(value, "get_seq_length"):
            return int(value.get_seq_length(layer))
    return 0


def decoder_stack(model: nn.Module) -> nn.Module:
    """The module that owns the list of layers and is told ids, mask and cache."""
    first = anchors.layers(model)[0]
    for module in model.modules():
        for child in module.children():
            if any(grandchild is first for grandchild in child.children()):
                return module
    raise ModelError(
        f"{type(model).__name__} has no decoder stack", cure="Use a decoder-only language model."
    )


@contextmanager
def watch_padding(model: nn.Module) -> Iterator[Pass]:
    """A `Pass` that is up to date inside every forward pass of the block."""
    seen = Pass()

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids_BT = args[0] if args else kwargs.get("input_ids")
        source = ids_BT if ids_BT is not None else kwargs["inputs_embeds"]
        past = past_length([kwargs.get("past_key_values"), *args[1:]])
        mask = kwargs.get("attention_mask")
        if mask is None:
            mask = next((a for a in args[1:] if isinstance(a, Tensor) and a.ndim == 2), None)
        seen.begin(ids_BT, source.shape[0], source.shape[1], mask, past)

    handle = decoder_stack(model).register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()
