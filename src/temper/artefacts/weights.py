"""New values for some or all tensors of the base."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from temper.artefacts.base import Artefact, Parts, need_model
from temper.artefacts.preserved import replace_tensor
from temper.artefacts.vocabulary import Vocabulary
from temper.core.errors import ModelError, nearest
from temper.core.types import Json

__all__ = ["Weights", "between"]

TENSORS = "model.safetensors"
ROWS = "vocabulary.safetensors"


@dataclass(eq=False)
class Weights(Artefact):
    """The tensors that differ from the base, by the model's own names; strength s gives base + s (new - base).

    With `side` "query" they make a second model that embeds queries; documents stay with the base, to which they are
    bound by its fingerprint.
    """

    kind: ClassVar[str] = "weights"

    tensors: Mapping[str, Tensor] = field(repr=False)
    vocabulary: Vocabulary | None = None
    side: Literal["", "query"] = ""

    @contextlib.contextmanager
    def applying(self, system: Any, strength: float) -> Iterator[Any]:
        """Swap the tensors in; the base's own are kept aside, not copied."""
        need_model(system, f"A weights artefact of {self.method!r}")
        grown = self.vocabulary.grow(system) if self.vocabulary else system
        current = {**dict(system.model.named_parameters()), **dict(system.model.named_buffers())}
        for name, new in self.tensors.items():
            if name not in current or current[name].shape != new.shape:
                raise ModelError(
                    f"The model has no tensor {name!r} of shape {tuple(new.shape)}",
                    where=f"weights of {self.method!r}",
                    cure=nearest(name, current),
                )
            if strength != 0.0 and not self.side:
                replace_tensor(system.model, name, between(current[name].data, new, strength))
        yield self._with_query_model(grown, strength) if self.side else grown

    def _with_query_model(self, system: Any, strength: float) -> Any:
        """The system with a query model, which shares the tensors it leaves alone."""
        model = system.model
        named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        shared = {id(tensor): tensor for name, tensor in named.items() if name not in self.tensors}
        query_model = copy.deepcopy(model, shared)
        for name, new in self.tensors.items():
            replace_tensor(query_model, name, between(named[name].data, new, strength))
        return system.with_(query_model=query_model, documents=system.fingerprint)

    def parts(self) -> Parts:
        """What is saved: `model.safetensors` and, with new tokens, `vocabulary.safetensors`."""
        tensors = {TENSORS: self.tensors}
        settings: dict[str, Json] = {"side": self.side} if self.side else {}
        if self.vocabulary is None:
            return Parts(settings, tensors, {})
        settings["vocabulary"] = self.vocabulary.settings()
        return Parts(settings, {**tensors, ROWS: self.vocabulary.start}, {})

    @classmethod
    def from_parts(cls, base: str, method: str, parts: Parts) -> Weights:
        """The artefact whose `parts()` these are."""
        settings = parts.settings.get("vocabulary")
        vocabulary = Vocabulary.from_settings(settings, parts.tensors[ROWS]) if settings else None
        return cls(base, method, parts.tensors[TENSORS], vocabulary, parts.settings.get("side", ""))


def between(old: Tensor, new: Tensor, strength: float) -> Tensor:
    """Old + strength (new - old), computed in float32, in the dtype and on the device of `old`; exact at 0 and 1."""
    new = new.to(old.device)
    if strength == 1.0 or not old.is_floating_point():
        return new.to(old.dtype)
    wide = torch.promote_types(old.dtype, torch.float32)
    return torch.lerp(old.to(wide), new.to(wide), strength).to(old.dtype)
