"""A chat template taken apart: the text it writes around messages, and where it opens a reply."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from jinja2.exceptions import TemplateError

from temper.core.errors import ConfigError, DataError, ModelError
from temper.core.types import Json, Message

__all__ = ["BARE_FORMAT", "PLAIN_FORMAT", "Layout", "Template"]

PLAIN_FORMAT = (
    "{{ bos }}{% for message in messages %}"
    "{% if message.role == 'system' %}{{ message.content + '\n\n' }}"
    "{% elif message.role == 'assistant' %}{{ 'Answer: ' + message.content + eos }}"
    "{{ '' if loop.last else '\n\n' }}"
    "{% else %}{{ 'Question: ' + message.content + '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Answer:' }}{% endif %}"
)
"""How base models without a template are asked: "Question: ...\\nAnswer:", the reply closed by EOS."""

BARE_FORMAT = (
    "{{ bos }}{% for message in messages %}{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos }}{% endif %}{% endfor %}"
)
"""Messages one after the other with nothing between them: pure continuation."""

THINKING = re.compile(
    r"(?:<\|?|◁)(?:begin_of_)?(?:think|thinking|thought|reasoning|reason|scratchpad)(?:\|?>|▷)\s*\Z"
)
CUTS = (str, str.strip, str.lstrip, str.rstrip)
"""What templates are allowed to do to a message's content: nothing, or trim it."""


class Layout(NamedTuple):
    """Text around the messages: pieces[i] stands before message i, the last after all of them.

    `opens[i]` is how much of pieces[i] belongs to the prompt when message i is a reply.
    """

    pieces: tuple[str, ...]
    opens: tuple[int, ...]


