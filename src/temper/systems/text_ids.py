"""Ids of plain text: whatever it spells, never a control id, and the same in the middle of a text as alone."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer

from temper.core.errors import ConfigError, DataError, ModelError, nearest

__all__ = ["ANCHOR", "Piece", "TextIds"]

ANCHOR = "\U000f5a7etemper\U000f5a7e"
"""Stands for "a control token ended just before"; private-use characters, so no text holds it by chance."""
CONTEXT = 16
"""Characters to the left that decide how a text is continued."""
NEUTRAL = ("\n", ".", "a", "0")


class Piece(NamedTuple):
    """Ids of a text with the characters each covers; several ids of one character share its range."""

    ids: list[int]
    starts: list[int]
    ends: list[int]

    def first_after(self, char: int) -> int:
        """Index of the first token that reaches beyond `char`."""
        return bisect_right(self.ends, char)

    def first_from(self, char: int) -> int:
        """Index of the first token that starts at or after `char`."""
        return next((k for k, start in enumerate(self.starts) if start >= char), len(self.starts))


class TextIds:
    """Encodes text with a tokenizer's own model, but without the added tokens that steer a chat.

    Control tokens are the special ones and those added tokens that the chat template writes (such as
    thinking or tool tags). Other added tokens (runs of spaces, HTML tags) stay ordinary text.
    """

    def __init__(self, tokenizer: Any, template: str) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ModelError(
                f"{type(tokenizer).__name__} is not backed by the tokenizers library",
                cure="Convert it to a tokenizer.json and load that.",
            )
        added = dict(tokenizer.added_tokens_decoder)
        self.control = {
            str(token.content): token_id
            for token_id, token in added.items()
            if token.special or _is_markup(str(token.content), template)
        }
        self.control_ids = frozenset(self.control.values())
        self._splitter = _splitter([t for i, t in sorted(added.items()) if i in self.control_ids])
        ordinary = {i: t for i, t in added.items() if i not in self.control_ids}
        self._plain, self._ids = _plain_copy(backend, ordinary)
        self._anchor_id = self._plain.token_to_id(ANCHOR)
        self._context = lru_cache(1024)(self._context_ids)
        self._short = lru_cache(4096)(self._checked)
        bare = self._plain.encode(ANCHOR + "a", add_special_tokens=False).ids[1:]
        inside = self._plain.encode(ANCHOR + "\na", add_special_tokens=False).ids
        self._contexts = tuple(ANCHOR + text for text in NEUTRAL)
        if bare == inside[-len(bare) :]:
            self._contexts = (ANCHOR, *self._contexts)

    def split(self, text: str) -> list[str | int]:
        """Template text cut at its control tokens: plain parts as text, control tokens as ids."""
        out: list[str | int] = []
        last = 0
        for match in self._splitter.finditer(text):
            if match.start() > last:
                out.append(text[last : match.start()])
            out.append(self.control[match[match.lastgroup or 0]])
            last = match.end()
        return out + ([text[last:]] if last < len(text) else [])

    def named(self, name: str) -> int:
        """The id of a control token; raises ConfigError for a name that is none."""
        if name not in self.control:
            raise ConfigError(f"{name!r} is no control token", cure=nearest(name, self.control))
        return self.control[name]

    def split_named(self, text: str, names: Sequence[str]) -> list[str | int]:
        """`text` cut at those control tokens that `names` lists; raises ConfigError for another name."""
        for name in names:
            self.named(name)
        cut = re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)))
        out: list[str | int] = []
        last = 0
        for match in cut.finditer(text):
            out += [text[last : match.start()], self.control[match[0]]]
            last = match.end()
        return [part for part in (*out, text[last:]) if part != ""]

    def encode(self, text: str, left: str = "") -> Piece:
        """Ids of `text` standing right of `left` ("" = start of all; `ANCHOR`... = after a control token).

        Raises ModelError where decoding the ids does not give `text` back.
        """
        if len(left) > CONTEXT and left != ANCHOR:
            left = ANCHOR + left.removeprefix(ANCHOR)[-CONTEXT:]
        return self._short(text, left) if len(text) <= 64 else self._checked(text, left)

    def _checked(self, text: str, left: str) -> Piece:
        own, starts, ends = self._own(text, left)
        if self._anchor_id in own:
            raise DataError(f"Text holds the reserved characters {ANCHOR!r}", cure="Remove them.")
        ids = [self._ids.get(i, i) for i in own]
        for k, token_id in enumerate(ids):
            if token_id in self.control_ids:
                return self._cut_apart(text, left, starts[k], ends[k])
        self._check_round_trip(text, own)
        return Piece(ids, starts, ends)

    def _own(self, text: str, left: str) -> tuple[list[int], list[int], list[int]]:
        """The plain tokenizer's ids of `text` as a continuation, with character ranges."""
        if not text:
            return [], [], []
        for context in (left, *(self._contexts if left not in ("", ANCHOR) else ())):
            known = self._context(context)
            encoding = self._plain.encode(context + text, add_special_tokens=False)
            if tuple(encoding.ids[: len(known)]) == known:
                offsets = encoding.offsets[len(known) :]
                shift = len(context)
                starts = [max(0, start - shift) for start, _ in offsets]
                return encoding.ids[len(known) :], starts, [end - shift for _, end in offsets]
        raise ModelError(
            f"The tokenizer cannot continue a text with {text[:40]!r}",
            cure="Use another tokenizer or template.",
        )

    def _context_ids(self, context: str) -> tuple[int, ...]:
        return tuple(self._plain.encode(context, add_special_tokens=False).ids)

    def _cut_apart(self, text: str, left: str, start: int, end: int) -> Piece:
        """Spell out a control token that the vocabulary itself can build, by forbidding its join."""
        cut = start + 1
        if end - start <= 1 or cut >= len(text):
            raise ModelError(
                f"The tokenizer has no ordinary token for {text[start:end]!r}",
                where=f"text {text[max(0, start - 20) : end + 20]!r}",
                cure="Remove that character or use another tokenizer.",
            )
        head = self.encode(text[:cut], left)
        tail = self.encode(text[cut:], (left or ANCHOR) + text[:cut])
        moved_starts = [at + cut for at in tail.starts]
        moved_ends = [at + cut for at in tail.ends]
        return Piece(head.ids + tail.ids, head.starts + moved_starts, head.ends + moved_ends)

    def _check_round_trip(self, text: str, own: list[int]) -> None:
        decoded = self._plain.decode(own, skip_special_tokens=False)
        # A leading space is how SentencePiece tokenizers mark the start of a word.
        if decoded == text or decoded.lstrip(" ") == text.lstrip(" "):
            return
        normalizer = self._plain.normalizer
        normal = normalizer.normalize_str(text).replace("▁", " ") if normalizer else text
        if decoded.lstrip(" ") != normal.lstrip(" "):
            raise ModelError(
                "Decoding the ids of a text does not give the text back",
                where=f"{text[:60]!r} came back as {decoded[:60]!r}",
                cure="The tokenizer loses information; use the one that belongs to the model.",
            )


