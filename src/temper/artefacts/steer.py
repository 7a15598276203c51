"""Steering: settings and tensors here, behaviour in `build_steer` of the method that made them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from temper.artefacts.base import Artefact, Parts, need_model
from temper.core import registry
from temper.core.errors import ConfigError
from temper.core.types import Json

__all__ = ["TENSORS", "Steer", "builder"]

TENSORS = "tensors.safetensors"


@dataclass(eq=False)
class Steer(Artefact):
    """Changes inside the forward pass. The method's `build_steer(system, artefact, strength)` is a context
    manager that puts them in place; it gives a changed system, or None when hooks are all there is.
    """

    kind: ClassVar[str] = "steer"

    settings: Mapping[str, Json] = field(default_factory=dict)
    """What the method needs to build it, as JSON."""
    tensors: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    @contextlib.contextmanager
    def applying(self, system: Any, strength: float) -> Iterator[Any]:
        """Enter the method's `build_steer`."""
        need_model(system, f"Steering by {self.method!r}")
        with builder(self, "build_steer")(system, self, strength) as changed:
            yield system if changed is None else changed

    def parts(self) -> Parts:
        """What is saved."""
        return Parts(dict(self.settings), {TENSORS: self.tensors} if self.tensors else {}, {})

    @classmethod
    def from_parts(cls, base: str, method: str, parts: Parts) -> Steer:
        """The artefact whose `parts()` these are."""
        return cls(base, method, parts.settings, parts.tensors.get(TENSORS, {}))


def builder(artefact: Artefact, name: str) -> Any:
    """The function of the artefact's method that turns it into behaviour; raises ConfigError without one."""
    function = getattr(registry.load_method(artefact.method), name, None)
    if function is None:
        raise ConfigError(
            f"Method {artefact.method!r} has no {name}, so its {artefact.kind} cannot be applied",
            where=str(registry.find(artefact.method).file("method.py")),
            cure="Use the version of temper that made the artefact.",
        )
    return function
