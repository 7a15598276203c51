"""A text encoder: any transformers encoder with what turns its token states into one vector a text.

Shape letters: S tokens of all rows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from temper.core.errors import ConfigError, DataError, nearest
from temper.systems.local import CPU, LocalSystem, tried
from temper.systems.row_attention import ROWS
from temper.systems.sentence_layout import Layout, write_layout

__all__ = ["Encoder"]

_tokenizers: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Encoder(LocalSystem):
    """Texts to vectors, see `ops/embed.py`. Change it with `with_`, never in place.

    Dense layers after the pooling are part of the model, as `sentence_head`: they are trained and fingerprinted with it.
    """

    model: Any
    tokenizer: Any
    layout: Layout = dataclasses.field(default_factory=Layout)
    device: torch.device = CPU
    spec: str = ""
    given_fingerprint: str = ""
    query_model: Any = None
    """The model that embeds queries, where it is another than that of the documents (`model`)."""
    documents: str = ""
    """With a query model: the fingerprint of the document side that it was trained against."""
    kind: ClassVar[str] = "Encoder"
    products_kept: ClassVar[int] = 512
    """Rows of each length have their own attention: 128 were a quarter slower."""

    def identity(self) -> str:
        """The layout and the tokenizer."""
        return (
            json.dumps(dataclasses.asdict(self.layout), sort_keys=True)
            + "/"
            + _tokenizer_hash(self.tokenizer)
        )

    @property
    def for_queries(self) -> Encoder:
        """The encoder of queries: this one, unless there is a query model."""
        if self.query_model is None:
            return self
        return self.with_(
            model=self.query_model, query_model=None, documents="", fingerprint=f"{self.fingerprint}:queries"
        )

    @property
    def document_fingerprint(self) -> str:
        """The fingerprint of what embeds documents: an index made by it fits every query model trained against it."""
        return self.documents or self.fingerprint

    def cut(self, max_tokens: int) -> Encoder:
        """The same, reading at most so many tokens of a text: another encoder, with a fingerprint of its own."""
        mark = f":{max_tokens}"
        return self.with_(
            layout=self.layout.cut(min(max_tokens, self.max_tokens)),
            fingerprint=self.fingerprint + mark,
            documents=self.documents and self.documents + mark,
        )

    def save(self, folder: Path) -> None:
        """Write it as sentence-transformers reads it; with a query model as two, `documents` and `queries`."""
        if self.query_model is None:
            write_layout(self.model, self.tokenizer, self.layout, folder)
            return
        write_layout(self.model, self.tokenizer, self.layout, folder / "documents")
        write_layout(self.query_model, self.tokenizer, self.layout, folder / "queries")

    def try_capabilities(self) -> dict[str, bool]:
        """A forward pass over three tokens for each.

        Attention weights and masks cannot be reached: the table of module names has no encoders.
        """
        ids_BT = torch.tensor([[0, 1, 2]], device=self.device)
        return {
            "embed": tried(lambda: _probe_embed(self.model, ids_BT)),
            "hidden": tried(lambda: _probe_hidden(self.model, ids_BT)),
            "grads": tried(lambda: _probe_grads(self.model, ids_BT)),
        }

    def ids(self, texts: Sequence[str], prompt: str = "") -> list[list[int]]:
        """Each text as ids with the tokenizer's own first and last token, cut to `max_tokens`.

        Control tokens that a text spells stay text. `prompt` names one of the layout's prompts; "" is its default.
        Raises DataError for a text without any token.
        """
        if not texts:
            return []
        before = self._prompt(prompt)
        given = [before + text for text in texts] if before else list(texts)
        rows = self.tokenizer(
            [text.lower() for text in given] if self.layout.lower_case else given,
            truncation=True,
            max_length=self.max_tokens,
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]
        for place, row in enumerate(rows):
            if not row:
                raise DataError("The text has no token", where=f"text {place}", cure="Drop empty texts.")
        return [list(row) for row in rows]

    def _prompt(self, name: str) -> str:
        name = name or self.layout.default_prompt
        if not name:
            return ""
        if name not in self.layout.prompts:
            raise ConfigError(
                f"{self.spec} has no prompt {name!r}",
                cure=nearest(name, self.layout.prompts) or "It has none: leave prompt out.",
            )
        return self.layout.prompts[name]

    @property
    def max_tokens(self) -> int:
        """The most tokens of a text that are read, by the layout, the tokenizer and the position table."""
        limits = [self.layout.max_tokens, getattr(self.tokenizer, "model_max_length", None)]
        positions = getattr(self.model.config, "max_position_embeddings", None)
        limits.append(positions - self.first_position if positions else None)
        return int(min(limit for limit in limits if limit))

    @property
    def first_position(self) -> int:
        """The position id of a row's first token: RoBERTa and its kin begin after the padding id."""
        table = getattr(getattr(self.model, "embeddings", None), "position_embeddings", None)
        padding = getattr(table, "padding_idx", None)
        return 0 if padding is None else int(padding) + 1

    @property
    def takes_rows(self) -> bool:
        """Whether the model runs rows one behind another without padding: on a CPU, where its architecture can."""
        return self.device.type == "cpu" and self.model.config._attn_implementation == ROWS

    @property
    def width(self) -> int:
        """Numbers in a vector."""
        dense = [module.linear.out_features for module in getattr(self.model, "sentence_head", ())]
        return int(dense[-1] if dense else self.model.config.hidden_size * len(self.layout.pooling))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the input embeddings."""
        return self.model.get_input_embeddings().weight.dtype

    @property
    def pad_id(self) -> int:
        """An id to fill batches with."""
        return int(self.tokenizer.pad_token_id or 0)

    def cure_for(self, capability: str) -> str:
        """What a user can do about a missing capability."""
        if capability in ("embed", "hidden", "grads"):
            return (
                f"{type(self.model).__name__} failed when {capability!r} was tried; choose another encoder."
            )
        return "An encoder only reads: choose a causal language model, e.g. smollm2-135m."


def _tokenizer_hash(tokenizer: Any) -> str:
    if tokenizer not in _tokenizers:
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        # Calls set these two; the layout says what they are.
        kept = {key: value for key, value in content.items() if key not in ("truncation", "padding")}
        _tokenizers[tokenizer] = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
    return _tokenizers[tokenizer]


@torch.no_grad()
def _probe_embed(model: Any, ids_BT: Tensor) -> bool:
    hidden_BTD = model(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT)).last_hidden_state
    return hidden_BTD.shape[:2] == ids_BT.shape and bool(torch.isfinite(hidden_BTD).all())


@torch.no_grad()
def _probe_hidden(model: Any, ids_BT: Tensor) -> bool:
    hidden = model(input_ids=ids_BT, output_hidden_states=True).hidden_states
    return hidden is not None and len(hidden) > 1


def _probe_grads(model: Any, ids_BT: Tensor) -> bool:
    """A gradient reaches the input embeddings; no parameter's `.grad` is touched."""
    with torch.enable_grad():
        embeds_BTD = model.get_input_embeddings()(ids_BT).detach().requires_grad_()
        hidden_BTD = model(inputs_embeds=embeds_BTD).last_hidden_state
        (grad_BTD,) = torch.autograd.grad(hidden_BTD[0, -1].float().square().sum(), embeds_BTD)
    return bool(torch.isfinite(grad_BTD).all()) and bool(grad_BTD.any())
