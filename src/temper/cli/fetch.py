"""`temper fetch`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from temper.cli.bar import make_ticker
from temper.cli.output import AsJson, bytes_text, print_json, print_table, say

__all__ = ["fetch_command", "register"]


def register(app: typer.Typer, name: str, help_line: str) -> None:
    """Add the command to the app."""
    app.command(name, help=help_line)(fetch_command)


def fetch_command(
    names: Annotated[
        list[str] | None, typer.Argument(help="Assets; all that need no consent without.")
    ] = None,
    accept: Annotated[bool, typer.Option("--accept", help="Agree to the terms of opt-in assets.")] = False,
    only_list: Annotated[bool, typer.Option("--list", help="Print what there is; download nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Download, check and convert assets into the cache; those already there are left alone."""
    from temper.data import assets

    known = assets.available()
    if only_list:
        _print([_record(info, assets.is_cached(name)) for name, info in known.items()], as_json)
        return
    chosen = names or [name for name, info in known.items() if not info.opt_in]
    for name in chosen:
        assets.is_cached(name)  # an unknown name stops before anything is downloaded
    records: list[dict[str, Any]] = []
    for name in chosen:
        if not assets.is_cached(name):
            say(
                f"fetching {name}: {known[name].title}, {bytes_text(known[name].size_bytes)}, {known[name].licence}"
            )
        path = assets.fetch(name, accept=accept, ticker=make_ticker())
        records.append({**_record(known[name], True), "path": str(path)})
    _print(records, as_json)


def _record(info: Any, cached: bool) -> dict[str, Any]:
    return {
        "name": info.name,
        "title": info.title,
        "kind": info.kind,
        "licence": info.licence,
        "opt_in": info.opt_in,
        "size_bytes": info.size_bytes,
        "cached": cached,
    }


def _print(records: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print_json(records)
        return
    rows = [
        (r["name"], r["kind"], bytes_text(r["size_bytes"]), r["licence"], "opt-in" if r["opt_in"] else "",
         r.get("path") or ("cached" if r["cached"] else "-"))
        for r in records
    ]  # fmt: skip
    print_table(("asset", "kind", "download", "licence", "", "where"), rows)
