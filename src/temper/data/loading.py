"""Data from a spec: files, built-in sets, assets, and the hub; and records back to files."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import islice, pairwise
from pathlib import Path

from temper.core.errors import ConfigError, DataError, NeedsError, StoreError, nearest
from temper.core.spec import DATA_SUFFIXES, DataSpec, parse_data
from temper.core.types import Json
from temper.data.columns import Place, check_schema, from_row, infer_schema
from temper.data.docstrings import NAME as DOCSTRINGS
from temper.data.docstrings import ensure_docstrings
from temper.data.readers import NumberedRow, image_parts, read_rows, rows_of
from temper.data.retrieval import beir_rows, is_beir
from temper.data.schemas import Data, Record, to_row
from temper.data.splits import split_parts

__all__ = ["builtin_names", "load_data", "write_jsonl"]

BUILTIN = Path(__file__).parent / "builtin"
SPLITS = ("train", "test", "validation", "dev", "val")

Schemas = Mapping[str, str]


def load_data(
    spec: str | Mapping[str, str],
    schemas: Mapping[str, str] | str | None = None,
    *,
    limit: int | None = None,
) -> Data:
    """The data that a spec names, checked row by row.

    spec     "FILE" gives one part, "train"; "FOLDER/" a part for each file of rows in it, or of images, see
             `readers.image_parts`, and a BEIR folder its corpus and splits, see `retrieval.read_beir`; a mapping names the parts; `builtin:NAME`, `asset:NAME`, `world:WORLD:SET`
             and `hub:owner/name` give all their parts, `:PART` at the end one. Where `schemas` wants one part
             and it is missing, the only part, or "train", takes its name
    schemas  one schema for all parts, or part -> schema, a part ending in "?" may be missing; what is
             not given is inferred from the columns
    limit    rows to read of each part, from its beginning

    Raises DataError for bad rows, ConfigError for bad specs and missing parts.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}", cure="Give at least 1, or leave it out for all rows.")
    wanted = _wanted(schemas)
    sources = {"": spec} if isinstance(spec, str) else dict(spec)
    if not sources:
        raise ConfigError("No data is named", cure="Give a data spec, or part=spec.")
    parts: dict[str, tuple[Record, ...]] = {}
    for part, text in sources.items():
        found = _open(parse_data(text), limit)
        found = {part: _only(found, text)} if part else _named(found, schemas)
        for name, rows in found.items():
            schema = schemas if isinstance(schemas, str) else wanted.get(name)
            parts[name] = tuple(_records(rows, schema, name, limit))
    data = Data(parts, _describe(spec))
    _check_parts(data, schemas)
    return data


def _describe(spec: str | Mapping[str, str]) -> str:
    return spec if isinstance(spec, str) else " ".join(f"{part}={text}" for part, text in spec.items())


def _wanted(schemas: Schemas | str | None) -> dict[str, str]:
    """Part -> schema without the question marks; every schema name checked."""
    if isinstance(schemas, str):
        check_schema(schemas)
        return {}
    return {part.removesuffix("?"): check_schema(name) for part, name in (schemas or {}).items()}


def _check_parts(data: Data, schemas: Schemas | str | None) -> None:
    needed = [] if isinstance(schemas, str) else [p for p in schemas or {} if not p.endswith("?")]
    missing = [part for part in needed if part not in data]
    if missing:
        example = " ".join(f"--data {part}=FILE" for part in needed)
        raise ConfigError(
            f"The data has no part {missing[0]!r}; it has {', '.join(map(repr, data))}",
            where=data.source,
            cure=f"Name the parts: {example}.",
        )


Rows = Iterator[NumberedRow]


def _open(spec: DataSpec, limit: int | None) -> dict[str, Rows]:
    """Part -> its rows, not read yet; a world makes no more than `limit` records."""
    if spec.kind == "world":
        from temper.data.worlds import load_world

        drawn = load_world(":".join([spec.name, *spec.fields]), limit)
        return {part: _made(records, f"{spec}:{part}") for part, records in drawn.items()}
    if spec.kind == "file":
        path = Path(spec.name)
        return split_parts(path) or {Data.default_part: read_rows(path)}
    if spec.kind == "folder":
        return _folder(Path(spec.name).expanduser())
    if spec.kind == "builtin":
        return _choose(_folder_parts(_builtin(spec.name)), spec)
    if spec.kind == "asset":
        from temper.data.assets import fetch

        made = ensure_docstrings() if spec.name == DOCSTRINGS else fetch(spec.name)
        return _choose(_folder_parts(made), spec)
    if spec.kind == "hub":
        return _hub(spec)
    raise ConfigError(
        f"{spec.name!r} is neither a file nor an earlier step",
        cure="Use builtin:NAME, asset:NAME, hub:owner/name or a .jsonl, .json, .csv or .parquet file; "
        "a step's id works only inside a recipe, after that step; a folder ends in /.",
    )


def _made(records: Iterable[Record], source: str) -> Rows:
    """Records that are ready, as rows."""
    return (NumberedRow(record, Place(source, number)) for number, record in enumerate(records, start=1))


def _only(found: dict[str, Rows], text: str) -> Rows:
    if len(found) == 1:
        return next(iter(found.values()))
    if Data.default_part in found:
        return found[Data.default_part]
    raise ConfigError(
        f"{text!r} has several parts", cure=f"Choose one: {', '.join(f'{text}:{p}' for p in found)}."
    )


def _named(found: dict[str, Rows], schemas: Schemas | str | None) -> dict[str, Rows]:
    """The parts, where the only part wanted is missing with the only part, or "train", under its name."""
    names = [] if schemas is None or isinstance(schemas, str) else list(schemas)
    needed = [name for name in names if not name.endswith("?")] or [name.removesuffix("?") for name in names]
    if len(needed) != 1 or needed[0] in found:
        return found
    source = next(iter(found)) if len(found) == 1 else Data.default_part
    if source not in found or source in {name.removesuffix("?") for name in names}:
        return found
    return {needed[0] if name == source else name: rows for name, rows in found.items()}


