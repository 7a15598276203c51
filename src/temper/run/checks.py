"""What is checked before work starts: kinds, needs, extras and the parts of the data."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from temper.core.card import Card, Verb
from temper.core.errors import ConfigError, DataError, NeedsError, nearest
from temper.systems.names import HUB_NAME, check_base, kind_of

if TYPE_CHECKING:
    from temper.data.schemas import Data

__all__ = [
    "check_extras",
    "check_kind",
    "check_parts",
    "check_system",
    "check_verb",
    "wants_system",
]

REMOTE_CAPABILITIES = frozenset({"generate", "logprobs"})
KIND_NAMES = {
    "CausalLM": "a language model",
    "Encoder": "a text encoder",
    "ImageClassifier": "an image classifier",
    "DualEncoder": "an image and text encoder",
    "VisionLM": "a language model that sees",
    "Diffusion": "an image generator",
    "Remote": "an endpoint",
}


def check_verb(slug: str, card: Card, verb: str) -> None:
    """Raise ConfigError unless the method offers the verb."""
    if verb not in card.verbs:
        raise ConfigError(f"{slug!r} has no verb {verb!r}", cure=f"It offers: {', '.join(card.verbs)}.")


def wants_system(card: Card) -> bool:
    """Whether the method's verbs take a system; one without kinds works on data alone."""
    return bool(card.kinds)


def check_kind(slug: str, card: Card, base: str) -> None:
    """Raise, before weights load, for a name no base can have or a kind of system the method cannot use."""
    check_base(base)
    kind = kind_of(base)
    lacking = sorted(card.needs - REMOTE_CAPABILITIES) if kind == "Remote" else []
    # A hub name counts as a language model until its config is read.
    is_known = kind != "CausalLM" or not HUB_NAME.fullmatch(base)
    if card.kinds and is_known and (kind not in card.kinds or lacking):
        why = f"needs {', '.join(lacking)}" if lacking else f"runs on {', '.join(card.kinds)}"
        raise NeedsError(
            f"{slug!r} {why}; {base!r} is {KIND_NAMES[kind]}", cure=f"Choose {_choice(card.kinds)}."
        )


def _choice(kinds: Sequence[str]) -> str:
    return " or ".join(KIND_NAMES[kind] for kind in kinds)


def check_system(slug: str, card: Card, system: Any) -> None:
    """Raise NeedsError for a loaded system of the wrong kind or without a needed capability."""
    kind = getattr(type(system), "kind", type(system).__name__)
    if card.kinds and kind not in card.kinds:
        raise NeedsError(f"{slug!r} runs on {', '.join(card.kinds)}, not on a {kind}", where=str(system.spec))
    missing = sorted(card.needs - system.capabilities)
    if missing:
        have = ", ".join(sorted(system.capabilities)) or "nothing"
        raise NeedsError(
            f"{slug!r} needs {', '.join(missing)}; {system.spec!r} offers {have}",
            cure="Choose another system.",
        )


def check_extras(slug: str, card: Card) -> None:
    """Raise NeedsError with the install line when an optional dependency is missing."""
    missing = [name for name in card.extras if not _installed(name)]
    if missing:
        raise NeedsError(f"{slug!r} needs {', '.join(missing)}", cure=f"pip install {' '.join(missing)}")


def _installed(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return importlib.util.find_spec(name.replace("-", "_")) is not None
    return True


def check_parts(slug: str, wanted: Mapping[str, str], data: Data, verb: Verb) -> None:
    """Raise DataError for a wanted part that is missing or empty, naming those there are."""
    for name in wanted:
        part, may_miss = name.removesuffix("?"), name.endswith("?")
        if part not in data:
            if may_miss:
                continue
            raise DataError(
                f"{verb} {slug!r} needs the part {part!r}; the data has {', '.join(data) or 'none'}",
                where=data.source,
                cure=f"Name it: --data {part}=FILE. {nearest(part, data)}".strip(),
            )
        if not len(data[part]):
            raise DataError(f"The part {part!r} is empty", where=data.source, cure="Give at least one row.")
