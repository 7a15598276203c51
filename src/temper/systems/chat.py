"""One chat template for training, evaluation and serving: conversations as ids with spans.

Ids are built from segments. Text that the template writes may become control tokens; the contents
of messages never do, whatever they spell.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from temper.core.errors import ConfigError, DataError, ModelError
from temper.core.types import Json, Message
from temper.systems.opening import Opening
from temper.systems.recent import Recent
from temper.systems.templates import BARE_FORMAT, PLAIN_FORMAT, Template
from temper.systems.text_ids import ANCHOR, Piece, TextIds

__all__ = ["Chat", "Rendered", "Span", "SplitPrompt"]

SLOT = "{optim_str}"
TAG = re.compile(r"\s*(<\|[^|<>\s]+\|>|<｜[^｜<>]+｜>|</?[a-z_]+>)")
"""How control tokens look."""


class Span(NamedTuple):
    """Token range of a message's content; a reply's includes its end-of-turn token.

    `message` counts the caller's messages; -1 is the system message that the chat's setting adds.
    """

    role: str
    start: int
    end: int
    message: int


class Rendered(NamedTuple):
    """A conversation as ids, where each message's content lies in them, and the same as text."""

    ids: list[int]
    spans: tuple[Span, ...]
    text: str


class SplitPrompt(NamedTuple):
    """A prompt's ids before and after the slot that an attack fills."""

    before_ids: list[int]
    after_ids: list[int]