def builtin_names() -> list[str]:
    """The names of the built-in sets."""
    return sorted(p.name.replace("_", "-") for p in BUILTIN.iterdir() if any(p.glob("*.jsonl")))


def _builtin(name: str) -> Path:
    names = builtin_names()
    if name not in names:
        raise ConfigError(f"There is no built-in set {name!r}", cure=nearest(name, names))
    plain = BUILTIN / name
    return plain if plain.is_dir() else BUILTIN / name.replace("-", "_")


def _folder_parts(folder: Path) -> dict[str, Rows]:
    """One part for each `<part>.jsonl` of a folder."""
    return {path.stem: read_rows(path) for path in sorted(folder.glob("*.jsonl"))}


def _folder(folder: Path) -> dict[str, Rows]:
    """A user's folder: its files of rows, or images in a folder for each class."""
    if not folder.is_dir():
        raise DataError("There is no such folder", where=str(folder), cure="Check the path.")
    if is_beir(folder):
        return beir_rows(folder)
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in DATA_SUFFIXES)
    twice = [path for path, other in pairwise(files) if path.stem == other.stem]
    if twice:
        raise DataError(
            f"Two files are the part {twice[0].stem!r}", where=str(folder), cure="Rename one of them."
        )
    return {path.stem: read_rows(path) for path in files} or image_parts(folder, SPLITS)


def _choose(found: dict[str, Rows], spec: DataSpec) -> dict[str, Rows]:
    """All parts, or the one that the spec's last field names."""
    if not found:
        raise ConfigError(f"{str(spec)!r} holds no rows of text", cure="It is a model; use it as a system.")
    if not spec.fields:
        return found
    part = spec.fields[-1]
    if len(spec.fields) > 1 or part not in found:
        raise ConfigError(
            f"{spec.kind}:{spec.name} has no part {':'.join(spec.fields)!r}", cure=nearest(part, found)
        )
    return {part: found[part]}


def _hub(spec: DataSpec) -> dict[str, Rows]:
    """A data set of the hub, through `datasets`; one field is a split if it looks like one."""
    try:
        import datasets
    except ImportError:
        raise NeedsError(
            "Hub data needs datasets", where=str(spec), cure="pip install 'temper-ml[data]'"
        ) from None
    config, split = _hub_fields(spec)
    try:
        with _quiet_retries():
            loaded = datasets.load_dataset(spec.name, config, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"The hub did not give it: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            where=str(spec),
            cure="Check the name, config and split, the network, and HF_HUB_OFFLINE.",
        ) from error
    if split:
        return {split.partition("[")[0]: rows_of(iter(_undecoded(loaded)), str(spec))}
    return {str(name): rows_of(iter(_undecoded(rows)), f"{spec}:{name}") for name, rows in loaded.items()}


def _undecoded(rows: Json) -> Json:
    """The split with images as the bytes that it stores, not as pictures opened one by one."""
    for column, feature in (getattr(rows, "features", None) or {}).items():
        if type(feature).__name__ == "Image":
            rows = rows.cast_column(column, dataclasses.replace(feature, decode=False))
    return rows


@contextmanager
def _quiet_retries() -> Iterator[None]:
    """Without the client's line for each try; what failed in the end is told once."""
    client = logging.getLogger("huggingface_hub")
    level = client.level
    client.setLevel(logging.ERROR)
    try:
        yield
    finally:
        client.setLevel(level)


def _hub_fields(spec: DataSpec) -> tuple[str | None, str | None]:
    """Config and split; a colon within brackets belongs to the split, as in train[:5%]."""
    fields = re.split(r":(?![^\[]*\])", ":".join(spec.fields)) if spec.fields else []
    if len(fields) > 2:
        raise ConfigError(f"{str(spec)!r} has too many fields", cure="Write hub:owner/name[:config][:split].")
    if len(fields) == 2:
        return fields[0], fields[1]
    if fields and fields[0].partition("[")[0] in SPLITS:
        return None, fields[0]
    return (fields[0] if fields else None), None


def _records(rows: Rows, schema: str | None, part: str, limit: int | None) -> Iterator[Record]:
    """Checked records; a row without an id is named after its part and its number."""
    seen: dict[str, int] = {}
    for values, place in islice(rows, limit):
        if isinstance(values, Record):
            yield _as_wanted(values, schema, place)
            continue
        if schema is None:
            schema = infer_schema(values, place)
        record = from_row(values, schema, place, default_id=f"{part}-{place.row}")
        if record.id in seen:
            raise place.error(
                f"The id {record.id!r} stands already in {place.unit} {seen[record.id]}",
                column="id",
                cure="Give every row an id of its own, or none.",
            )
        seen[record.id] = place.row
        yield record


def _as_wanted(record: Record, schema: str | None, place: Place) -> Record:
    if schema not in (None, type(record).__name__):
        raise place.error(
            f"This world's records are {type(record).__name__}, not {schema}", cure="Choose another set."
        )
    return record


def write_jsonl(path: str | Path, records: Iterable[Record]) -> None:
    """Write records as JSON lines; the file appears whole or not at all. Raises StoreError."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise StoreError(f"The folder cannot be written: {error.strerror}", where=str(path.parent)) from error
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(_line(record) for record in records)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError):
            raise StoreError(
                f"The file cannot be written: {error.strerror}", where=str(path), cure="Free some space."
            ) from error
        raise


def _line(record: Record) -> str:
    return json.dumps(to_row(record), ensure_ascii=False) + "\n"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
