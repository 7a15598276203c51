"""`temper fetch`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from temper.cli.bar import make_ticker
from temper.cli.output import AsJson, bytes_text, print_json, print_table, say

__all__ = ["fetch_command", "register"]

WORLD = "world:"


def register(app: typer.Typer, name: str, help_line: str) -> None:
    """Add the command to the app."""
    app.command(name, help=help_line)(fetch_command)


def fetch_command(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="Assets, or world:MODEL, trained here in minutes; all assets that need no consent without."
        ),
    ] = None,
    accept: Annotated[bool, typer.Option("--accept", help="Agree to the terms of opt-in assets.")] = False,
    only_list: Annotated[bool, typer.Option("--list", help="Print what there is; download nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Download, check and convert assets into the cache, and train a world's models; what is there is left alone."""
    from temper.data import assets

    known = assets.available()
    if only_list:
        listed = [_record(info, assets.is_cached(name)) for name, info in known.items()]
        _print([*listed, *(_world_record(name) for name in _world_names())], as_json)
        return
    chosen = names or [name for name, info in known.items() if not info.opt_in]
    for name in chosen:
        _check(name)  # an unknown name stops before anything is downloaded
    records = [_trained(name) if name.startswith(WORLD) else _fetched(name, accept) for name in chosen]
    _print(records, as_json)


def _check(name: str) -> None:
    if name.startswith(WORLD):
        from temper.systems.names import check_base

        check_base(name)
    else:
        from temper.data import assets

        assets.is_cached(name)


def _fetched(name: str, accept: bool) -> dict[str, Any]:
    from temper.data import assets

    info = assets.available()[name]
    if not assets.is_cached(name):
        say(f"fetching {name}: {info.title}, {bytes_text(info.size_bytes)}, {info.licence}")
    path = assets.fetch(name, accept=accept, ticker=make_ticker())
    return {**_record(info, True), "path": str(path)}


def _trained(name: str) -> dict[str, Any]:
    from temper.ops import world_models

    model = name.removeprefix(WORLD)
    if not world_models.is_ready(model):
        say(f"training {name}: {world_models.world_model(model).title}; this takes minutes")
    path = world_models.ensure(model)
    return {**_world_record(name), "cached": True, "path": str(path)}


def _world_names() -> list[str]:
    from temper.systems.names import WORLD_MODELS

    return [f"{WORLD}{name}" for name in sorted(WORLD_MODELS)]


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


def _world_record(name: str) -> dict[str, Any]:
    """What `--list` says of a model that is trained here; it does not import torch to look at its parameters."""
    from temper.core.errors import NeedsError
    from temper.data.worlds.folders import world_folder

    try:
        is_there = world_folder(name.removeprefix(WORLD)).is_dir()
    except NeedsError:
        is_there = False
    return {
        "name": name,
        "title": "reference model of the caption world",
        "kind": "trained here",
        "licence": "Apache-2.0",
        "opt_in": False,
        "size_bytes": 0,
        "cached": is_there,
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
