"""How replies are begun for the model: a text of somebody else's that it goes on from, as an attack or a format may have it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from temper.core.types import Json, Message

__all__ = ["Opening"]


@dataclass(frozen=True)
class Opening:
    """The first words of every reply, or of the replies to some prompts; what they hold is context, never a reply."""

    text: str = ""
    by_prompt: Mapping[str, str] = field(default_factory=dict)
    """Last user message -> the opening of the reply to it, in place of `text`."""

    def of(self, messages: Sequence[Message]) -> str:
        """The opening of the reply to these messages; "" for none."""
        asked = next((m.content for m in reversed(messages) if m.role == "user"), "")
        return self.by_prompt.get(asked, self.text)

    def rest(self, messages: Sequence[Message], reply: str) -> str:
        """What the model adds to the opening to give the reply; one that does not begin with it goes on after it."""
        opening = self.of(messages)
        if reply.startswith(opening):
            return reply[len(opening) :]
        joined = opening[-1:].isspace() or reply[:1].isspace()
        return reply if joined else f" {reply}"

    def facts(self) -> Json:
        """What a hash of it rests on."""
        return [self.text, sorted(self.by_prompt.items())]
