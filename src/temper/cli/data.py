"""`temper data show`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import typer

from temper.cli.output import AsJson, print_json, say
from temper.cli.requests import BaseUrl, Device, parse_parts
from temper.core.errors import ConfigError

__all__ = ["register", "show_data"]

ON, OFF = "\033[32m", "\033[0m"


def register(app: typer.Typer, name: str, help_line: str) -> None:
    """Add the command and its subcommand to the app."""
    group = typer.Typer(no_args_is_help=True, help=help_line)
    group.command("show", help="Print records; with --mask the tokens that are trained.")(show_data)
    group.callback()(_only_groups)
    app.add_typer(group, name=name)


def _only_groups() -> None:
    """Nothing: `show` is the command."""


def show_data(
    sources: Annotated[list[str], typer.Argument(help="A data spec, or PART=SPEC.")],
    system: Annotated[str | None, typer.Option("--system", help="Whose tokenizer and template.")] = None,
    mask: Annotated[bool, typer.Option("--mask", help="Show each token and whether it is trained.")] = False,
    schema: Annotated[str | None, typer.Option(help="Read the rows as this schema.")] = None,
    part: Annotated[str | None, typer.Option(help="Only this part.")] = None,
    train_on: Annotated[str, typer.Option("--train-on", help="assistant, last or all.")] = "assistant",
    max_tokens: Annotated[int | None, typer.Option(help="Cut rows to so many tokens.")] = None,
    limit: Annotated[int, typer.Option(help="Records of each part.")] = 3,
    device: Device = None,
    base_url: BaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """Print the first records of each part, as read; with --mask as the training loop sees them."""
    from temper.data.loading import load_data

    if train_on not in ("assistant", "last", "all"):
        raise ConfigError(f"--train-on {train_on!r} is unknown", cure="Use assistant, last or all.")
    if mask and system is None:
        raise ConfigError("--mask needs a system, whose tokens are shown", cure="Add --system NAME.")
    if limit < 1:
        raise ConfigError(f"--limit {limit} is below 1")
    if max_tokens is not None and max_tokens < 1:
        raise ConfigError(f"--max-tokens {max_tokens} is below 1")
    data = load_data(parse_parts(sources) or "", schema, limit=limit)
    chosen = {part: data[part]} if part else {name: data[name] for name in data}
    if not mask:
        _print_records(chosen, as_json)
        return
    from temper.run.options import resolve_options
    from temper.run.resolve import open_system

    options = resolve_options({}, {"device": device, "base_url": base_url})
    with open_system(str(system), options) as opened:
        _print_masks(opened, chosen, train_on, max_tokens, as_json)


def _print_records(parts: Mapping[str, Sequence[Any]], as_json: bool) -> None:
    from temper.data.schemas import to_row

    rows = (
        {"part": name, "schema": type(r).__name__, **to_row(r)}
        for name, records in parts.items()
        for r in records
    )
    if as_json:
        print_json(iter(rows))
        return
    for row in rows:
        print(f"{row.pop('part')} ({row.pop('schema')})")
        for key, value in row.items():
            print(f"  {key}: {value}")


def _print_masks(
    system: Any, parts: Mapping[str, Sequence[Any]], train_on: str, max_tokens: int | None, as_json: bool
) -> None:
    masks = list(_masks(system, parts, train_on, max_tokens))  # a bad row stops before half a document is out
    if as_json:
        print_json(masks)
        return
    for row in masks:
        print(f"{row['part']} {row['id']}: {row['num_scored']} of {len(row['tokens'])} tokens are trained")
        print(_drawn(row["tokens"]) + "\n")
    say("trained tokens stand " + ("in green" if _has_colour() else "in «guillemets»"))


def _masks(
    system: Any, parts: Mapping[str, Sequence[Any]], train_on: str, max_tokens: int | None
) -> Iterator[dict[str, Any]]:
    from temper.ops.batching import encode

    for name, records in parts.items():
        for record in records:
            example = encode(system, record, train_on=train_on, max_tokens=max_tokens)  # type: ignore[arg-type]
            tokens = [
                {"id": i, "text": system.tokenizer.decode([i]), "scored": bool(s)}
                for i, s in zip(example.ids, example.scored, strict=True)
            ]
            yield {"part": name, "id": record.id, "num_scored": sum(example.scored), "tokens": tokens}


def _drawn(tokens: list[dict[str, Any]]) -> str:
    """The row as text; neighbouring trained tokens are marked together."""
    marks = (ON, OFF) if _has_colour() else ("«", "»")
    out: list[str] = []
    inside = False
    for token in tokens:
        if token["scored"] != inside:
            out.append(marks[0] if token["scored"] else marks[1])
            inside = token["scored"]
        out.append(token["text"])
    return "".join(out) + (marks[1] if inside else "")


def _has_colour() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ
