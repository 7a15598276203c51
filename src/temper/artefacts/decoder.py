"""Decoding rules: settings and tensors here, behaviour in `build_decoder` of the method that made them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from temper.artefacts.base import Artefact, Parts, need_model, only_full_strength
from temper.artefacts.steer import TENSORS, builder
from temper.core.types import Json

__all__ = ["Decoder"]


@dataclass(eq=False)
class Decoder(Artefact):
    """A rule on the next token. The method's `build_decoder(system, artefact)` gives the StepRule.

    It takes the place of an earlier rule of the same name: recalibrating replaces, it does not add.
    """

    kind: ClassVar[str] = "decoder"

    settings: Mapping[str, Json] = field(default_factory=dict)
    """What the method needs to build it, as JSON."""
    tensors: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    @contextlib.contextmanager
    def applying(self, system: Any, strength: float) -> Iterator[Any]:
        """The system with the rule after those it has, in place of one of the same name; only at strength 1."""
        only_full_strength(self, strength)
        need_model(system, f"A decoding rule of {self.method!r}")
        rule = builder(self, "build_decoder")(system, self)
        others = tuple(other for other in system.step_rules if other.name != rule.name)
        yield system.with_(step_rules=(*others, rule))

    def parts(self) -> Parts:
        """What is saved."""
        return Parts(dict(self.settings), {TENSORS: self.tensors} if self.tensors else {}, {})

    @classmethod
    def from_parts(cls, base: str, method: str, parts: Parts) -> Decoder:
        """The artefact whose `parts()` these are."""
        return cls(base, method, parts.settings, parts.tensors.get(TENSORS, {}))
