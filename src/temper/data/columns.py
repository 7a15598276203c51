"""Rows of the ecosystem's columns turned into records, and the schema that a set of columns suggests.

Every error names the source, the row, the column and the cure.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from temper.core.errors import ConfigError, DataError, nearest
from temper.core.types import Json, Message
from temper.data import schemas as s
from temper.data.choices import choice_fields
from temper.data.pictures import Picture
from temper.data.turns import plain_row
from temper.data.values import kind, short

__all__ = ["WANTS", "Place", "RowReader", "check_schema", "from_row", "infer_schema"]

WANTS: dict[str, str] = {
    "Dialogue": "messages, or prompt + completion, or question + answer, or prompt",
    "Preference": "prompt + chosen + rejected, or chosen + rejected as whole conversations",
    "Behaviour": "prompt (or goal, behavior, turns), and perhaps target, category, benign",
    "Choice": "question + choices + answer",
    "Labelled": "text + label, or image + label",
    "Text": "text",
    "Ranking": "query + positive, and perhaps negatives",
    "ToolCalls": "messages + tools",
    "Captioned": "image + text",
}

PROMPTS = ("prompt", "question")
REPLIES = ("completion", "response", "answer")
GOALS = ("prompt", "goal", "behavior", "behaviour")
IMAGES = ("image", "img")
PAGE = "wikipedia_content"
"""ConceptVectors' name for the text about a concept."""
CHAT_LISTS = ("messages", "conversations")
TURN_NAMES = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class Place:
    """Where a row stands: its source and its number (the line of a file, counted from 1)."""

    source: str
    row: int
    unit: str = "row"
    folder: Path | None = None
    """What relative image paths start from."""

    def error(self, what: str, *, column: str = "", cure: str = "") -> DataError:
        """A DataError about this row, or one of its columns."""
        place = f"{self.source}, {self.unit} {self.row}" + (f", column {column!r}" if column else "")
        return DataError(what, where=place, cure=cure)


def check_schema(name: str) -> str:
    """`name` if there is such a schema; raises ConfigError with the nearest otherwise."""
    if name not in s.SCHEMAS:
        raise ConfigError(f"There is no schema {name!r}", cure=nearest(name, s.SCHEMAS))
    return name


def infer_schema(columns: Collection[str], place: Place) -> str:
    """The schema that a row's columns suggest, the most demanding first; raises DataError for none."""
    if isinstance(columns, str) or not isinstance(columns, Collection):
        raise _not_a_row(columns, place)
    for name, alternatives in _SIGNS:
        if any(all(column in columns for column in wanted) for wanted in alternatives):
            return name
    wants = "; ".join(f"{name}: {columns}" for name, columns in WANTS.items())
    have = ", ".join(map(repr, columns)) or "(none)"
    raise place.error(f"The columns {have} fit no kind of record", cure=f"Rename them. {wants}.")


_SIGNS: tuple[tuple[str, tuple[tuple[str, ...], ...]], ...] = (
    ("Ranking", (("query", "positive"),)),
    ("Preference", (("chosen", "rejected"),)),
    ("ToolCalls", (("messages", "tools"),)),
    ("Dialogue", (("messages",), ("conversations",))),
    ("Choice", (("question", "choices"),)),
    ("Captioned", (("image", "text"), ("image", "caption"))),
    ("Behaviour", (("turns",), *((goal,) for goal in ("goal", "behavior", "behaviour")))),
    ("Behaviour", (("prompt", "target"), ("prompt", "benign"))),
    ("Dialogue", tuple((p, r) for p in PROMPTS for r in REPLIES)),
    ("Labelled", (("text", "label"), ("choices", "human_score"), *((image, "label") for image in IMAGES))),
    ("Text", (("text",),)),
    ("Dialogue", (("prompt",), ("question",))),
)


def from_row(row: Mapping[str, Json], schema: str, place: Place, *, default_id: str = "") -> s.Record:
    """The record of a row; columns that the schema does not know go to `extra`.

    `id` may be a string or a whole number; without one the record gets `default_id`.
    Raises DataError, with the nearest column for one that is missing.
    """
    if not isinstance(row, Mapping):
        raise _not_a_row(row, place)
    reader = RowReader(plain_row(row, schema, place), place, schema)
    name = reader.id(default_id)
    fields = _BUILDERS[check_schema(schema)](reader)
    return s.SCHEMAS[schema](**fields, id=name, extra=reader.rest())


def _not_a_row(row: Json, place: Place) -> DataError:
    return place.error(f"A row must be an object with columns, not {kind(row)}", cure='Write {"text": ...}.')


