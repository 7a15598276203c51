"""A system from its spec, with its artefacts in force: for settings that name a second system to compare with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from temper.artefacts.loading import load_artefact
from temper.core.spec import parse_system

__all__ = ["opened"]


@contextmanager
def opened(spec: str, **options: Any) -> Iterator[Any]:
    """The system that a spec names; `options` are those of `load_base`, and artefacts are folders."""
    from temper.systems.loading import load_base

    parsed = parse_system(spec)
    artefacts = [(load_artefact(ref.name), ref.strength) for ref in parsed.artefacts]
    system: Any = load_base(parsed.base, **options)
    with ExitStack() as stack:
        for artefact, strength in artefacts:
            system = stack.enter_context(artefact.apply(system, strength))
        yield system
