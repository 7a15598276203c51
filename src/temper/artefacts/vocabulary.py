"""New vocabulary rows: control tokens added to a tokenizer and a model, or rows of unused ids trained again.

R is the number of rows concerned, V of all rows.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from temper.core.errors import ConfigError, ModelError
from temper.core.types import Json

__all__ = ["NOISE", "Vocabulary", "plan_vocabulary", "put_rows"]

NOISE = 0.01
"""Noise on a new row, in standard deviations of all entries: two tokens of the same words must differ."""


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The rows an artefact adds or trains, and what they start from (strength 0).

    `ids[:len(tokens)]` belong to the new tokens, the rest are reused ids. `start` holds "embeddings"
    (R, D), for an untied head "head" (R, D), and for a head with a bias "bias" (R,).
    """

    tokens: tuple[str, ...]
    ids: tuple[int, ...]
    embeddings: str
    """Name of the module with the input embeddings."""
    head: str | None
    """Name of the vocabulary projection, None when it is tied to the embeddings."""
    start: Mapping[str, Tensor] = field(repr=False)

    def settings(self) -> dict[str, Json]:
        """Everything but the tensors, as JSON."""
        return {
            "tokens": list(self.tokens),
            "ids": list(self.ids),
            "embeddings": self.embeddings,
            "head": self.head,
        }

    @classmethod
    def from_settings(cls, settings: Mapping[str, Json], start: Mapping[str, Tensor]) -> Vocabulary:
        """The vocabulary whose `settings()` and `start` these are."""
        return cls(
            tuple(settings["tokens"]),
            tuple(settings["ids"]),
            settings["embeddings"],
            settings["head"],
            dict(start),
        )

    def weights(self) -> dict[str, str]:
        """Names of the parameters that hold the rows, by their key in `start`."""
        named = {"embeddings": f"{self.embeddings}.weight"}
        if self.head is not None:
            named["head"] = f"{self.head}.weight"
        return named

    def grow(self, system: Any) -> Any:
        """The system with the new tokens in its tokenizer, chat and matrices; rows at their start.

        Changes the model: only inside `preserved`.
        """
        tokenizer = _with_tokens(system.tokenizer, self.tokens, self.ids)
        self._grow_model(system.model)
        if not self.tokens:
            return system
        return system.with_(tokenizer=tokenizer, chat=system.chat.with_(tokenizer=tokenizer))

    def _grow_model(self, model: nn.Module) -> None:
        embeddings = model.get_input_embeddings()  # type: ignore[operator]
        head = model.get_output_embeddings()  # type: ignore[operator]
        num_rows = max(len(embeddings.weight), max(self.ids) + 1)
        put_rows(embeddings.weight, self.ids, self.start["embeddings"], num_rows)
        if self.head is not None:
            put_rows(head.weight, self.ids, self.start["head"], num_rows)
        if "bias" in self.start:
            put_rows(head.bias, self.ids, self.start["bias"], num_rows)
        embeddings.num_embeddings = num_rows
        head.out_features = num_rows
        model.config.get_text_config().vocab_size = num_rows  # type: ignore[union-attr, operator]
        if hasattr(model, "vocab_size"):
            model.vocab_size = num_rows  # type: ignore[assignment]


def put_rows(parameter: nn.Parameter, ids: Sequence[int], rows: Tensor, num_rows: int | None = None) -> None:
    """Replace a matrix by a copy with `rows` at `ids`, longer where needed; padding between is zero."""
    old = parameter.data
    new = old.new_zeros((num_rows or len(old), *old.shape[1:]))
    new[: len(old)] = old
    new[torch.tensor(ids, device=old.device)] = rows.to(old)
    parameter.grad = None
    parameter.data = new


