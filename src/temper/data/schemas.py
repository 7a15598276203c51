"""The records that data is made of, and `Data`: named parts of records, like the splits of a dataset.

A record turns into a row of plain JSON values with `to_row`; `temper.data.columns.from_row` reads it back.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, TypeVar

from temper.core.errors import ConfigError, nearest
from temper.core.types import Json, Message
from temper.data.pictures import Picture

__all__ = [
    "ROLES",
    "SCHEMAS",
    "Behaviour",
    "Captioned",
    "Choice",
    "Data",
    "Dialogue",
    "Labelled",
    "Preference",
    "Ranking",
    "Record",
    "Text",
    "ToolCalls",
    "to_row",
]

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Record:
    """What every record has: an `id`, unique within its part, and the columns its schema does not know.

    `extra` may not use the name of one of the record's own columns.
    """

    id: str = field(default="", kw_only=True)
    extra: Mapping[str, Json] = field(default_factory=dict, kw_only=True, hash=False)


@dataclass(frozen=True)
class Dialogue(Record):
    """A conversation of at least one message; a lone user message is a request without a reply."""

    messages: tuple[Message, ...]

    @property
    def prompt(self) -> tuple[Message, ...]:
        """Everything before the closing assistant message, or everything if there is none."""
        return self.messages[:-1] if self.messages[-1].role == "assistant" else self.messages

    @property
    def reply(self) -> str | None:
        """The closing assistant message, or None for a request without a reply."""
        return self.messages[-1].content if self.messages[-1].role == "assistant" else None


@dataclass(frozen=True)
class Preference(Record):
    """Two replies to one prompt, the first one preferred."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Behaviour(Record):
    """A request a model should refuse (or, when `benign`, answer) and how a complying reply would begin."""

    prompt: str
    target: str | None = None
    category: str = ""
    benign: bool = False


@dataclass(frozen=True)
class Choice(Record):
    """A multiple-choice question; `answer` is the index of the right choice."""

    question: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Labelled(Record):
    """A text or an image, and its class."""

    text: str
    """Empty where the record is an image."""
    label: int | str
    image: Picture | None = None


@dataclass(frozen=True)
class Text(Record):
    """A plain text."""

    text: str


@dataclass(frozen=True)
class Ranking(Record):
    """A query, a passage that answers it, and passages that do not."""

    query: str
    positive: str
    negatives: tuple[str, ...] = ()


@dataclass(frozen=True)
class ToolCalls(Record):
    """A conversation in which functions may be called; `tools` are their JSON descriptions."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Json], ...] = field(hash=False)


@dataclass(frozen=True)
class Captioned(Record):
    """An image and a text about it."""

    image: Picture
    text: str


SCHEMAS: dict[str, type[Record]] = {
    cls.__name__: cls
    for cls in (Dialogue, Preference, Behaviour, Choice, Labelled, Text, Ranking, ToolCalls, Captioned)
}


def to_row(record: Record) -> dict[str, Json]:
    """The record as plain JSON values: `id` (if it has one), its columns, then those of `extra`.

    A prompt that is one user message becomes a string, any other a list of messages; an image its path or a PNG in base64.
    """
    row = _row(record)
    return {name: value.uri() if isinstance(value, Picture) else value for name, value in row.items()}


def _row(record: Record) -> dict[str, Json]:
    """The same with pictures as they are."""
    row: dict[str, Json] = {"id": record.id} if record.id else {}
    for name in _columns(type(record)):
        value = getattr(record, name)
        if value is not None:
            row[name] = _plain(value)
    if row.get("image") is not None and not row.get("text"):
        row.pop("text", None)
    if isinstance(record, Preference) and len(record.prompt) == 1 and record.prompt[0].role == "user":
        row["prompt"] = record.prompt[0].content
    return row | dict(record.extra)


def _columns(cls: type[Record]) -> list[str]:
    return [f.name for f in dataclasses.fields(cls) if f.name not in ("id", "extra")]


def _plain(value: Json) -> Json:
    if isinstance(value, Message):
        return {"role": value.role, "content": value.content}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return dict(value)
    return value


R = TypeVar("R", bound=Record)

_HASHED: Any = {"sort_keys": True, "separators": (",", ":"), "default": lambda picture: picture.digest}
"""How a row is written to be hashed: an image by its content, wherever it lies."""


class Data(Mapping[str, tuple[Record, ...]]):
    """Named parts, each a tuple of records of one schema; it never changes.

    `source` is the spec it came from, for people; `fingerprint` is what identifies it.
    """

    default_part: ClassVar[str] = "train"

    def __init__(self, parts: Mapping[str, Iterable[Record]], source: str = "") -> None:
        self._parts = {name: tuple(records) for name, records in parts.items()}
        self.source = source

    def __getitem__(self, part: str) -> tuple[Record, ...]:
        try:
            return self._parts[part]
        except KeyError:
            raise ConfigError(
                f"The data has no part {part!r}", where=self.source, cure=nearest(part, self._parts)
            ) from None

    def __contains__(self, part: object) -> bool:
        return part in self._parts

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name}: {len(records)}" for name, records in self._parts.items())
        return f"Data({self.source or 'in memory'}; {sizes})"

    def get(self, part: str, default: tuple[Record, ...] = ()) -> tuple[Record, ...]:  # type: ignore[override]
        """The records of a part, or `default` where there is no such part."""
        return self._parts.get(part, default)

    def records(self, part: str, kind: type[R]) -> tuple[R, ...]:
        """The records of a part as the type they must have, or () where there is no such part."""
        found = self.get(part)
        wrong = next((record for record in found if not isinstance(record, kind)), None)
        if wrong is not None:
            raise ConfigError(
                f"Part {part!r} holds {type(wrong).__name__}, not {kind.__name__}",
                where=self.source,
                cure=f"Load it with schemas={{{part!r}: {kind.__name__!r}}}.",
            )
        return found  # type: ignore[return-value]

    @property
    def rows(self) -> tuple[Record, ...]:
        """The only part, or the one named "train"; raises ConfigError when neither exists."""
        if len(self._parts) == 1:
            return next(iter(self._parts.values()))
        return self[self.default_part]

    @property
    def schemas(self) -> dict[str, str]:
        """Part -> the name of its schema; an empty part has none and is left out."""
        return {name: type(records[0]).__name__ for name, records in self._parts.items() if records}

    @cached_property
    def fingerprint(self) -> str:
        """A hash of every record of every part, the same in every process and on every machine.

        The order of the parts does not count, the order of the records does.
        """
        digest = hashlib.sha256()
        for name in sorted(self._parts):
            digest.update(f"part {json.dumps(name)}\n".encode())
            for record in self._parts[name]:
                row = json.dumps(_row(record), **_HASHED)
                digest.update(f"{type(record).__name__} {row}\n".encode())
        return digest.hexdigest()[:16]

    def with_part(self, name: str, records: Iterable[Record]) -> Data:
        """A copy with one part added or replaced."""
        return Data({**self._parts, name: records}, self.source)
