"""Class prompts with free places: the ids of every class name around context vectors that are learned.

Shape letters: C classes, M context vectors, T tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from temper.core.errors import DataError
from temper.systems.dual_encoder import DualEncoder, check_names

__all__ = ["Position", "Prompts", "build_prompts", "fill", "readable"]

Position = Literal["end", "middle", "front"]


class Prompts(NamedTuple):
    """One row a class: embeddings of everything that is not learned, where context vectors go, and where the row ends."""

    embeddings_CTD: Tensor
    places_CM: Tensor
    end_C: Tensor


def readable(name: str) -> str:
    """A class name as words: underscores become blanks."""
    return " ".join(name.replace("_", " ").split())


def build_prompts(
    system: DualEncoder, names: Sequence[str], num_context: int, position: Position, ending: str
) -> Prompts:
    """Prompts of the class names with `num_context` free places each.

    end      [first][V ... V][name][ending][end]
    middle   [first][half of V][name][the rest of V][ending][end]
    front    [first][name][V ... V][ending][end]

    Raises DataError, naming the class, for names that do not fit the text tower or that do not tell classes apart.
    """
    names = [readable(name) for name in names]
    check_names(names)
    before = {"end": num_context, "middle": num_context // 2, "front": 0}[position]
    closing = system.ids([ending])[0][1:-1] if ending else []
    rows, places = [], []
    for name in names:
        first, *spelt, last = system.ids([name])[0]
        # A free place holds the first id until it is filled.
        row = [first, *[first] * before, *spelt, *[first] * (num_context - before), *closing, last]
        _check_length(system, row, name, num_context)
        rows.append(row)
        behind = 1 + before + len(spelt)
        places.append([*range(1, 1 + before), *range(behind, behind + num_context - before)])
    longest = max(map(len, rows))
    padded = [row + [system.pad_id] * (longest - len(row)) for row in rows]
    device = system.device
    with torch.no_grad():
        embeddings_CTD = system.token_embeddings(torch.tensor(padded, device=device)).detach()
    return Prompts(
        embeddings_CTD,
        torch.tensor(places, dtype=torch.int64, device=device).reshape(len(rows), num_context),
        torch.tensor([len(row) - 1 for row in rows], device=device),
    )


def _check_length(system: DualEncoder, row: list[int], name: str, num_context: int) -> None:
    if len(row) > system.max_tokens:
        raise DataError(
            f"The prompt has {len(row)} tokens and {system.spec or system.kind} reads {system.max_tokens}",
            where=f"class {name!r} with {num_context} context vectors",
            cure="Shorten the name, or set fewer context vectors; cutting it off would lose the end token.",
        )


def fill(prompts: Prompts, context: Tensor) -> Tensor:
    """Prompt embeddings with the context vectors in their places, with gradient in them.

    context (M, D) for all classes or (C, M, D) gives (C, T, D); (B, 1, M, D), a context for each picture, gives (B, C, T, D).
    """
    num_classes, num_tokens, width = prompts.embeddings_CTD.shape
    lead = context.shape[:-3] if context.ndim == 4 else ()
    shape = (*lead, num_classes, context.shape[-2], width)
    at = prompts.places_CM[..., None].expand(shape)
    rows = prompts.embeddings_CTD.expand(*lead, num_classes, num_tokens, width)
    return rows.scatter(-2, at, context.expand(shape).to(rows.dtype))