def plan_vocabulary(
    system: Any, new_tokens: Sequence[str], reuse_ids: Sequence[int], seed: int
) -> Vocabulary | None:
    """The rows for these tokens and ids, or None for none.

    A new token starts at the mean of the embeddings of the words in its name ("[REFUSE_legal]":
    refuse, legal) plus small seeded noise; a reused id starts where it is. Raises ConfigError for a
    token or id named twice, ModelError for a token that would not be exactly one new id.
    """
    if not new_tokens and not reuse_ids:
        return None
    tokens, reused = tuple(new_tokens), tuple(reuse_ids)
    _check_reused(system, tokens, reused)
    first = len(system.tokenizer)
    ids = (*range(first, first + len(tokens)), *reused)
    _with_tokens(system.tokenizer, tokens, ids)
    embeddings = system.model.get_input_embeddings()
    head = system.model.get_output_embeddings()
    tied = head.weight is embeddings.weight
    matrices = {"embeddings": embeddings.weight}
    if not tied:
        matrices["head"] = head.weight
    if getattr(head, "bias", None) is not None:
        matrices["bias"] = head.bias
    generator = torch.Generator().manual_seed(seed)
    sources = [_word_ids(system.tokenizer, token) for token in tokens]
    start = {name: _start(matrix.detach(), sources, reused, generator) for name, matrix in matrices.items()}
    return Vocabulary(
        tokens, ids, _name_of(system.model, embeddings), None if tied else _name_of(system.model, head), start
    )


def _check_reused(system: Any, tokens: tuple[str, ...], reused: tuple[int, ...]) -> None:
    for kind, names in (("token", tokens), ("id", reused)):
        twice = [name for name in names if names.count(name) > 1]  # type: ignore[arg-type]
        if twice:
            raise ConfigError(f"The {kind} {twice[0]!r} is named twice", cure="Name each once.")
    size = len(system.tokenizer)
    special = {system.tokenizer.bos_token_id, system.tokenizer.eos_token_id}
    for token_id in reused:
        if not 0 <= token_id < size:
            raise ConfigError(
                f"reuse_ids names {token_id}, which the tokenizer lacks",
                cure=f"Choose ids from 0 to {size - 1}.",
            )
        if token_id in special:
            raise ConfigError(
                f"reuse_ids names {token_id} ({system.tokenizer.convert_ids_to_tokens(token_id)!r}), which is in use",
                cure="Choose special tokens that no text and no template contains.",
            )


def _start(
    matrix: Tensor, sources: list[list[int]], reused: tuple[int, ...], generator: torch.Generator
) -> Tensor:
    """Starting rows (R, ...) on the CPU in the matrix's dtype."""
    spread = NOISE * float(matrix.float().std())
    rows = []
    for source in sources:
        mean = (matrix[source] if source else matrix).float().mean(0).cpu()
        rows.append((mean + spread * torch.randn(mean.shape, generator=generator)).to(matrix.dtype))
    rows += [matrix[token_id].cpu().clone() for token_id in reused]
    return torch.stack(rows)


def _word_ids(tokenizer: Any, token: str) -> list[int]:
    """Ids of the words in a token's name; none for a name without letters."""
    ids: list[int] = []
    for word in re.findall(r"[^\W\d_]+", token):
        ids += tokenizer.encode(" " + word.lower(), add_special_tokens=False)
    return [i for i in ids if i != tokenizer.unk_token_id]


def _with_tokens(tokenizer: Any, tokens: tuple[str, ...], ids: tuple[int, ...]) -> Any:
    """A copy of the tokenizer in which each token is exactly its one id; the tokenizer itself is untouched."""
    if not tokens:
        return tokenizer
    from tokenizers import AddedToken

    known = tokenizer.get_vocab()
    for token in tokens:
        if token in known:
            raise ModelError(
                f"Token {token!r} is in the vocabulary already, as id {known[token]}",
                cure="Choose another name, or train its row with reuse_ids.",
            )
    grown = copy.deepcopy(tokenizer)
    grown.add_tokens([AddedToken(t, special=True, normalized=False) for t in tokens], special_tokens=True)
    for token, token_id in zip(tokens, ids, strict=False):
        found = grown.encode(token, add_special_tokens=False)
        among_text = grown.encode(f"a{token}b", add_special_tokens=False)
        if found != [token_id] or among_text.count(token_id) != 1:
            raise ModelError(
                f"The tokenizer reads {token!r} as ids {found}, not as the one id {token_id}",
                cure="Choose a name that no other token is part of, e.g. [REFUSE].",
            )
    return grown


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)