class Template:
    """A Jinja chat template, rendered with the tokenizer's special tokens."""

    def __init__(
        self, tokenizer: Any, source: str, options: Mapping[str, Json], *, drop_default: bool
    ) -> None:
        self.tokenizer, self.source, self.options = tokenizer, source, dict(options)
        self.drop_default = drop_default
        self.layout = lru_cache(1024)(self._layout)
        self._pieces = lru_cache(4096)(self._find_pieces)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """The template's own text for `messages`; raises what the template raises."""
        rows = [{"role": m.role, "content": m.content} for m in messages]
        return self.tokenizer.apply_chat_template(
            rows,
            chat_template=self.source,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **self.options,
        )

    def contents(self, messages: Sequence[Message], layout: Layout, add_generation_prompt: bool) -> list[str]:
        """Each message's content as the template writes it (as it is, or trimmed).

        Raises DataError where the template rewrites a message.
        """
        text = self._real_text(messages, add_generation_prompt)
        if not text.startswith(layout.pieces[0]):
            raise _rewritten(messages, 0)
        found: list[str] = []
        at = len(layout.pieces[0])
        for index, message in enumerate(messages):
            following, last = layout.pieces[index + 1], index + 1 == len(messages)
            kept = _kept(message.content, text, at, following, last)
            if kept is None:
                # Where the content itself stands, it is the next message that changed the text before it.
                stands = not last and any(text.startswith(cut(message.content), at) for cut in CUTS)
                raise _rewritten(messages, index + stands)
            found.append(kept)
            at += len(kept) + len(following)
        return found

    def _real_text(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        text = self._render_or_explain(messages, add_generation_prompt)
        roles = tuple(m.role for m in messages)
        default = self._pieces(roles, add_generation_prompt)[0]
        if self.drop_default and text.startswith(default):
            return self._first_piece(roles, default) + text[len(default) :]
        return text

    def _layout(self, roles: tuple[str, ...], add_generation_prompt: bool) -> Layout:
        pieces = self._pieces(roles, add_generation_prompt)
        if self.drop_default and roles:
            pieces = (self._first_piece(roles, pieces[0]), *pieces[1:])
        opens = [self._opening(roles[: i + 1], pieces[i]) for i in range(len(roles))]
        return Layout(pieces, tuple(opens))

    def _opening(self, roles: tuple[str, ...], piece: str) -> int:
        """Characters of the piece before the last role that a prompt for this reply already holds."""
        if roles[-1] != "assistant" or len(roles) == 1:
            return len(piece)
        try:
            opened = self._pieces(roles[:-1], True)[-1]
        except (ConfigError, DataError):
            return len(piece)
        return len(opened) if piece.startswith(opened) else len(piece)

    def _find_pieces(self, roles: tuple[str, ...], add_generation_prompt: bool) -> tuple[str, ...]:
        """Render stand-ins for the contents and cut the text at them."""
        marks = [f"Xq{i}Zj{i}Kw" for i in range(len(roles))]
        stand_ins = [Message(role, mark) for role, mark in zip(roles, marks, strict=True)]
        text = self._render_or_explain(stand_ins, add_generation_prompt)
        pieces, rest = [], text
        for index, mark in enumerate(marks):
            piece, found, rest = rest.partition(mark)
            if not found or mark in rest:
                raise self._lost(roles[index], index, twice=bool(found))
            pieces.append(piece)
        return (*pieces, rest)

    def _lost(self, role: str, index: int, twice: bool) -> ConfigError | DataError:
        if role == "system" and not twice:
            return _no_system("it leaves the system message out")
        return DataError(
            f"The chat template writes a {role} message {'twice' if twice else 'nowhere'}",
            where=f"message {index}",
            cure="Use roles the template knows, or another template.",
        )

    def _render_or_explain(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        try:
            return self.render(messages, add_generation_prompt)
        except TemplateError as error:
            if any(m.role == "system" for m in messages):
                without = [m for m in messages if m.role != "system"]
                if not without or self._renders(without, add_generation_prompt):
                    raise _no_system(str(error)) from None
            raise DataError(
                f"The chat template refuses these messages: {error}",
                where="roles " + ", ".join(m.role for m in messages),
                cure="Most templates want user and assistant in turn, beginning with user.",
            ) from None

    def _renders(self, messages: Sequence[Message], add_generation_prompt: bool) -> bool:
        try:
            self.render(messages, add_generation_prompt)
        except TemplateError:
            return False
        return True

    def _first_piece(self, roles: tuple[str, ...], piece: str) -> str:
        """The text before the first message without the system turn that the template adds by itself."""
        if "system" in roles or not roles:
            return piece
        first = roles[0]
        try:
            before, after, _ = self._pieces(("system", first), False)
        except (ConfigError, DataError):
            return piece
        closing = self._pieces((first,), False)[-1]
        header = after[len(closing) :]
        if closing and after.startswith(closing) and piece.endswith(header):
            # Where the token that opens each turn doubles as BOS, the header brings it already.
            bos = str(self.tokenizer.bos_token or "")
            doubles = not piece.startswith(bos) or header.startswith(bos)
            return header if doubles else bos + header
        if piece.startswith(before) and piece.endswith(after) and len(piece) >= len(before) + len(after):
            raise ModelError(
                "The chat template adds a system prompt that cannot be taken out",
                where=f"it opens with {piece[:80]!r}",
                cure='Use system_prompt="default", or a template file without it.',
            )
        return piece

    def opens_reply(self) -> str:
        """What the generation prompt writes beyond the reply's header, e.g. an open thinking tag."""
        prompt = self._pieces(("user",), True)[-1]
        header = self._pieces(("user", "assistant"), False)[1]
        if prompt.startswith(header) and prompt != header and prompt[len(header) :].strip():
            return prompt[len(header) :]
        tag = THINKING.search(prompt)
        return tag[0] if tag else ""


def _kept(content: str, text: str, at: int, following: str, last: bool) -> str | None:
    """The form of `content` that stands at `at` in `text`, followed by `following`; None when none does."""
    for cut in CUTS:
        kept = cut(content)
        if text.startswith(kept + following, at) and (
            not last or at + len(kept) + len(following) == len(text)
        ):
            return kept
    return None


def _rewritten(messages: Sequence[Message], index: int) -> DataError:
    return DataError(
        f"The chat template rewrites the content of a {messages[index].role} message",
        where=f"message {index}: {messages[index].content[:60]!r}",
        cure="Take out what the template reacts to (often thinking or tool tags), or use a template "
        "that writes contents as they are.",
    )


def _no_system(why: str) -> ConfigError:
    return ConfigError(
        f"The chat template has no system role: {why}",
        cure='Use system_prompt="none" and put the text into the first user message, or give a template file.',
    )
