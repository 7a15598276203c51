"""Methods found by looking at folders: `methods/<family>/<name>/card.py`; the folder is the registration.

TEMPER_METHODS may name further folders of families (`:`-separated) for methods that live outside
the package. Nothing here imports torch.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

from temper.core.card import Card, Verb
from temper.core.errors import ConfigError, nearest

__all__ = ["Entry", "entries", "find", "load_card", "load_method", "load_story", "load_verb", "slugs"]

BUILTIN = Path(__file__).parent.parent / "methods"


@dataclass(frozen=True)
class Entry:
    """Where a method lives; reading it imports nothing."""

    slug: str
    family: str
    folder: Path

    def file(self, name: str) -> Path:
        return self.folder / name


def _roots() -> list[Path]:
    extra = os.environ.get("TEMPER_METHODS", "")
    return [BUILTIN, *(Path(part) for part in extra.split(os.pathsep) if part)]


def entries() -> Mapping[str, Entry]:
    """Every method by slug, sorted by family and name; raises ConfigError for a slug taken twice."""
    return _scan(tuple(_roots()))


@cache
def _scan(roots: tuple[Path, ...]) -> Mapping[str, Entry]:
    found: dict[str, Entry] = {}
    for root in roots:
        for card in sorted(root.glob("*/*/card.py")):
            folder = card.parent
            slug = folder.name.replace("_", "-")
            if slug in found:
                raise ConfigError(
                    f"Two methods are named {slug!r}",
                    where=f"{found[slug].folder} and {folder}",
                    cure="Rename one of the folders.",
                )
            found[slug] = Entry(slug, folder.parent.name, folder)
    return found


def slugs() -> list[str]:
    """All method slugs."""
    return list(entries())


def find(slug: str) -> Entry:
    """The entry of a slug; raises ConfigError with the nearest names for an unknown one."""
    known = entries()
    if slug not in known:
        raise ConfigError(f"There is no method {slug!r}", cure=nearest(slug, known) or "See `temper list`.")
    return known[slug]


def load_card(slug: str) -> Card:
    """A method's card; imports its `card.py` only."""
    card = _module(find(slug), "card").CARD
    if not isinstance(card, Card):
        raise ConfigError(f"CARD of {slug!r} is not a Card", where=str(find(slug).file("card.py")))
    return card


def load_story(slug: str) -> str:
    """The docstring of a method's `card.py`."""
    return _module(find(slug), "card").__doc__ or ""


def load_method(slug: str) -> ModuleType:
    """A method's `method.py`; this is where torch may be imported."""
    return _module(find(slug), "method")


def load_verb(slug: str, verb: Verb):  # type: ignore[no-untyped-def]
    """The function behind a verb; raises ConfigError if the method has no such verb."""
    card = load_card(slug)
    if verb not in card.verbs:
        raise ConfigError(f"{slug!r} has no verb {verb!r}", cure=f"It offers: {', '.join(card.verbs)}.")
    return getattr(load_method(slug), verb)


def _module(entry: Entry, name: str) -> ModuleType:
    if entry.folder.parent.parent == BUILTIN:
        return importlib.import_module(f"temper.methods.{entry.family}.{entry.folder.name}.{name}")
    return _outside(entry.folder, entry.family, name)


@cache
def _outside(folder: Path, family: str, name: str) -> ModuleType:
    """A module of a method outside the package, under a package name of its own."""
    # Two folders of methods may hold the same family and name, one after the other in one process.
    package = f"temper_methods_{zlib.crc32(str(folder.resolve()).encode()):08x}_{family}_{folder.name}"
    if package not in sys.modules:
        spec = importlib.util.spec_from_loader(package, loader=None, is_package=True)
        assert spec is not None
        parent = importlib.util.module_from_spec(spec)
        parent.__path__ = [str(folder)]
        sys.modules[package] = parent
    return importlib.import_module(f"{package}.{name}")
