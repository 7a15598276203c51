"""The contract of every artefact: the base it fits, apply and leave no trace, save without pickle."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from temper.artefacts.preserved import preserved
from temper.core.errors import ConfigError, ModelError, NeedsError
from temper.core.types import Json

__all__ = ["ANY_BASE", "Artefact", "Parts", "chained", "need_model", "only_full_strength"]

ANY_BASE = "*"
"""The `base` of an artefact that fits every system, e.g. a prompt that is tried on several."""


def chained(system: str, artefact: str, strength: float) -> str:
    """Fingerprint of a system with an artefact applied, from both fingerprints and the strength."""
    return hashlib.sha256(f"{system}+{artefact}@{float(strength)!r}".encode()).hexdigest()


@dataclass(frozen=True)
class Parts:
    """What an artefact is on disk: JSON settings, and files of named tensors or of text."""

    settings: Mapping[str, Json]
    tensors: Mapping[str, Mapping[str, Tensor]]
    """File name -> name -> tensor; each is one safetensors file."""
    texts: Mapping[str, str]
    """File name -> content, for files that another library reads."""


@dataclass(eq=False)
class Artefact(ABC):
    """What a `fit` leaves. `base` is the fingerprint of the system it fits, `method` the slug that made it."""

    kind: ClassVar[str]

    base: str
    method: str

    @abstractmethod
    def parts(self) -> Parts:
        """What is saved, hashed and given back to `from_parts`."""

    @classmethod
    @abstractmethod
    def from_parts(cls, base: str, method: str, parts: Parts) -> Artefact:
        """The artefact whose `parts()` these are."""

    @abstractmethod
    def applying(self, system: Any, strength: float) -> contextlib.AbstractContextManager[Any]:
        """Change the system; `apply` has checked the base and puts the model back afterwards."""

    @contextlib.contextmanager
    def apply(self, system: Any, strength: float = 1.0) -> Iterator[Any]:
        """The system with this artefact in force; its base is bit-identical afterwards, also after an error.

        The model object is shared: inside the context the base system behaves as the changed one.
        Raises ModelError for another base, ConfigError for a strength that is not finite.
        """
        self.check(system)
        if not math.isfinite(strength):
            raise ConfigError(f"Strength {strength} is not a finite number", cure="Write e.g. +name@0.8.")
        model = getattr(system, "model", None)
        keeping = preserved(model) if isinstance(model, torch.nn.Module) else contextlib.nullcontext()
        # Taken before the weights change: a bare system's fingerprint is a hash of them.
        fingerprint = chained(system.fingerprint, self.fingerprint, strength)
        with keeping, self.applying(system, strength) as changed:
            yield changed.with_(fingerprint=fingerprint)

    def fits(self, system: Any) -> bool:
        """Whether the system is the one this was fitted on."""
        return self.base in (ANY_BASE, system.fingerprint)

    def check(self, system: Any) -> None:
        """Raise ModelError naming both bases unless `fits`."""
        if not self.fits(system):
            raise ModelError(
                f"This {self.kind} of {self.method!r} was fitted on base {self.base[:12]}, not on {system.fingerprint[:12]}",
                where=f"system {getattr(system, 'spec', '')!r}",
                cure="Apply it to the base it names, with the same artefacts before it in the same order and strength, "
                "or fit it again on this system.",
            )

    def save(self, folder: Path | str) -> Path:
        """Write `artefact.json` and its tensors so that the folder appears whole or not at all."""
        from temper.artefacts.loading import write_artefact

        return write_artefact(self, Path(folder))

    @cached_property
    def fingerprint(self) -> str:
        """Hash of kind, method, base, settings, texts and every tensor's bytes."""
        digest = hashlib.sha256(f"{self.kind}/{self.method}/{self.base}/".encode())
        parts = self.parts()
        digest.update(json.dumps([parts.settings, parts.texts], sort_keys=True).encode())
        for file in sorted(parts.tensors):
            for name, tensor in sorted(parts.tensors[file].items()):
                digest.update(f"{file}/{name}/{tensor.dtype}/{tuple(tensor.shape)}/".encode())
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


def need_model(system: Any, what: str) -> None:
    """Raise NeedsError unless the system holds weights that can be changed, ModelError if a query model depends on them."""
    if not isinstance(getattr(system, "model", None), torch.nn.Module):
        raise NeedsError(
            f"{what} needs a model whose weights are here; {type(system).__name__} has none",
            cure="Use a local model as the base.",
        )
    if getattr(system, "query_model", None) is not None:
        raise ModelError(
            f"{what} would change the documents that the system's query model was trained against",
            where=f"system {system.spec!r}",
            cure="Put it before the query model's weights, and train those again.",
        )


def only_full_strength(artefact: Artefact, strength: float) -> None:
    """Raise ConfigError for a strength other than 1 of an artefact that is either there or not."""
    if strength != 1.0:
        raise ConfigError(
            f"A {artefact.kind} has no strength; got {strength:g}",
            where=f"{artefact.kind} of {artefact.method!r}",
            cure="Leave out the @strength.",
        )
