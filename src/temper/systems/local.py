"""What all systems share whose weights are here: one probe a model, one fingerprint, changed by copy."""

from __future__ import annotations

import dataclasses
import hashlib
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self
from weakref import WeakKeyDictionary

import torch
from torch import nn

from temper.core.card import CAPABILITIES
from temper.systems.base import System
from temper.systems.fingerprint import fingerprint_model
from temper.systems.freed_memory import keep_freed_memory
from temper.systems.kernel_cache import remember_products

__all__ = ["CPU", "PROBE_ERRORS", "LocalSystem", "tried"]

CPU = torch.device("cpu")
PROBE_ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, LookupError)
"""What an architecture raises for something it cannot do."""

_probed: WeakKeyDictionary[nn.Module, dict[str, bool]] = WeakKeyDictionary()


class LocalSystem(System):
    """A system with a torch model. A kind is a frozen dataclass with these fields among its own."""

    products_kept: ClassVar[int] = 0
    """Shapes of products worth remembering where inputs differ in length from pass to pass; 0 = as the libraries do."""
    model: Any
    device: torch.device
    given_fingerprint: str
    """Set by what is applied to the model, see `with_`; "" for a bare model, whose content is hashed."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "device", torch.device(self.device))
        if self.device.type == "cpu":
            keep_freed_memory()
            if self.products_kept:
                remember_products(self.products_kept)

    def with_(self, **changes: Any) -> Self:
        """The same system with some fields changed; the model is shared, not copied.

        `fingerprint` is for artefacts, which chain theirs to the base's.
        """
        if "fingerprint" in changes:
            changes["given_fingerprint"] = changes.pop("fingerprint")
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]

    @property
    def fingerprint(self) -> str:
        """Hash of the model's config and all its weights, and of `identity`. Chained where artefacts apply."""
        if self.given_fingerprint:
            return self.given_fingerprint
        model, rest = fingerprint_model(self.model), self.identity()
        return hashlib.sha256(f"{model}/{rest}".encode()).hexdigest() if rest else model

    def identity(self) -> str:
        """What decides the answers beside the weights, e.g. how inputs are prepared; "" for nothing."""
        return ""

    def probe(self) -> Mapping[str, bool | None]:
        """Each capability tried once per model; those of other kinds are False."""
        if self.model not in _probed:
            modes = [(module, module.training) for module in self.model.modules()]
            self.model.eval()
            try:
                works = self.try_capabilities()
            finally:
                for module, training in modes:
                    module.training = training
            _probed[self.model] = dict.fromkeys(CAPABILITIES, False) | works
        return dict(_probed[self.model])

    @abstractmethod
    def try_capabilities(self) -> dict[str, bool]:
        """Each capability the kind could have, tried on the model, which is in eval mode; see `tried`."""


def tried(attempt: Callable[[], bool]) -> bool:
    """Whether an attempt succeeds; what architectures raise for a thing they cannot do counts as no."""
    try:
        return attempt()
    except PROBE_ERRORS:
        return False
