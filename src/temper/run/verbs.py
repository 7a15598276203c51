"""The four verbs from Python, with the same checks as from a recipe.

artefact = fit("npo", "smollm2-135m", {"forget": "forget.jsonl", "retain": "retain.jsonl"}, beta=0.2)
rows = list(measure("sorry-bench", "smollm2-135m", "builtin:policy-mini"))
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from temper.core import config as core_config
from temper.core.card import Card, Verb
from temper.core.errors import ConfigError, ModelError
from temper.core.registry import load_card, load_verb
from temper.core.types import Attempt, Row, Run
from temper.run.checks import check_extras, check_kind, check_parts, check_system, check_verb, wants_system
from temper.run.inputs import check_part_names, load_inputs, wanted_parts
from temper.run.options import Options
from temper.run.recipe import DataRef
from temper.run.resolve import open_system

if TYPE_CHECKING:
    from temper.artefacts import Artefact
    from temper.data.schemas import Data, Record
    from temper.systems.base import System

    DataLike = Data | Iterable[Record] | DataRef

__all__ = ["attack", "call_verb", "fit", "make", "measure"]


def fit(
    slug: str,
    system: System | str,
    data: DataLike = None,
    *,
    config: Any = None,
    run: Run | None = None,
    **settings: Any,
) -> Artefact:
    """What the method's `fit` leaves; the system stays as it was."""
    run = run or Run()
    call = _Call(slug, "fit", system, data, config, settings, run)
    with call.opened() as opened:
        return call_verb(slug, "fit", opened, call.data, call.config, run)


def make(
    slug: str,
    system: System | str | None,
    data: DataLike = None,
    *,
    config: Any = None,
    run: Run | None = None,
    **settings: Any,
) -> Data:
    """The data that the method's `make` gives."""
    run = run or Run()
    call = _Call(slug, "make", system, data, config, settings, run)
    with call.opened() as opened:
        return call_verb(slug, "make", opened, call.data, call.config, run)


def attack(
    slug: str,
    system: System | str,
    data: DataLike = None,
    *,
    config: Any = None,
    run: Run | None = None,
    **settings: Any,
) -> Iterator[Attempt]:
    """The method's attempts, one by one; all checks come before the first."""
    return _stream(_Call(slug, "attack", system, data, config, settings, run or Run()))


def measure(
    slug: str,
    system: System | str | None,
    data: DataLike = None,
    *,
    config: Any = None,
    run: Run | None = None,
    **settings: Any,
) -> Iterator[Row]:
    """The method's rows, one by one; all checks come before the first."""
    return _stream(_Call(slug, "measure", system, data, config, settings, run or Run()))


def _stream(call: _Call) -> Iterator[Any]:
    def results() -> Iterator[Any]:
        with call.opened() as opened:
            yield from call_verb(call.slug, call.verb, opened, call.data, call.config, call.run)

    return results()


class _Call:
    """A verb's arguments, checked when made; only the system waits to be opened."""

    def __init__(
        self,
        slug: str,
        verb: Verb,
        system: Any,
        data: Any,
        config: Any,
        settings: Mapping[str, Any],
        run: Run,
    ) -> None:
        self.slug, self.verb, self.system, self.run = slug, verb, system, run
        card = load_card(slug)
        check_verb(slug, card, verb)
        check_extras(slug, card)
        self.config = _config(card, config, settings)
        if system is None and wants_system(card):
            raise ConfigError(f"{verb} {slug!r} needs a system", cure="Give a name or a System.")
        if isinstance(system, str):
            check_kind(slug, card, system.partition("+")[0])
        elif system is not None:
            check_system(slug, card, system)
        self.data = _data(slug, card, verb, data)

    def opened(self) -> AbstractContextManager[Any]:
        if isinstance(self.system, str):
            return open_system(self.system, Options(device=self.run.device, precision=self.run.precision))
        return nullcontext(self.system)


def _config(card: Card, config: Any, settings: Mapping[str, Any]) -> Any:
    if config is not None and settings:
        raise ConfigError("config and settings are both given", cure="Give one of them.")
    if isinstance(config, Mapping):
        return core_config.build(card.config, [("config", config)]).config
    if config is None:
        return core_config.build(card.config, [("settings", settings)]).config
    if not isinstance(config, card.config):
        raise ConfigError(f"config is a {type(config).__name__}, not the method's {card.config.__name__}")
    return config


def _data(slug: str, card: Card, verb: Verb, data: Any) -> Data:
    from temper.data.schemas import Data

    wanted = wanted_parts(card, verb)
    if data is None or isinstance(data, str) or (isinstance(data, Mapping) and _all_text(data)):
        check_part_names(data, [(slug, card, verb)])
        return load_inputs(slug, card, verb, data, {})
    if not isinstance(data, Data):
        required = [part.removesuffix("?") for part in wanted] or [Data.default_part]
        data = Data(data if isinstance(data, Mapping) else {required[0]: tuple(data)}, "in memory")
    check_parts(slug, wanted, data, verb)
    return data


def _all_text(data: Mapping[Any, Any]) -> bool:
    return not hasattr(data, "fingerprint") and all(isinstance(value, str) for value in data.values())


def call_verb(slug: str, verb: Verb, system: Any, data: Data, config: Any, run: Run) -> Any:
    """The verb's result; the system's needs are probed first, and a wrong kind of result is an error."""
    if system is not None:
        check_system(slug, load_card(slug), system)
    result = load_verb(slug, verb)(system, data, config, run)
    if result is None:
        raise ModelError(
            f"{verb} of {slug!r} returned nothing", cure="A verb returns its product; see its card."
        )
    return result
