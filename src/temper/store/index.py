"""A SQLite index of all runs in a folder; it can be deleted and rebuilt from them at any time."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from temper.core.errors import ConfigError, StoreError
from temper.core.types import Json
from temper.store import lines
from temper.store.atomic import disk_errors
from temper.store.folders import RunFolder, run_folders

__all__ = ["Indexed", "index_path", "query", "rebuild"]

SCHEMA = """
create table runs (id text primary key, path text, name text, method text, status text, created text, plan text);
create table rows (run text, step text, arm text, seed integer, metric text, value real, n integer, item text,
                   split text, grp text, low real, high real, method text, settings text, facts text);
create index rows_by_metric on rows (metric, method);
create index rows_by_run on rows (run);
"""
INSERT = "insert into rows values (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)"


class Indexed(NamedTuple):
    """What a rebuild found; `damaged` holds one message for each run that could not be read."""

    num_runs: int
    num_rows: int
    damaged: list[str]


def index_path(out: Path) -> Path:
    """Where the index of a folder of runs lies."""
    return out / "index.sqlite"


def rebuild(out: Path) -> Indexed:
    """Read every run and replace the index; a run that cannot be read is named and left out."""
    if not out.is_dir():
        raise ConfigError(
            f"There is no folder {str(out)!r}", cure="Run something first, or name it with --out."
        )
    draft = out / f".index.{os.getpid()}.sqlite"
    damaged: list[str] = []
    num_runs = num_rows = 0
    with disk_errors("write", index_path(out)):
        draft.unlink(missing_ok=True)
        try:
            with closing(_connect(draft)) as database:
                database.executescript(SCHEMA)
                for folder in run_folders(out):
                    try:
                        with database:  # a run goes in whole or not at all
                            num_rows += _add(database, folder)
                        num_runs += 1
                    except StoreError as error:
                        damaged.append(f"{folder.id}: {error}")
            os.replace(draft, index_path(out))
        except sqlite3.Error as error:
            raise StoreError(f"The index cannot be written: {error}", where=str(index_path(out))) from error
        finally:
            draft.unlink(missing_ok=True)
    return Indexed(num_runs, num_rows, damaged)


def _connect(path: Path) -> sqlite3.Connection:
    try:
        return sqlite3.connect(path)
    except sqlite3.Error as error:
        raise StoreError(
            f"The index cannot be opened: {error}",
            where=str(path),
            cure="Choose a folder that can be written.",
        ) from error


def _add(database: sqlite3.Connection, folder: RunFolder) -> int:
    record = folder.record()
    keys = ("name", "method", "status", "created", "plan")
    database.execute(
        "insert into runs values (?,?,?,?,?,?,?)",
        (folder.id, str(folder.path), *(record.get(k) for k in keys)),
    )
    total = 0
    for row in lines.read(folder.path / "rows.jsonl"):
        database.execute(INSERT, _values(folder.id, row))
        total += 1
    return total


def _values(run: str, row: Mapping[str, Json]) -> tuple[Json, ...]:
    facts = row.get("facts", {})
    return (
        run, facts.get("step"), row.get("arm", ""), facts.get("seed"), row.get("metric"), row.get("value"),
        row.get("n", 1), row.get("item"), row.get("split", ""), row.get("group", ""), row.get("low"), row.get("high"),
        facts.get("method"), facts.get("settings"), json.dumps(facts),
    )  # fmt: skip


def query(out: Path, sql: str, arguments: tuple[Json, ...] = ()) -> Iterator[dict[str, Json]]:
    """Rows of a read-only query; raises ConfigError when there is no index, StoreError when it is broken."""
    path = index_path(out)
    if not path.exists():
        raise ConfigError("There is no index", where=str(path), cure="Run `temper index`.")
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
            database.row_factory = sqlite3.Row
            for row in database.execute(sql, arguments):
                yield dict(row)
    except sqlite3.Error as error:
        raise StoreError(
            f"The index cannot be read: {error}", where=str(path), cure="Run `temper index`."
        ) from error