class RowReader:
    """Takes columns from one row and remembers which were used."""

    def __init__(self, row: Mapping[str, Json], place: Place, schema: str) -> None:
        self.row, self.place, self.schema = row, place, schema
        self.used: set[str] = set()
        for column, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise place.error(f"The value is {value}", column=column, cure="Drop the row or fill it in.")

    def find(self, *names: str) -> str | None:
        """The first of these columns that the row fills."""
        return next((n for n in names if self.row.get(n) is not None), None)

    def take(self, *names: str) -> tuple[str, Json]:
        """Name and value of the first of these columns that is filled; raises DataError for none."""
        name = self.find(*names)
        if name is None:
            raise self._missing(names)
        self.used.add(name)
        return name, self.row[name]

    def _missing(self, names: tuple[str, ...]) -> DataError:
        blank = next((n for n in names if n in self.row), None)
        if blank:
            return self.place.error("The column is empty", column=blank, cure="Fill it in or drop the row.")
        known = [c for c in self.row if c not in self.used]
        close = [m for n in names for m in difflib.get_close_matches(n, known, n=1, cutoff=0.6)]
        cure = (
            f"Rename {close[0]!r} to {names[0]!r}." if close else f"{self.schema} wants {WANTS[self.schema]}."
        )
        columns = ", ".join(map(repr, self.row)) or "none"
        return self.place.error(
            f"There is no column {' or '.join(map(repr, names))}; the row has {columns}", cure=cure
        )

    def text(self, *names: str) -> str:
        """A filled string column."""
        name, value = self.take(*names)
        return self.string(value, name)

    def string(self, value: Json, column: str) -> str:
        """`value` if it is a string with something in it that UTF-8 can hold."""
        if not isinstance(value, str):
            raise self.wrong(value, column, "a text")
        if not value.strip():
            raise self.place.error("The text is empty", column=column, cure="Fill it in or drop the row.")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise self.place.error(
                "The text holds half a surrogate pair", column=column, cure="Save the file as UTF-8 again."
            ) from None
        return value

    def wrong(self, value: Json, column: str, wanted: str) -> DataError:
        """The error for a value of the wrong type."""
        return self.place.error(f"{short(value)} is {kind(value)}, not {wanted}", column=column)

    def id(self, default: str) -> str:
        """The row's id as a string, or `default`."""
        value = self.row.get("id")
        self.used.add("id")
        if value is None or value == "":
            return default
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise self.wrong(value, "id", "a text or a whole number")
        return str(value)

    def rest(self) -> dict[str, Json]:
        """The columns that nobody took."""
        return {name: value for name, value in self.row.items() if name not in self.used}

    def messages(self, value: Json, column: str) -> tuple[Message, ...]:
        """A message list, or a string as one user message."""
        if isinstance(value, str):
            return (Message("user", self.string(value, column)),)
        if not isinstance(value, list | tuple):
            raise self.wrong(value, column, "a text or a list of messages")
        if not value:
            raise self.place.error("The list of messages is empty", column=column, cure="Drop the row.")
        return tuple(self.message(item, f"{column}[{i}]") for i, item in enumerate(value))

    def message(self, item: Json, column: str) -> Message:
        """One message of the form {"role", "content"} or {"from", "value"}."""
        if not isinstance(item, Mapping):
            raise self.wrong(item, column, 'a message {"role": ..., "content": ...}')
        if "from" in item and "role" not in item:
            item = {"role": TURN_NAMES.get(item["from"], item["from"]), "content": item.get("value")}
        role = item.get("role")
        if role not in s.ROLES:
            raise self.place.error(
                f"The role is {role!r}", column=column, cure=nearest(str(role), s.ROLES) or f"Use {s.ROLES}."
            )
        if item.get("tool_calls"):
            raise self.place.error(
                "The message has tool_calls beside its content", column=column,
                cure="Write the calls into content, in the form the model should produce.",
            )  # fmt: skip
        return Message(role, self.string(self.joined(item.get("content")), column))

    def joined(self, content: Json) -> Json:
        """The text of a content that is a list of text pieces; anything else unchanged."""
        pieces = content if isinstance(content, list) else []
        if pieces and all(isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in pieces):
            return "".join(p["text"] for p in pieces)
        return content

    def reply(self, value: Json, column: str) -> str:
        """One reply: a text, or a list with one assistant message."""
        if isinstance(value, str):
            return self.string(value, column)
        messages = self.messages(value, column)
        if len(messages) != 1 or messages[0].role != "assistant":
            raise self.place.error(
                f"The reply is {len(messages)} messages, the last by {messages[-1].role!r}",
                column=column,
                cure="Give one assistant message, or use the column messages.",
            )
        return messages[0].content

    def texts(self, value: Json, column: str, least: int = 0) -> tuple[str, ...]:
        """A list of at least so many texts."""
        if not isinstance(value, list | tuple):
            raise self.wrong(value, column, "a list of texts")
        if len(value) < least:
            raise self.place.error(f"{len(value)} entries, at least {least} are needed", column=column)
        return tuple(self.string(item, f"{column}[{i}]") for i, item in enumerate(value))


Fields = dict[str, Json]


