"""Words around the user's words: a system prompt, a prefix, a suffix, demonstrations."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from temper.artefacts.base import Artefact, Parts, only_full_strength
from temper.core.errors import NeedsError
from temper.core.types import Json, Message

__all__ = ["Prompt"]


@dataclass(eq=False)
class Prompt(Artefact):
    """Added to every conversation before the template; with `base=ANY_BASE` it fits every system.

    `system_prompt` takes the place of the conversation's own; `demonstrations` stand between it and
    the conversation; `prefix` and `suffix` surround the last user message as they are, spaces included,
    and `control` names control tokens of the base that follow it as ids.
    """

    kind: ClassVar[str] = "prompt"

    system_prompt: str | None = None
    prefix: str = ""
    suffix: str = ""
    demonstrations: tuple[Message, ...] = ()
    control: tuple[str, ...] = ()

    def rewrite(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        """The conversation as the model gets it."""
        head = [m for m in messages[:1] if m.role == "system"]
        talk = list(messages[len(head) :])
        if self.system_prompt is not None:
            head = [Message("system", self.system_prompt)]
        users = [index for index, message in enumerate(talk) if message.role == "user"]
        if users:
            last = talk[users[-1]]
            talk[users[-1]] = dataclasses.replace(
                last,
                content=f"{self.prefix}{last.content}{self.suffix}",
                control=(*last.control, *self.control),
            )
        return (*head, *self.demonstrations, *talk)

    @contextlib.contextmanager
    def applying(self, system: Any, strength: float) -> Iterator[Any]:
        """The system with `rewrite` after the rewrites it has; only at strength 1."""
        only_full_strength(self, strength)
        if not hasattr(system, "rewrites"):
            raise NeedsError(
                f"A prompt of {self.method!r} rewrites messages; {type(system).__name__} has no place for that",
                cure="Use a local language model.",
            )
        yield system.with_(rewrites=(*system.rewrites, self.rewrite))

    def parts(self) -> Parts:
        """What is saved: settings only."""
        settings = {
            "system_prompt": self.system_prompt,
            "prefix": self.prefix,
            "suffix": self.suffix,
            "demonstrations": [_plain(message) for message in self.demonstrations],
            "control": list(self.control),
        }
        return Parts(settings, {}, {})

    @classmethod
    def from_parts(cls, base: str, method: str, parts: Parts) -> Prompt:
        """The artefact whose `parts()` these are."""
        values = dict(parts.settings)
        values["demonstrations"] = tuple(
            Message(m["role"], m["content"], tuple(m.get("control", ()))) for m in values["demonstrations"]
        )
        values["control"] = tuple(values.get("control", ()))
        return cls(base, method, **values)


def _plain(message: Message) -> dict[str, Json]:
    named = {"control": list(message.control)} if message.control else {}
    return {"role": message.role, "content": message.content, **named}
