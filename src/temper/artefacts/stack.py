"""Several artefacts as one, applied in order."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from temper.artefacts.base import Artefact, Parts
from temper.core.errors import ConfigError
from temper.core.types import Json

__all__ = ["Stack"]

STRENGTHLESS = ("prompt", "decoder")


@dataclass(eq=False)
class Stack(Artefact):
    """Members applied first to last. They belong together: the first one's base is the stack's.

    A strength goes to the members that have one; prompts and decoders are always there in full.
    """

    kind: ClassVar[str] = "stack"

    members: tuple[Artefact, ...] = ()

    @classmethod
    def of(cls, members: Sequence[Artefact], method: str) -> Stack:
        """A stack on the base of its first member; raises ConfigError for an empty one."""
        if not members:
            raise ConfigError(
                "A stack of no artefacts", where=f"fit of {method!r}", cure="Give at least one."
            )
        return cls(members[0].base, method, tuple(members))

    @contextlib.contextmanager
    def applying(self, system: Any, strength: float) -> Iterator[Any]:
        """Apply each member to what the ones before it gave; only the first one's base is checked."""
        with contextlib.ExitStack() as entered:
            for member in self.members:
                own = 1.0 if member.kind in STRENGTHLESS else strength
                system = entered.enter_context(member.applying(system, own))
            yield system

    def parts(self) -> Parts:
        """What is saved: every member's parts, its files prefixed by its place."""
        settings: list[Json] = []
        tensors, texts = {}, {}
        for index, member in enumerate(self.members):
            inner = member.parts()
            tensors.update({f"{index}-{name}": value for name, value in inner.tensors.items()})
            texts.update({f"{index}-{name}": value for name, value in inner.texts.items()})
            settings.append(
                {
                    "kind": member.kind,
                    "method": member.method,
                    "base": member.base,
                    "settings": dict(inner.settings),
                }
            )
        return Parts({"members": settings}, tensors, texts)

    @classmethod
    def from_parts(cls, base: str, method: str, parts: Parts) -> Stack:
        """The artefact whose `parts()` these are."""
        from temper.artefacts.loading import build_artefact

        members = []
        for index, member in enumerate(parts.settings["members"]):
            prefix = f"{index}-"
            tensors = {k.removeprefix(prefix): v for k, v in parts.tensors.items() if k.startswith(prefix)}
            texts = {k.removeprefix(prefix): v for k, v in parts.texts.items() if k.startswith(prefix)}
            inner = Parts(member["settings"], tensors, texts)
            members.append(build_artefact(member["kind"], member["base"], member["method"], inner))
        return cls(base, method, tuple(members))
