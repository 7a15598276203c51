"""Synthetic worlds: data with known ground truth, drawn from seeds in numpy."""

from __future__ import annotations

from temper.core.errors import ConfigError, nearest
from temper.data.schemas import Record

__all__ = ["load_world", "world_sets"]

WORLDS = ("captions",)


def load_world(name: str, limit: int | None = None) -> dict[str, tuple[Record, ...]]:
    """The parts of a world's data set, `WORLD:SET[:STYLE][:PART]`, e.g. `captions:DOM32:sketch` or `captions:CAP32:train`.

    `limit` is the records of each part, from its beginning; no more than these are made. The same name gives the
    same records on every machine. Raises ConfigError for unknown names.
    """
    world, *fields = name.split(":")
    if world not in WORLDS:
        raise ConfigError(f"There is no world {world!r}", cure=nearest(world, WORLDS))
    if not fields:
        raise ConfigError(
            "A world has several sets", where=name, cure=f"Choose one: {', '.join(world_sets())}."
        )
    from temper.data.worlds.captions.sets import load_set

    return load_set(fields, limit)


def world_sets() -> dict[str, str]:
    """Every set's name, as `load_world` takes it, and what is in it."""
    from temper.data.worlds.captions.sets import SETS

    return {f"captions:{name}": world.title for name, world in SETS.items()}
