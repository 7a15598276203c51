"""The user's own copy of the benchmark: a folder of its files, as the hub's configs or as one target's folder has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from temper.core.errors import DataError
from temper.core.types import Json, Message
from temper.data.columns import Place
from temper.data.readers import read_rows
from temper.data.schemas import Choice, Data, Dialogue, Record, Text
from temper.methods.unlearning.rwku.standin import wordings

__all__ = ["FILES", "load_folder"]

SUFFIXES = (".json", ".jsonl", ".parquet", ".csv")
Row = Mapping[str, Json]


def _need(row: Row, column: str, place: Place, kind: type | tuple[type, ...] = str) -> Any:
    value = row.get(column)
    if not isinstance(value, kind) or (isinstance(value, str) and not value.strip()):
        have = ", ".join(map(repr, row)) or "none"
        raise place.error(
            f"The row has no usable column {column!r}; it has {have}",
            column=column,
            cure="Take the benchmark's files as they are.",
        )
    return value


def _rest(row: Row, *taken: str) -> dict[str, Json]:
    return {name: value for name, value in row.items() if name not in (*taken, "id")}


def _dialogue(prompt: str, reply: str | None, name: str, extra: dict[str, Json]) -> Dialogue:
    messages = [Message("user", prompt)] + ([Message("assistant", reply)] if reply else [])
    return Dialogue(tuple(messages), id=name, extra=extra)


def _probe(row: Row, place: Place, name: str) -> Record:
    query, answer = _need(row, "query", place), _need(row, "answer", place)
    return _dialogue(query, answer, name, _rest(row, "query", "answer"))


def _text(row: Row, place: Place, name: str) -> Record:
    return Text(_need(row, "text", place), id=name, extra=_rest(row, "text"))


def _general(row: Row, place: Place, name: str) -> Record:
    choices, answer = list(_need(row, "choices", place, list)), _need(row, "answer", place, int)
    if not 0 <= answer < len(choices):
        raise place.error(f"The answer {answer} names none of {len(choices)} choices", column="answer")
    question = _need(row, "question", place)
    return Choice(
        question, tuple(map(str, choices)), answer, id=name, extra=_rest(row, "question", "choices", "answer")
    )


def _truthful(row: Row, place: Place, name: str) -> Record:
    targets = _need(row, "mc1_targets", place, dict)
    choices, labels = list(targets.get("choices") or []), list(targets.get("labels") or [])
    if labels.count(1) != 1 or len(labels) != len(choices):
        raise place.error(
            "mc1_targets marks not exactly one of its choices as right", column="mc1_targets",
            cure="Take the benchmark's files as they are.",
        )  # fmt: skip
    question = _need(row, "question", place)
    return Choice(
        question, tuple(map(str, choices)), labels.index(1), id=name, extra=_rest(row, "mc1_targets")
    )


def _short(column: str) -> Callable[[Row, Place, str], Record]:
    def build(row: Row, place: Place, name: str) -> Record:
        answers = [str(answer) for answer in _need(row, column, place, (list, tuple))]
        if not answers:
            raise place.error("There is no answer", column=column, cure="Drop the row.")
        extra = _rest(row, "question", column) | {"answers": answers}
        return _dialogue(_need(row, "question", place), None, name, extra)

    return build


def _fluency(row: Row, place: Place, name: str) -> Record:
    return _dialogue(_need(row, "instruction", place), None, name, _rest(row, "instruction"))


def _biography(row: Row, place: Place, name: str) -> Record:
    ask = wordings()["biography"]["prompt"].format(person=_need(row, "subject", place))
    return _dialogue(ask, _need(row, "text", place), name, _rest(row, "text"))


FILES: dict[str, tuple[tuple[str, ...], Callable[[Row, Place, str], Record]]] = {
    "forget": (("train_positive_llama3", "positive"), _biography),
    "forget_level1": (("forget_level1",), _probe),
    "forget_level2": (("forget_level2",), _probe),
    "forget_level3": (("forget_level3",), _probe),
    "neighbor_level1": (("neighbor_level1",), _probe),
    "neighbor_level2": (("neighbor_level2",), _probe),
    "mia_forget": (("mia_forget", "forget_mia"), _text),
    "mia_retain": (("mia_retain", "retain_mia"), _text),
    "mia_unseen": (("mia_unseen",), _text),
    "utility_general": (("utility_general", "retain_mmlu"), _general),
    "utility_reason": (("utility_reason", "retain_bbh"), _short("answer")),
    "utility_truthfulness": (("utility_truthfulness", "truthful"), _truthful),
    "utility_factuality": (("utility_factuality", "triviaqa"), _short("answers")),
    "utility_fluency": (("utility_fluency", "fluency"), _fluency),
}
"""Part -> the names its file may have, without suffix, and what makes a record of a row."""


def _file(folder: Path, names: tuple[str, ...]) -> Path | None:
    """`NAME.json` or another suffix, or the first file of a folder NAME, as a hub's download has it."""
    plain = [folder / f"{name}{suffix}" for name in names for suffix in SUFFIXES]
    nested = [f for n in names if (folder / n).is_dir() for f in sorted((folder / n).iterdir())]
    return next((f for f in (*plain, *nested) if f.is_file() and f.suffix in SUFFIXES), None)


def load_folder(folder: str | Path, subjects: tuple[str, ...] = ()) -> Data:
    """The parts whose files are there, only rows of `subjects` where any are named.

    Raises DataError for a folder without probes, for a subject that no probe is about, and for a row of another form.
    """
    path = Path(folder).expanduser()
    parts: dict[str, list[Record]] = {}
    for part, (names, build) in FILES.items():
        file = _file(path, names)
        if file is not None:
            rows = [
                build(row.values, row.place, f"{part}-{row.place.row}")
                for row in read_rows(file)
                if not subjects or row.values.get("subject") in subjects
            ]
            parts |= {part: rows} if rows else {}
    if not any(part.startswith("forget_level") for part in parts):
        about = f" about {', '.join(subjects)}" if subjects else ""
        raise DataError(
            f"The folder holds no forget probes{about}",
            where=str(path),
            cure="Name the folder that holds forget_level1.json and its siblings, and a subject as its rows spell it.",
        )
    return Data(parts, str(path))
