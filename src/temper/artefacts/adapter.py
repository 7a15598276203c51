"""Low-rank adapters and trained vocabulary rows, on disk as PEFT lays them out.

Applying adds B A to the weights themselves and puts the originals back afterwards: generation runs at the base's
speed, and whatever is fitted or applied on top finds a plain model.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from temper.artefacts.base import Artefact, Parts, need_model
from temper.artefacts.preserved import preserved, replace_tensor
from temper.artefacts.vocabulary import Vocabulary, put_rows
from temper.artefacts.weights import ROWS, Weights, between
from temper.core.errors import ModelError
from temper.core.types import Json
from temper.systems.anchors import is_conv1d

__all__ = ["CONFIG", "PREFIX", "TENSORS", "Adapter", "peft_rows_key"]

TENSORS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."


def peft_rows_key(module: str) -> str:
    """PEFT's name for the trained rows of an embedding or head."""
    return f"{PREFIX}{module}.token_adapter.trainable_tokens_delta"


@dataclass(eq=False)
class Adapter(Artefact):
    """LoRA pairs and trained rows. Strength s adds s times the low-rank change, and moves rows s of the way.

    `config` and `tensors` are PEFT's adapter_config and adapter_model; with new tokens, PEFT wants the
    model resized first. At strength 0 new tokens exist, at their starting rows, and all else is the base.
    """

    kind: ClassVar[str] = "adapter"

    config: Mapping[str, Json]
    tensors: Mapping[str, Tensor] = field(repr=False)
    vocabulary: Vocabulary | None = None

    @property
    def scaling(self) -> float:
        """The factor on B A: alpha / r."""
        return float(self.config["lora_alpha"]) / float(self.config["r"])

    def pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """(A, B) by the name of the module they change."""
        ending = ".lora_A.weight"
        names = [key[len(PREFIX) : -len(ending)] for key in self.tensors if key.endswith(ending)]
        return {
            name: (
                self.tensors[f"{PREFIX}{name}.lora_A.weight"],
                self.tensors[f"{PREFIX}{name}.lora_B.weight"],
            )
            for name in names
        }

    def rows(self) -> dict[str, Tensor]:
        """Trained rows by the name of the module that holds them."""
        if self.vocabulary is None:
            return {}
        modules = [self.vocabulary.embeddings, self.vocabulary.head]
        return {name: self.tensors[peft_rows_key(name)] for name in modules if name is not None}

    @contextlib.contextmanager
    def applying(self, system: Any, strength: float) -> Iterator[Any]:
        """Add the change to the weights; the base's own tensors are kept aside, not copied."""
        need_model(system, f"An adapter of {self.method!r}")
        grown = self.vocabulary.grow(system) if self.vocabulary else system
        if strength != 0.0:
            self._merge_into(system.model, strength)
        yield grown

    @torch.no_grad()
    def _merge_into(self, model: nn.Module, strength: float) -> None:
        for name, (down, up) in self.pairs().items():
            module = model.get_submodule(name)
            replace_tensor(model, f"{name}.weight", self._merged(module, down, up, strength))
        if self.vocabulary is None:
            return
        for key, name in self.vocabulary.weights().items():
            start, trained = (
                self.vocabulary.start[key],
                self.tensors[peft_rows_key(name.removesuffix(".weight"))],
            )
            rows = between(start.float(), trained.float(), strength)
            put_rows(model.get_parameter(name), self.vocabulary.ids, rows)

    def _merged(self, module: nn.Module, down: Tensor, up: Tensor, strength: float) -> Tensor:
        """Weight + strength * scaling * B A, computed in float32, in the weight's dtype."""
        weight = module.weight
        assert isinstance(weight, Tensor)
        if not weight.is_floating_point():
            raise ModelError(
                "Quantised weights cannot take an adapter", cure="Load the base in float32 or bfloat16."
            )
        wide = torch.promote_types(weight.dtype, torch.float32)
        delta = (up.to(weight.device, wide) @ down.to(weight.device, wide)) * (strength * self.scaling)
        # Conv1D of GPT-2 keeps its matrix the other way round.
        delta = delta.T if is_conv1d(module) else delta
        return (weight.to(wide) + delta).to(weight.dtype)

    def merge(self, system: Any, strength: float = 1.0) -> Weights:
        """The same change as whole tensors, e.g. to train a fresh adapter on top of a fixed result."""
        self.check(system)
        names = {f"{name}.weight" for name in self.pairs()}
        names |= set(self.vocabulary.weights().values()) if self.vocabulary else set()
        with preserved(system.model), self.applying(system, strength):
            merged = {n: p.detach().cpu().clone() for n, p in system.model.named_parameters() if n in names}
        return Weights(self.base, self.method, merged, self.vocabulary)

    def parts(self) -> Parts:
        """What is saved: PEFT's two files and, with new tokens, the rows they start from."""
        texts = {CONFIG: json.dumps(dict(self.config), indent=1, sort_keys=True) + "\n"}
        if self.vocabulary is None:
            return Parts({}, {TENSORS: self.tensors}, texts)
        tensors = {TENSORS: self.tensors, ROWS: self.vocabulary.start}
        return Parts({"vocabulary": self.vocabulary.settings()}, tensors, texts)

    @classmethod
    def from_parts(cls, base: str, method: str, parts: Parts) -> Adapter:
        """The artefact whose `parts()` these are."""
        settings = parts.settings.get("vocabulary")
        vocabulary = Vocabulary.from_settings(settings, parts.tensors[ROWS]) if settings else None
        return cls(base, method, json.loads(parts.texts[CONFIG]), parts.tensors[TENSORS], vocabulary)
