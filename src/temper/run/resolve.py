"""Systems from specs: a base, loaded once a process, with its artefacts applied for as long as it is open."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from temper.core.spec import SystemSpec, parse_system
from temper.run.artefact_paths import base_identity, locate
from temper.run.options import Options
from temper.store.atomic import canonical
from temper.systems.freed_memory import trim_heap

if TYPE_CHECKING:
    from temper.systems.base import System

__all__ = ["drop_bases", "load_system", "open_system", "release_memory"]

_bases: dict[tuple[Any, ...], Any] = {}


def load_system(name: str, options: Options | None = None) -> System:
    """A base by name; kept until another one is asked for, since every artefact leaves it bit-identical."""
    options = options or Options()
    # A folder's identity holds its files, so that a changed one, or one of the same name elsewhere, is loaded anew.
    place = canonical(base_identity(name))
    key = (place, options.device, options.system_prompt, options.base_url, _dtype(options))
    if key not in _bases:
        drop_bases()  # before loading, so that two models are never in memory at once
        _bases[key] = _load(name, options)
    return _bases[key]


def _load(name: str, options: Options) -> System:
    from temper.systems.loading import load_base

    if name.startswith("world:"):
        from temper.ops.world_models import ensure

        ensure(name.removeprefix("world:"))
    return load_base(
        name,
        device=options.device,
        dtype=_dtype(options),
        system_prompt=options.system_prompt,
        base_url=options.base_url,
    )


def _dtype(options: Options) -> str:
    """Weights stay float32; bf16 is an autocast of the operations that gain from it."""
    return "float32"


def release_memory() -> None:
    """Give freed memory back to the system: on glibc the heap of a finished step would stay with the process."""
    gc.collect()
    trim_heap()


def drop_bases() -> None:
    """Forget the loaded base."""
    _bases.clear()


@contextmanager
def open_system(
    spec: str | SystemSpec,
    options: Options | None = None,
    *,
    artefacts: Mapping[str, Path] | None = None,
    out: Path = Path("runs"),
) -> Iterator[System]:
    """The system a spec names; its artefacts are in force inside the context only.

    `artefacts` gives the folders of names that are no paths (a recipe's step ids).
    """
    parsed = parse_system(spec) if isinstance(spec, str) else spec
    known = artefacts or {}
    # Every artefact is found before the base loads.
    folders = [known[a.name] if a.name in known else locate(a.name, out) for a in parsed.artefacts]
    release_memory()
    with ExitStack() as stack:
        system = load_system(parsed.base, options)
        for ref, folder in zip(parsed.artefacts, folders, strict=True):
            from temper.artefacts import loading

            system = stack.enter_context(loading.load_artefact(folder).apply(system, ref.strength))
        yield system