class Chat:
    """A tokenizer with its chat template and a system prompt, fixed once and hashed as `sha256`.

    system_prompt  "default": what the template does by itself; "none": truly no system turn, also
                   where the template would add one; any other text: that text, unless the messages
                   bring a system message of their own
    template       a template's text; None takes the tokenizer's. A tokenizer without one (a base
                   model) gets a plain format: "qa" ("Question: ...\\nAnswer:") or "bare" (nothing added)
    options        further variables for the template, e.g. {"enable_thinking": False}
    opening        what stands at the beginning of a reply before the model writes; it is in no message's span
    """

    def __init__(
        self,
        tokenizer: Any,
        system_prompt: str = "default",
        template: str | None = None,
        *,
        plain: Literal["qa", "bare"] = "qa",
        options: Mapping[str, Json] | None = None,
        opening: Opening | None = None,
    ) -> None:
        if not system_prompt.strip():
            raise ConfigError("system_prompt is empty", cure='Write "none" for no system prompt.')
        self.tokenizer, self.system_prompt, self.plain = tokenizer, system_prompt, plain
        self.options, self.opening = dict(options or {}), opening
        self.template: str | None = template if template is not None else _own_template(tokenizer)
        source, variables = self.template, self.options
        if source is None:
            source = {"qa": PLAIN_FORMAT, "bare": BARE_FORMAT}[plain]
            variables = {"bos": _own_bos(tokenizer), "eos": tokenizer.eos_token or "", **self.options}
        self._template = Template(tokenizer, source, variables, drop_default=system_prompt == "none")
        self._text_ids = TextIds(tokenizer, source)
        self.recent: Recent[Span] = Recent()

    @classmethod
    def from_file(cls, tokenizer: Any, path: Path | str, system_prompt: str = "default", **more: Any) -> Chat:
        """A chat with the template in a text file; raises ConfigError if it cannot be read."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"Chat template file cannot be read: {error}",
                where=str(path),
                cure="Give a UTF-8 Jinja file.",
            ) from None
        return cls(tokenizer, system_prompt, text, **more)

    def with_(self, **changes: Any) -> Chat:
        """The same chat with some of its arguments changed."""
        changed = Chat(**{**self._arguments(), **changes})
        changed.recent = self.recent
        return changed

    def _arguments(self) -> dict[str, Any]:
        names = ("tokenizer", "system_prompt", "template", "plain", "options", "opening")
        return {name: getattr(self, name) for name in names}

    def __reduce__(self) -> tuple[Any, ...]:
        # The memories of template and tokenizer can be neither copied nor sent to another process.
        return partial(Chat, **self._arguments()), ()

    @cached_property
    def sha256(self) -> str:
        """Hash of the template, its options, the system prompt, the special tokens with their ids, and the opening."""
        control = sorted(self._text_ids.control.items())
        facts = [self._template.source, self._template.options, self.system_prompt, control]
        facts += [self.opening.facts()] if self.opening else []
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def prompt(self, messages: Sequence[Message], *, open_reply: bool = True) -> Rendered:
        """Ids up to and including the generation prompt (without it if `open_reply` is False).

        An exact prefix of `dialogue(messages + [reply])`, unless the template `opens_reply`.
        Control tokens that a message names stand at the end of its span.
        """
        return self._rendered(messages, open_reply, ())

    def dialogue(self, messages: Sequence[Message], *, control: Sequence[str] = ()) -> Rendered:
        """The whole conversation. `control` names special tokens that replies may hold as such.

        Raises DataError for a message that the template rewrites, ConfigError for a system message
        the template has no place for, ModelError where ids do not decode to the text.
        """
        return self._rendered(messages, False, tuple(control))

    def split_prompt(self, messages: Sequence[Message], slot: str = SLOT) -> SplitPrompt:
        """Ids of the prompt before and after `slot`, which one user message holds exactly once."""
        holders = [(i, m) for i, m in enumerate(messages) if slot in m.content]
        if len(holders) != 1 or holders[0][1].role != "user" or holders[0][1].content.count(slot) != 1:
            places = ", ".join(f"{m.role} message {i} (x{m.content.count(slot)})" for i, m in holders)
            raise DataError(
                f"The slot {slot!r} must stand in one user message, once",
                where=f"found in {places or 'no message'}",
                cure=f"Write the user message as e.g. 'Do this. {slot}'.",
            )
        sent, shift = self._with_system(messages)
        place = holders[0][0] + shift
        builder = _Builder(self._text_ids)
        num_before = 0

        def write(index: int, content: str) -> None:
            nonlocal num_before
            head, found, tail = content.partition(slot) if index == place else (content, "", "")
            builder.content(head)
            if found:
                builder.cut()
                num_before = len(builder.ids)
            builder.content(tail)

        self._compose(builder, sent, shift, True, write)
        return SplitPrompt(builder.ids[:num_before], builder.ids[num_before:])

    def text_ids(self, text: str, *, begin: bool = True) -> list[int]:
        """Ids of bare text without template or control tokens; `begin` adds BOS where the tokenizer does."""
        bos = [self.tokenizer.bos_token_id] if begin and _own_bos(self.tokenizer) else []
        return bos + self._text_ids.encode(text, ANCHOR if bos else "").ids

    def continuation_ids(self, text: str, left: str = "") -> list[int]:
        """Ids of text that stands right of other text, never control tokens."""
        return self._text_ids.encode(text, ANCHOR + left).ids

    def require_template(self) -> str:
        """The template; raises ModelError for a model without one."""
        if self.template is None:
            raise ModelError(
                "The tokenizer has no chat template",
                where=str(self.tokenizer.name_or_path) or type(self.tokenizer).__name__,
                cure="Use an instruction-tuned model, or give a chat template file.",
            )
        return self.template

    @cached_property
    def opens_reply(self) -> str:
        """What the generation prompt already writes of the reply, such as a thinking tag; "" if nothing."""
        return self._template.opens_reply()

    def require_closed_reply(self) -> None:
        """Raise ModelError if the template already opens the reply."""
        if self.opens_reply:
            raise ModelError(
                f"The chat template already opens the reply with {self.opens_reply!r}",
                where="its generation prompt",
                cure="Turn thinking off in the template's options, or give a template file that ends at the "
                "assistant header.",
            )

    @cached_property
    def end_of_turn(self) -> str | None:
        """The token that closes a reply, or None if the template closes it with plain text or nothing.

        Raises ModelError where the template closes it with a tag that the tokenizer splits.
        """
        after = self._template.layout(("user", "assistant"), False).pieces[2]
        parts = [part for part in self._text_ids.split(after) if isinstance(part, int) or part.strip()]
        if not parts or isinstance(parts[0], int):
            return str(self.tokenizer.convert_ids_to_tokens(parts[0])) if parts else None
        if tag := TAG.match(parts[0]):
            self.require_token(tag[1])
        return None

    def require_token(self, text: str) -> int:
        """The id of a control token; raises ModelError if the tokenizer would split it."""
        if text not in self._text_ids.control:
            num_parts = len(self._text_ids.encode(text, ANCHOR).ids)
            raise ModelError(
                f"The tokenizer splits the control token {text!r} into {num_parts} tokens",
                where=str(self.tokenizer.name_or_path) or type(self.tokenizer).__name__,
                cure="Add it to the tokenizer as a special token, or use the template that belongs to it.",
            )
        return self._text_ids.control[text]

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end a reply: the end of turn and the tokenizer's EOS."""
        names = [self.end_of_turn, self.tokenizer.eos_token]
        return frozenset(self.tokenizer.convert_tokens_to_ids(name) for name in names if name)

    @property
    def control_ids(self) -> frozenset[int]:
        """Ids that only the template may write."""
        return self._text_ids.control_ids

    def _with_system(self, messages: Sequence[Message]) -> tuple[tuple[Message, ...], int]:
        """The messages with the set system prompt, and how many it put in front."""
        if self.system_prompt in ("default", "none") or any(m.role == "system" for m in messages):
            return tuple(messages), 0
        return (Message("system", self.system_prompt), *messages), 1

    def _rendered(self, messages: Sequence[Message], open_reply: bool, control: tuple[str, ...]) -> Rendered:
        sent, shift = self._with_system(messages)
        builder = _Builder(self._text_ids)

        def write(index: int, content: str) -> None:
            named = control if sent[index].role == "assistant" else ()
            for part in self._text_ids.split_named(content, named) if named else (content,):
                if isinstance(part, int):
                    builder.control(part)
                else:
                    builder.content(part)

        text = self._compose(builder, sent, shift, open_reply, write)
        rendered = Rendered(builder.ids, tuple(builder.spans), text)
        self.recent.add(rendered.ids, rendered.spans)
        return rendered

    def _compose(
        self,
        builder: _Builder,
        sent: Sequence[Message],
        shift: int,
        open_reply: bool,
        write: Callable[[int, str], None],
    ) -> str:
        """Hand pieces and contents to the builder in order; the whole text."""
        if not sent:
            raise DataError("A conversation has no messages", cure="Give at least one.")
        roles = tuple(m.role for m in sent)
        layout = self._template.layout(roles, open_reply)
        contents = self._template.contents(sent, layout, open_reply)
        lead = self.opening.of(sent) if self.opening else ""
        begun = self.opening if lead and not open_reply and roles[-1] == "assistant" else None
        for index, message in enumerate(sent):
            piece, opens = layout.pieces[index], layout.opens[index]
            builder.template(piece[:opens])
            if message.role == "assistant":
                # The prompt ends here, so the reply must not change the ids before it.
                builder.cut()
                builder.template(piece[opens:])
            if begun and index + 1 == len(sent):
                contents[index] = begun.rest(sent, contents[index])
                builder.content(lead)
                builder.cut()
            builder.begin(message.role, index - shift)
            write(index, contents[index])
            for name in message.control:
                builder.control(self._text_ids.named(name))
                contents[index] += name
            builder.end()
        builder.template(layout.pieces[-1])
        builder.cut()
        contents[-1] = lead + contents[-1] if begun else contents[-1]
        contents.append(self._begin(builder, roles, lead) if lead and open_reply else "")
        return "".join(part for pair in zip(layout.pieces, contents, strict=True) for part in pair)

    def _begin(self, builder: _Builder, roles: tuple[str, ...], lead: str) -> str:
        """Write the opening behind the generation prompt; what was written."""
        reply = self._template.layout((*roles, "assistant"), False)
        between = reply.pieces[-2][reply.opens[-1] :]
        builder.template(between)
        builder.content(lead)
        builder.cut()
        return between + lead