def _is_markup(content: str, template: str) -> bool:
    return bool(content.strip()) and not content.isalnum() and content in template


def _splitter(tokens: list[AddedToken]) -> re.Pattern[str]:
    """Longest control token first; those that swallow spaces beside them do so here as well."""
    parts = []
    for k, token in enumerate(sorted(tokens, key=lambda t: -len(t.content))):
        left, right = r"\s*" if token.lstrip else "", r"\s*" if token.rstrip else ""
        parts.append(f"{left}(?P<t{k}>{re.escape(token.content)}){right}")
    return re.compile("|".join(parts) or r"(?!)")


def _plain_copy(backend: Tokenizer, ordinary: dict[int, AddedToken]) -> tuple[Tokenizer, dict[int, int]]:
    """A tokenizer that shares `backend`'s model but knows only the ordinary added tokens and ANCHOR.

    Also the map from its ids to the backend's, for the tokens that got others.
    """
    plain = Tokenizer(backend.model)
    if backend.normalizer is not None:
        plain.normalizer = backend.normalizer
    if backend.pre_tokenizer is not None:
        plain.pre_tokenizer = backend.pre_tokenizer
    if backend.decoder is not None:
        plain.decoder = backend.decoder
    plain.add_tokens(list(ordinary.values()))
    plain.add_special_tokens([AddedToken(ANCHOR, special=True, normalized=False)])
    mapped = {plain.token_to_id(str(token.content)): token_id for token_id, token in ordinary.items()}
    return plain, {own: real for own, real in mapped.items() if own is not None and own != real}
