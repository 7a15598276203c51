"""The data of a step: specs, earlier steps' output, and the parts a verb wants."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from temper.core.card import Card, Verb
from temper.core.errors import ConfigError, DataError, nearest
from temper.core.spec import parse_data
from temper.run.checks import check_parts
from temper.run.recipe import DataRef

if TYPE_CHECKING:
    from temper.data.schemas import Data

__all__ = ["check_part_names", "data_steps", "load_inputs", "no_data", "wanted_parts"]


def wanted_parts(card: Card, verb: Verb) -> Mapping[str, str]:
    """Part -> schema of what a verb takes; a name ending in "?" may be missing."""
    return card.data.get(verb, {})


def check_part_names(ref: DataRef, readers: Iterable[tuple[str, Card, Verb]]) -> None:
    """Raise ConfigError for a part named in `ref` that none of those who read it wants: most likely a slip."""
    if not isinstance(ref, Mapping):
        return
    readers = list(readers)
    known = {part.removesuffix("?") for _, card, verb in readers for part in wanted_parts(card, verb)}
    for part in ref:
        if known and part not in known:
            who = " or ".join(dict.fromkeys(f"{verb} {slug!r}" for slug, _, verb in readers))
            raise ConfigError(f"No part {part!r} is read by {who}", cure=nearest(part, known))


def data_steps(ref: DataRef) -> list[str]:
    """The step ids that a data reference names, in order, each once."""
    specs = [] if ref is None else [ref] if isinstance(ref, str) else list(ref.values())
    parsed = [parse_data(spec) for spec in specs]
    return list(dict.fromkeys(p.name for p in parsed if p.kind == "step"))


def no_data() -> Data:
    """Data without parts, for verbs that take none."""
    from temper.data.schemas import Data

    return Data({}, "none")


def load_inputs(
    slug: str, card: Card, verb: Verb, ref: DataRef, made: Mapping[str, Path], limit: int | None = None
) -> Data:
    """The data a verb gets, checked: its parts are there and not empty.

    `made` gives the data folder of each earlier `make` step. Raises ConfigError, DataError.
    """
    from temper.data.loading import load_data

    wanted = wanted_parts(card, verb)
    if ref is None:
        if any(not part.endswith("?") for part in wanted):
            parts = ", ".join(wanted)
            raise ConfigError(
                f"{verb} {slug!r} needs data ({parts})",
                cure="Add data: to the recipe, or --data [PART=]SPEC.",
            )
        return no_data()
    data = load_data(_as_files(ref, made), wanted or None, limit=limit)
    check_parts(slug, wanted, data, verb)
    return data


def _as_files(ref: str | Mapping[str, str], made: Mapping[str, Path]) -> str | dict[str, str]:
    """The reference with step ids replaced by the files those steps wrote."""
    if isinstance(ref, str):
        spec = parse_data(ref)
        if spec.kind != "step":
            return ref
        if not spec.fields:
            return _files(spec.name, made)
        ref = {spec.fields[0]: ref}
    return {part: _of_step(part, text, made) for part, text in ref.items()}


def _of_step(part: str, text: str, made: Mapping[str, Path]) -> str:
    """The file of a part: the one that the spec names, or that of the same name, or the only one there is."""
    spec = parse_data(text)
    if spec.kind != "step":
        return text
    files = _files(spec.name, made)
    if not spec.fields and len(files) == 1:
        return next(iter(files.values()))
    wanted = spec.fields[0] if spec.fields else part
    if wanted not in files:
        raise DataError(f"Step {spec.name!r} made no part {wanted!r}", cure=f"It made: {', '.join(files)}.")
    return files[wanted]


def _files(step: str, made: Mapping[str, Path]) -> dict[str, str]:
    """The parts that a step made, each with its file."""
    if step not in made:
        raise ConfigError(
            f"{step!r} is neither data nor an earlier make step",
            cure="Use builtin:NAME, asset:NAME, hub:owner/name or a .jsonl, .csv or .parquet file.",
        )
    found = {path.stem: str(path) for path in sorted(made[step].glob("*.jsonl"))}
    if not found:
        raise DataError(f"Step {step!r} made no data", where=str(made[step]))
    return found