class _Mark(NamedTuple):
    span: int
    is_end: bool
    char: int


class _Builder:
    """Collects text between control tokens, encodes it as one run, and places the spans."""

    def __init__(self, text_ids: TextIds) -> None:
        self.ids: list[int] = []
        self.spans: list[Span] = []
        self._text_ids = text_ids
        self._run, self._left = "", ""
        self._marks: list[_Mark] = []
        self._open_reply: int | None = None

    def template(self, text: str) -> None:
        """Text that may hold control tokens."""
        for part in self._text_ids.split(text):
            if isinstance(part, int):
                self.control(part)
            else:
                self._await_end_of_turn(part)
                self.content(part)

    def content(self, text: str) -> None:
        """Text that holds none."""
        self._run += text

    def control(self, token_id: int) -> None:
        """A control token; the first one after a reply closes it."""
        self._flush()
        self.ids.append(token_id)
        self._left = ANCHOR
        if self._open_reply is not None:
            self.spans[self._open_reply] = self.spans[self._open_reply]._replace(end=len(self.ids))
            self._open_reply = None

    def cut(self) -> None:
        """Make what follows unable to change the ids before it."""
        run = self._run
        self._flush()
        self._left += run

    def begin(self, role: str, message: int) -> None:
        """A message's content starts here."""
        self._open_reply = None
        self._marks.append(_Mark(len(self.spans), False, len(self._run)))
        self.spans.append(Span(role, 0, 0, message))

    def end(self) -> None:
        """The content ends here."""
        last = len(self.spans) - 1
        self._marks.append(_Mark(last, True, len(self._run)))
        self._open_reply = last if self.spans[last].role == "assistant" else None

    def _await_end_of_turn(self, part: str) -> None:
        if part.strip():
            self._open_reply = None

    def _flush(self) -> None:
        piece = self._text_ids.encode(self._run, self._left)
        for mark in self._marks:
            self._place(mark, piece)
        self.ids.extend(piece.ids)
        self._marks, self._run = [], ""

    def _place(self, mark: _Mark, piece: Piece) -> None:
        span = self.spans[mark.span]
        if mark.is_end:
            end = max(len(self.ids) + piece.first_from(mark.char), span.start)
            self.spans[mark.span] = span._replace(end=end)
        else:
            self.spans[mark.span] = span._replace(start=len(self.ids) + piece.first_after(mark.char))


def _own_template(tokenizer: Any) -> str | None:
    if not tokenizer.chat_template:
        return None
    return tokenizer.get_chat_template()


def _own_bos(tokenizer: Any) -> str:
    """The BOS token if the tokenizer puts it before every text by itself, else ""."""
    bos_id = tokenizer.bos_token_id
    ids = tokenizer("a").input_ids
    return str(tokenizer.bos_token) if bos_id is not None and ids[:1] == [bos_id] else ""
