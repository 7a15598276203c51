"""Settings: dataclass defaults < recipe < `--set`, cast by the field's type, with their origins kept."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import math
import textwrap
import typing
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple, TypeVar

from temper.core.errors import ConfigError, nearest

__all__ = ["FieldHelp", "Resolved", "build", "cast", "describe", "parse_sets", "to_dict"]

C = TypeVar("C")


class Resolved(NamedTuple):
    """A finished config and, for each key, where its value came from."""

    config: Any
    origins: dict[str, str]


def build(cls: type[C], layers: Sequence[tuple[str, Mapping[str, Any]]] = ()) -> Resolved:
    """A `cls` from its defaults and named layers, later ones winning.

    Raises ConfigError for a key that is not a field (with the nearest), a value of the wrong type,
    or a value that the config's own `__post_init__` refuses.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    origins = dict.fromkeys(fields, "default")
    for origin, layer in layers:
        for key, raw in layer.items():
            if key not in fields:
                raise ConfigError(f"Unknown setting {key!r}", where=origin, cure=nearest(key, fields))
            values[key] = cast(raw, hints[key], f"{origin}: {key}")
            origins[key] = origin
    try:
        return Resolved(cls(**values), origins)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"Settings do not fit: {error}", where=cls.__module__) from error


def cast(raw: Any, hint: Any, where: str) -> Any:
    """`raw` as `hint`; "1e-5" is a number where a number is wanted. Raises ConfigError."""
    adapter, error_type = _adapter(hint)
    if isinstance(raw, bool) and hint in (int, float):
        raise ConfigError(f"{raw!r} is not a number", where=where, cure=f"Expected {_plain(hint)}.")
    try:
        value = adapter.validate_python(raw)
    except error_type as error:
        first = error.errors()[0]  # type: ignore[attr-defined]
        raise ConfigError(
            f"{raw!r} is not a valid value: {first['msg']}", where=where, cure=f"Expected {_plain(hint)}."
        ) from None
    if isinstance(value, float) and math.isnan(value):
        raise ConfigError("The value is not a number (nan)", where=where, cure=f"Expected {_plain(hint)}.")
    return value


@cache
def _adapter(hint: Any) -> tuple[Any, type[Exception]]:
    # pydantic costs a quarter of a second; listing and help never come here.
    from pydantic import TypeAdapter, ValidationError

    return TypeAdapter(hint), ValidationError


def _plain(hint: Any) -> str:
    return getattr(hint, "__name__", None) or str(hint).replace("typing.", "")


def parse_sets(pairs: Sequence[str]) -> dict[str, Any]:
    """`["lr=1e-4", "tags=[a, b]"]` as a dict; values are read as YAML. Raises ConfigError."""
    import yaml

    out: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {pair!r} is not key=value", cure="Write e.g. --set lr=1e-4.")
        if key.strip() in out:
            raise ConfigError(f"--set names {key.strip()!r} twice", cure="Keep one.")
        try:
            out[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            problem = getattr(error, "problem", None) or "it is no plain value"
            raise ConfigError(f"--set {pair!r} cannot be read: {problem}", cure="Quote the value.") from None
    return out


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON values, keys in field order."""
    return dataclasses.asdict(config)


class FieldHelp(NamedTuple):
    """One setting as help and pages show it."""

    name: str
    type: str
    default: Any
    doc: str


def describe(cls: type) -> list[FieldHelp]:
    """Every field of a config with its type, default and the docstring under it."""
    docs = _field_docs(cls)
    return [
        FieldHelp(
            f.name, f.type if isinstance(f.type, str) else _plain(f.type), _default(f), docs.get(f.name, "")
        )
        for f in dataclasses.fields(cls)
    ]


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None


def _field_docs(cls: type) -> dict[str, str]:
    """The string literal that follows each annotated field in the class body."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs: dict[str, str] = {}
    for field, doc in zip(body.body, body.body[1:], strict=False):
        named = isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if named and isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant):
            docs[field.target.id] = inspect.cleandoc(str(doc.value.value))  # type: ignore[union-attr,attr-defined]
    return docs
