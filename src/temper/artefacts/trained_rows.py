"""Training a few vocabulary rows of a frozen matrix, at both ends of the model.

An own pair of modules rather than PEFT's token layer: that one copies the whole matrix at every call and leaves
out the bias of a head. What is saved has PEFT's names and meaning, and a test reads it back with PEFT.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from temper.artefacts.vocabulary import Vocabulary

__all__ = ["RowsEmbedding", "RowsHead", "train_rows"]


class RowsEmbedding(nn.Module):
    """Token embeddings in which the rows `ids` are a parameter of their own."""

    def __init__(self, base: Any, ids: Tensor, rows: nn.Parameter) -> None:
        super().__init__()
        self.base, self.rows = base, rows
        self.num_embeddings, self.embedding_dim = base.weight.shape
        place_V = torch.full((self.num_embeddings,), -1, device=ids.device)
        place_V[ids] = torch.arange(len(ids), device=ids.device)
        self.register_buffer("ids", ids, persistent=False)
        self.register_buffer("place_V", place_V, persistent=False)

    @property
    def weight(self) -> Tensor:
        """The whole matrix with the trained rows in it, with gradient."""
        return _merged(self.base.weight, self.ids, self.rows)  # type: ignore[arg-type]

    def forward(self, ids_BT: Tensor) -> Tensor:
        place_BT = self.place_V[ids_BT]  # type: ignore[index]
        out_BTD = self.base(ids_BT)
        # Some families scale their embeddings inside the module.
        scale = getattr(self.base, "embed_scale", 1.0)
        rows_BTD = F.embedding(place_BT.clamp(min=0), self.rows).to(out_BTD.dtype) * scale
        return torch.where((place_BT >= 0)[..., None], rows_BTD, out_BTD)


class RowsHead(nn.Module):
    """A vocabulary projection in which the rows `ids` are a parameter of their own."""

    def __init__(self, base: Any, ids: Tensor, rows: nn.Parameter) -> None:
        super().__init__()
        self.base, self.rows = base, rows
        self.out_features, self.in_features = base.weight.shape
        self.register_buffer("ids", ids, persistent=False)

    @property
    def weight(self) -> Tensor:
        """The whole matrix with the trained rows in it, with gradient."""
        return _merged(self.base.weight, self.ids, self.rows)  # type: ignore[arg-type]

    @property
    def bias(self) -> Tensor | None:
        """The projection's own bias."""
        return self.base.bias  # type: ignore[return-value]

    def forward(self, hidden: Tensor) -> Tensor:
        logits = self.base(hidden)
        bias = None if self.bias is None else self.bias[self.ids].to(hidden.dtype)  # type: ignore[index]
        rows = F.linear(hidden, self.rows.to(hidden.dtype), bias).to(logits.dtype)
        # The fresh logits are written into, not copied: nothing before them needs their old values.
        return logits.index_copy_(-1, self.ids, rows)


def _merged(weight: Tensor, ids: Tensor, rows: Tensor) -> Tensor:
    return weight.index_copy(0, ids, rows.to(weight.dtype))


def train_rows(model: nn.Module, vocabulary: Vocabulary) -> dict[str, nn.Parameter]:
    """Put trainable float32 rows into a grown model; one parameter for both ends when they are tied.

    Returns them by their key in `vocabulary.start`. Changes the modules: only inside `preserved`.
    """
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    head = model.get_output_embeddings()  # type: ignore[operator]
    ids = torch.tensor(vocabulary.ids, device=embeddings.weight.device)
    rows = {
        name: nn.Parameter(vocabulary.start[name].to(ids.device, torch.float32, copy=True))
        for name in vocabulary.weights()
    }
    head_name = next(name for name, module in model.named_modules() if module is head)
    _put(model, vocabulary.embeddings, RowsEmbedding(embeddings, ids, rows["embeddings"]))
    _put(model, head_name, RowsHead(head, ids, rows.get("head", rows["embeddings"])))
    return rows


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
