"""A text encoder: any transformers encoder with what turns its token states into one vector a text.

Shape letters: S tokens of all rows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from temper.core.card import CAPABILITIES
from temper.core.errors import ConfigError, DataError, nearest
from temper.systems.base import System
from temper.systems.causal_lm import CPU, PROBE_ERRORS
from temper.systems.fingerprint import fingerprint_model
from temper.systems.row_attention import ROWS
from temper.systems.sentence_layout import Layout

__all__ = ["Encoder"]

_probed: WeakKeyDictionary[nn.Module, dict[str, bool | None]] = WeakKeyDictionary()
_tokenizers: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Encoder(System):
    """Texts to vectors, see `ops/embed.py`. Change it with `with_`, never in place.

    Dense layers after the pooling are part of the model, as `sentence_head`: they are trained and fingerprinted with it.
    """

    model: Any
    tokenizer: Any
    layout: Layout = dataclasses.field(default_factory=Layout)
    device: torch.device = CPU
    spec: str = ""
    given_fingerprint: str = ""
    """Set by what is applied to the model, see `with_`; "" for a bare model, whose content is hashed."""
    kind: ClassVar[str] = "Encoder"

    def __post_init__(self) -> None:
        object.__setattr__(self, "device", torch.device(self.device))

    def with_(self, **changes: Any) -> Encoder:
        """The same system with some fields changed; the model is shared, not copied."""
        if "fingerprint" in changes:
            changes["given_fingerprint"] = changes.pop("fingerprint")
        return dataclasses.replace(self, **changes)

    @property
    def fingerprint(self) -> str:
        """Hash of the model's config and weights, the layout and the tokenizer. Chained where artefacts apply."""
        if self.given_fingerprint:
            return self.given_fingerprint
        parts = [
            fingerprint_model(self.model),
            json.dumps(dataclasses.asdict(self.layout), sort_keys=True),
            _tokenizer_hash(self.tokenizer),
        ]
        return hashlib.sha256("/".join(parts).encode()).hexdigest()

    def probe(self) -> Mapping[str, bool | None]:
        """Each capability tried once per model with a forward pass over three tokens; those of other kinds are False.

        Attention weights and masks cannot be reached: the table of module names has no encoders.
        """
        if self.model not in _probed:
            _probed[self.model] = _probe(self.model, self.device)
        return dict(_probed[self.model])

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


def _probe(model: nn.Module, device: torch.device) -> dict[str, bool | None]:
    ids_BT = torch.tensor([[0, 1, 2]], device=device)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    works: dict[str, bool | None] = dict.fromkeys(CAPABILITIES, False)
    try:
        works["embed"] = _tried(lambda: _probe_embed(model, ids_BT))
        works["hidden"] = _tried(lambda: _probe_hidden(model, ids_BT))
        works["grads"] = _tried(lambda: _probe_grads(model, ids_BT))
    finally:
        for module, training in modes:
            module.training = training
    return works


def _tried(attempt: Callable[[], bool]) -> bool:
    try:
        return attempt()
    except PROBE_ERRORS:
        return False


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
