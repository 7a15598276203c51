"""How a wrong value is named in a message."""

from __future__ import annotations

from temper.core.types import Json

__all__ = ["kind", "short"]


def kind(value: Json) -> str:
    """What a value is, in words."""
    kinds = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a text",
        list: "a list",
        bytes: "bytes",
    }
    return "nothing" if value is None else kinds.get(type(value), "an object")


def short(value: Json) -> str:
    """A value as written, cut to 40 characters."""
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
