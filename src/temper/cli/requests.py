"""The options that `run` and `plan` share, as a Request."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from temper.core.errors import ConfigError
from temper.core.types import Json
from temper.run.plan import Request

__all__ = [
    "Arms",
    "BaseUrl",
    "DataOption",
    "Device",
    "Out",
    "Precision",
    "Recipe",
    "Seeds",
    "SetOption",
    "Source",
    "SystemOption",
    "VerbOption",
    "build_request",
    "parse_parts",
]

Source = Annotated[str, typer.Argument(help="A method's slug, or a pipeline's .yaml file.")]
Recipe = Annotated[str | None, typer.Option(help="tiny, small or paper.")]
VerbOption = Annotated[str | None, typer.Option("--verb", help="Which verb, when running on your own data.")]
SystemOption = Annotated[str | None, typer.Option("--system", help="base[+artefact[@strength]]...")]
DataOption = Annotated[list[str] | None, typer.Option("--data", help="SPEC, or PART=SPEC; may be repeated.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="key=value, or STEP.key=value in a pipeline.")
]
Seeds = Annotated[str | None, typer.Option(help="Seeds, e.g. 0,1,2.")]
Arms = Annotated[str | None, typer.Option(help="Only these arms, e.g. a,b.")]
Out = Annotated[str, typer.Option(help="Folder of runs.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:N or mps.")]
Precision = Annotated[str | None, typer.Option(help="float32, bf16 or auto.")]
BaseUrl = Annotated[str | None, typer.Option("--base-url", help="Address of an OpenAI-compatible endpoint.")]


def build_request(
    source: str,
    *,
    recipe: str | None,
    verb: str | None,
    system: str | None,
    data: list[str] | None,
    sets: list[str] | None,
    seeds: str | None,
    arms: str | None,
    out: str,
    options: dict[str, Json],
) -> Request:
    """The request that the options spell; raises ConfigError."""
    return Request(
        source=source,
        recipe=recipe,
        verb=verb,
        system=system,
        data=parse_parts(data),
        sets=tuple(sets or ()),
        seeds=_seeds(seeds),
        arms=_arms(arms),
        out=out,
        options={key: value for key, value in options.items() if value is not None},
    )


def parse_parts(data: list[str] | None) -> str | dict[str, str] | None:
    """`["SPEC"]` as a spec, `["part=SPEC", ...]` as parts; raises ConfigError for a mixture."""
    if not data:
        return None
    parts: dict[str, str] = {}
    for text in data:
        match = re.match(r"([A-Za-z]\w*)=(.+)", text)
        if match is None:
            if len(data) > 1:
                raise ConfigError(f"--data {text!r} names no part", cure="Write --data PART=SPEC for each.")
            return text
        if match[1] in parts:
            raise ConfigError(f"--data names the part {match[1]!r} twice", cure="Keep one.")
        parts[match[1]] = match[2]
    return parts


def _arms(text: str | None) -> tuple[str, ...]:
    if text is None:
        return ()
    arms = tuple(arm.strip() for arm in text.split(","))
    if not all(arms):
        raise ConfigError(f"--arms {text!r} is not a list of names", cure="Write e.g. --arms a,b.")
    return arms


def _seeds(text: str | None) -> tuple[int, ...]:
    if text is None:
        return ()
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise ConfigError(
            f"--seeds {text!r} is not a list of whole numbers", cure="Write e.g. --seeds 0,1,2."
        )
    return tuple(int(part) for part in parts)
