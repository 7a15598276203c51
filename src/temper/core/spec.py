"""The short names of systems and data, parsed.

system   base[+artefact[@strength]]...      smollm2-135m+runs/refusal-7f3a@0.8
data     builtin:NAME[:PART]  asset:NAME[:PART]  world:WORLD:SET[:STYLE][:PART]  hub:owner/name[:config][:split]  FILE  FOLDER/  STEP-ID
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from temper.core.errors import ConfigError

__all__ = ["DATA_SUFFIXES", "ArtefactRef", "DataSpec", "SystemSpec", "parse_data", "parse_system"]

DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


@dataclass(frozen=True)
class ArtefactRef:
    """An artefact in a system spec: a run folder, an artefact folder or an earlier step's id."""

    name: str
    strength: float = 1.0


@dataclass(frozen=True)
class SystemSpec:
    """A base model and what is applied to it, in order."""

    base: str
    artefacts: tuple[ArtefactRef, ...] = ()

    def __str__(self) -> str:
        parts = [a.name if a.strength == 1.0 else f"{a.name}@{a.strength:g}" for a in self.artefacts]
        return "+".join([self.base, *parts])


@dataclass(frozen=True)
class DataSpec:
    """Where data comes from: `kind`, its name, and the rest of the colon-separated fields."""

    kind: Literal["builtin", "asset", "world", "hub", "file", "folder", "step"]
    name: str
    fields: tuple[str, ...] = ()

    def __str__(self) -> str:
        head = [] if self.kind in ("file", "folder", "step") else [self.kind]
        return ":".join([*head, self.name, *self.fields])


def parse_system(text: str) -> SystemSpec:
    """Split `base+artefact@strength`; raises ConfigError for an empty part or a bad strength."""
    base, *rest = text.split("+")
    if not base.strip():
        raise ConfigError(f"System spec {text!r} names no base", cure="Write base[+artefact[@strength]].")
    return SystemSpec(base.strip(), tuple(_artefact(part, text) for part in rest))


def _artefact(part: str, text: str) -> ArtefactRef:
    match = re.fullmatch(r"(?P<name>[^@]+)(?:@(?P<strength>[^@]*))?", part.strip())
    if match is None:
        raise ConfigError(
            f"System spec {text!r} has an empty artefact", cure="Write base+artefact[@strength]."
        )
    raw = match["strength"]
    try:
        return ArtefactRef(match["name"], 1.0 if raw is None else float(raw))
    except ValueError:
        raise ConfigError(
            f"Strength {raw!r} is not a number", where=f"system spec {text!r}", cure="Write e.g. +name@0.8."
        ) from None


def parse_data(text: str) -> DataSpec:
    """Recognise one of the six forms; raises ConfigError for an empty or unknown one.

    A folder ends in "/", or is there and is no plain word: that is a step's id, and ID:PART one part of what it made.
    """
    head, *rest = text.split(":")
    if head in ("builtin", "asset", "world", "hub"):
        if not rest or not rest[0]:
            raise ConfigError(f"Data spec {text!r} names nothing after {head}:", cure=f"Write {head}:NAME.")
        return DataSpec(head, rest[0], tuple(rest[1:]))  # type: ignore[arg-type]
    if text.lower().endswith(DATA_SUFFIXES):
        return DataSpec("file", text)
    if re.fullmatch(r"[A-Za-z][\w-]*(:\w+)?", text):
        return DataSpec("step", head, tuple(rest))
    if text.endswith("/") or (text.strip() and Path(text).expanduser().is_dir()):
        return DataSpec("folder", text)
    raise ConfigError(
        f"Data spec {text!r} is not understood",
        cure="Use builtin:NAME, asset:NAME, world:captions:SET, hub:owner/name[:config][:split], a .jsonl, .csv or .parquet file, "
        "or a folder.",
    )