def _dialogue(r: RowReader) -> Fields:
    if r.find(*CHAT_LISTS):
        name, value = r.take(*CHAT_LISTS)
        if isinstance(value, str):
            raise r.wrong(value, name, "a list of messages")
        return {"messages": r.messages(value, name)}
    if not r.find(*PROMPTS):
        raise r._missing(("messages", *PROMPTS))
    name, value = r.take(*PROMPTS)
    messages = r.messages(value, name)
    if any(n in r.row for n in REPLIES):
        reply, value = r.take(*REPLIES)
        messages = (*messages, Message("assistant", r.reply(value, reply)))
    return {"messages": messages}


def _preference(r: RowReader) -> Fields:
    _, chosen = r.take("chosen")
    _, rejected = r.take("rejected")
    if r.find(*PROMPTS):
        name, value = r.take(*PROMPTS)
        prompt = r.messages(value, name)
        return {
            "prompt": prompt,
            "chosen": _after(r, prompt, chosen, "chosen"),
            "rejected": _after(r, prompt, rejected, "rejected"),
        }
    (first, good), (second, bad) = _split(r, chosen, "chosen"), _split(r, rejected, "rejected")
    if first != second:
        raise r.place.error(
            "chosen and rejected follow different prompts", column="rejected", cure="Give a column prompt."
        )
    return {"prompt": first, "chosen": good, "rejected": bad}


def _after(r: RowReader, prompt: tuple[Message, ...], value: Json, column: str) -> str:
    """The reply; a conversation that repeats the prompt gives its closing message."""
    longer = isinstance(value, list) and len(value) == len(prompt) + 1
    if longer and r.messages(value, column)[:-1] == prompt:
        value = value[-1:]
    return r.reply(value, column)


def _split(r: RowReader, value: Json, column: str) -> tuple[tuple[Message, ...], str]:
    if isinstance(value, str):
        raise r._missing(PROMPTS)
    messages = r.messages(value, column)
    return messages[:-1], r.reply([{"role": messages[-1].role, "content": messages[-1].content}], column)


def _behaviour(r: RowReader) -> Fields:
    name, value = r.take(*GOALS)
    messages = r.messages(value, name)
    if len(messages) != 1 or messages[0].role != "user":
        raise r.wrong(value, name, "a text or one user message")
    fields: Fields = {"prompt": messages[0].content}
    if r.find("target"):
        fields["target"] = r.text("target")
    if r.find("category"):
        fields["category"] = r.row["category"]
        if not isinstance(fields["category"], str):
            raise r.wrong(fields["category"], "category", "a text")
    if r.find("benign"):
        fields["benign"] = _flag(r, r.row["benign"], "benign")
    r.used.update(("target", "category", "benign"))
    return fields


def _flag(r: RowReader, value: Json, column: str) -> bool:
    if value in (0, 1) and isinstance(value, int):
        return bool(value)
    raise r.wrong(value, column, "true or false")


def _labelled(r: RowReader) -> Fields:
    shown: Fields = {"text": "", "image": _picture(r)} if r.find(*IMAGES) else {"text": r.text("text")}
    column, label = r.take("label")
    if isinstance(label, float) and label.is_integer():
        label = int(label)  # what a table of floats makes of class numbers
    if not isinstance(label, str | int):
        raise r.wrong(label, column, "a text or a whole number")
    return {**shown, "label": r.string(label, column) if isinstance(label, str) else int(label)}


def _text(r: RowReader) -> Fields:
    return {"text": r.text(PAGE if r.find(PAGE) and not r.find("text") else "text")}


def _ranking(r: RowReader) -> Fields:
    fields: Fields = {"query": r.text("query"), "positive": r.text("positive")}
    if r.find("negatives"):
        fields["negatives"] = r.texts(r.take("negatives")[1], "negatives")
    return fields


def _tool_calls(r: RowReader) -> Fields:
    name, value = r.take("messages")
    messages = r.messages(value, name)
    name, tools = r.take("tools")
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools):
        raise r.wrong(tools, name, "a list of objects")
    return {"messages": messages, "tools": tuple(dict(tool) for tool in tools)}


def _captioned(r: RowReader) -> Fields:
    return {"image": _picture(r), "text": r.text("text", "caption")}


def _picture(r: RowReader) -> Picture:
    """A file beside the rows, or an image within the row: a data URI, bytes, or {"bytes", "path"} as Parquet holds it."""
    column, value = r.take(*IMAGES)
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return Picture.from_bytes(value)
    text = r.string(value, column)
    if text.startswith("data:"):
        try:
            return Picture.from_uri(text)
        except DataError as error:
            raise r.place.error(error.what, column=column, cure=error.cure) from None
    return Picture.from_file((r.place.folder or Path()) / text)


_BUILDERS: dict[str, Callable[[RowReader], Fields]] = {
    "Dialogue": _dialogue,
    "Preference": _preference,
    "Behaviour": _behaviour,
    "Choice": choice_fields,
    "Labelled": _labelled,
    "Text": _text,
    "Ranking": _ranking,
    "ToolCalls": _tool_calls,
    "Captioned": _captioned,
}
