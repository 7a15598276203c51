"""Run folders, the truth about what was done.

    runs/<id>/run.json  rows.jsonl  attempts.jsonl  log.txt  run.lock
              steps/<step>-<hash>/  artefact/  data/  checkpoint/  rows.jsonl  attempts.jsonl  done.json

A step is finished when its `done.json` is there; it lists every file with its hash.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from temper.core.errors import ConfigError, StoreError
from temper.core.types import Attempt, Json, Row
from temper.store import lines, locks
from temper.store.atomic import disk_errors, read_json, sweep, write_json
from temper.store.records import attempt_from, row_from

__all__ = ["RunFolder", "StepFolder", "file_sha256", "find_step", "run_folders"]


class RunFolder:
    """One run on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, out: Path, slug: str, record: Mapping[str, Json]) -> RunFolder:
        """A new folder `<slug>-<hash>` with its `run.json`; no two runs ever get the same one."""
        stem = re.sub(r"[^a-z0-9-]+", "-", slug.lower()).strip("-") or "run"
        with disk_errors("create a run in", out):
            out.mkdir(parents=True, exist_ok=True)
            path = _claim(out, stem)
        run = cls(path)
        created = datetime.now(UTC).isoformat(timespec="seconds")
        try:
            write_json(
                path / "run.json", {"id": path.name, "created": created, "status": "running", **record}
            )
        except StoreError:
            shutil.rmtree(path, ignore_errors=True)
            raise
        return run

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """An existing run; raises ConfigError when the folder is not a run."""
        if not (path / "run.json").exists():
            raise ConfigError(
                f"{str(path)!r} is not a run folder",
                cure="It has no run.json. Give a run's folder, or its id and --out; `temper index` lists them.",
            )
        return cls(path)

    @property
    def id(self) -> str:
        return self.path.name

    def record(self) -> dict[str, Json]:
        """What `run.json` holds; raises StoreError when it is not a JSON object."""
        record = read_json(self.path / "run.json")
        if not isinstance(record, dict):
            raise StoreError("run.json is not an object", where=str(self.path))
        return record

    def update(self, **changes: Json) -> None:
        """Replace some keys of `run.json`, atomically."""
        write_json(self.path / "run.json", self.record() | changes)

    def rows(self) -> Iterator[Row]:
        """The run's rows, streaming."""
        return (row_from(record) for record in lines.read(self.path / "rows.jsonl"))

    def attempts(self) -> Iterator[Attempt]:
        """The run's attempts, streaming."""
        return (attempt_from(record) for record in lines.read(self.path / "attempts.jsonl"))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for this process, rid of what a killed one was writing; StoreError when another has it."""
        with locks.locked(self.path / "run.lock"):
            sweep(self.path)
            yield

    def is_locked(self) -> bool:
        return locks.is_locked(self.path / "run.lock")

    def step(self, name: str) -> StepFolder:
        return StepFolder(self.path / "steps" / name)

    def steps(self) -> list[StepFolder]:
        """Its step folders, sorted by name."""
        found = (self.path / "steps").glob("*/")
        return [StepFolder(path) for path in sorted(found)]

    def holds_work(self) -> bool:
        """Whether a step is finished or has a checkpoint."""
        return any(step.is_done() or (step.path / "checkpoint").is_dir() for step in self.steps())

    def remove(self) -> None:
        """Delete the run, and the folder of runs if it was the only one; raises StoreError."""
        with disk_errors("remove the run", self.path):
            shutil.rmtree(self.path)
        with suppress(OSError):
            self.path.parent.rmdir()

    def log(self, text: str) -> None:
        """Append a line with the time to `log.txt`."""
        stamp = datetime.now(UTC).isoformat(timespec="seconds")
        with (
            disk_errors("write", self.path / "log.txt"),
            (self.path / "log.txt").open("a", encoding="utf-8") as file,
        ):
            file.write(f"{stamp} {text}\n")


def _claim(out: Path, stem: str) -> Path:
    """Make a folder nobody has; mkdir is the arbiter between processes."""
    for num_bytes in (2, 2, 2, 2, 3, 4, 8, 8):
        path = out / f"{stem}-{secrets.token_hex(num_bytes)}"
        try:
            path.mkdir()
            return path
        except FileExistsError:
            continue
    raise StoreError(
        f"No free run name for {stem!r}", where=str(out), cure="Choose another folder with --out."
    )


class StepFolder:
    """One step of a run on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def artefact(self) -> Path:
        return self.path / "artefact"

    @property
    def data(self) -> Path:
        return self.path / "data"

    @property
    def rows_file(self) -> Path:
        return self.path / "rows.jsonl"

    @property
    def attempts_file(self) -> Path:
        return self.path / "attempts.jsonl"

    @property
    def done_file(self) -> Path:
        return self.path / "done.json"

    def lock(self) -> AbstractContextManager[None]:
        """Hold the step, waiting for another process that has it."""
        return locks.locked(self.path.with_name(f".{self.path.name}.lock"), wait=True)

    def is_done(self) -> bool:
        return self.done_file.exists()

    def done(self) -> dict[str, Json]:
        """What `done.json` holds."""
        return dict(read_json(self.done_file))

    def clear(self) -> None:
        """Drop all that an unfinished attempt left, except its checkpoint."""
        with disk_errors("clear", self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            for entry in self.path.iterdir():
                if entry.name == "checkpoint":
                    continue
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()

    def finish(self, record: Mapping[str, Json]) -> None:
        """Mark the step finished; `done.json` lists every kept file with its size and hash."""
        with disk_errors("finish", self.path):
            shutil.rmtree(self.path / "checkpoint", ignore_errors=True)
            files = {str(f.relative_to(self.path)): file_sha256(f) for f in self._files()}
        write_json(self.done_file, {**record, "files": files})

    def _files(self) -> Iterable[Path]:
        found = sorted(p for p in self.path.rglob("*") if p.is_file())
        return [p for p in found if p.name != "done.json" and not p.name.startswith(".")]

    def check(self) -> None:
        """Raise StoreError when a file of a finished step is missing or changed."""
        for name, digest in self.done()["files"].items():
            path = self.path / name
            if not path.is_file() or file_sha256(path) != digest:
                raise StoreError(
                    "A file of a finished step is missing or changed",
                    where=str(path),
                    cure=f"Delete {self.path} and run the same command again.",
                )

    def adopt(self, other: StepFolder) -> None:
        """Take over another run's finished step, by hard links where the disk allows; raises as `check`."""
        other.check()
        self.clear()
        done = other.done()
        with disk_errors("copy a finished step to", self.path):
            for name in done["files"]:
                target = self.path / name
                target.parent.mkdir(parents=True, exist_ok=True)
                _link(other.path / name, target)
        write_json(self.done_file, done | {"reused_from": str(other.path)})


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def run_folders(out: Path) -> list[RunFolder]:
    """The runs in a folder, oldest first by name of their `run.json`'s time."""
    if not out.is_dir():
        return []
    found = [path.parent for path in out.glob("*/run.json")]
    return [RunFolder(path) for path in sorted(found, key=lambda p: (p / "run.json").stat().st_mtime)]


def find_step(out: Path, step_hash: str) -> StepFolder | None:
    """A finished step with this hash in any run of `out`, or None."""
    for done in sorted(out.glob(f"*/steps/*-{step_hash}/done.json")):
        return StepFolder(done.parent)
    return None
