"""Retrieval data: qrels, TREC run files and BEIR folders read, and `Ranking` records joined into queries over one corpus.

A BEIR folder holds corpus.jsonl (`_id`, `title`, `text`), queries.jsonl (`_id`, `text`) and qrels/SPLIT.tsv. As Data it
is a part `corpus` of Text, and a part for each split with one Ranking for each query and relevant document. A Ranking
knows its query, document and grade by `query_id`, `positive_id` and `relevance` among its further columns; without
them its texts say which query and which document it means.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from temper.core.errors import DataError
from temper.data.columns import Place
from temper.data.readers import NumberedRow, read_rows, rows_of
from temper.data.schemas import Data, Ranking, Text, to_row

__all__ = [
    "Corpus",
    "Qrels",
    "Question",
    "Trec",
    "beir_rows",
    "corpus_of",
    "is_beir",
    "qrels_of",
    "questions_of",
    "read_beir",
    "read_qrels",
    "read_run",
    "write_run",
]

logger = logging.getLogger(__name__)

Qrels = dict[str, dict[str, int]]
"""Query id -> document id -> grade."""
Trec = dict[str, dict[str, float]]
"""Query id -> document id -> score, best first."""


@dataclass(frozen=True, eq=False)
class Corpus:
    """Documents in a fixed order; a document's place is its row in every matrix of vectors."""

    ids: tuple[str, ...]
    texts: tuple[str, ...]

    @cached_property
    def twins(self) -> Mapping[str, frozenset[int]]:
        """Text -> the places where it stands."""
        places: dict[str, set[int]] = {}
        for place, text in enumerate(self.texts):
            places.setdefault(text, set()).add(place)
        return {text: frozenset(found) for text, found in places.items()}

    def __len__(self) -> int:
        return len(self.ids)


class Question(NamedTuple):
    """A query, the places of its relevant documents with their grades, and of documents known not to be relevant."""

    id: str
    text: str
    relevant: Mapping[int, int]
    negatives: tuple[int, ...]


def read_qrels(path: Path | str) -> Qrels:
    """Judgements as TREC writes them (`qid 0 pid grade`) or BEIR does (a header, then `qid pid grade`).

    Raises DataError for a line of another form and for a pair that is judged twice.
    """
    qrels: Qrels = {}
    for fields, place in _fields(Path(path), (3, 4), "qid 0 pid grade"):
        if place.row == 1 and fields[-1] in ("score", "relevance", "rel"):
            continue
        query, document, grade = fields[0], fields[-2], _number(fields[-1], place)
        if document in qrels.setdefault(query, {}):
            raise place.error(f"Query {query!r} judges {document!r} twice", cure="Keep one of the lines.")
        qrels[query][document] = int(grade)
    return qrels


def read_run(path: Path | str) -> Trec:
    """A ranking in TREC's format, `qid Q0 pid rank score tag`, by falling score; equal scores stay in their order.

    Raises DataError for a line of another form and for a document that stands twice under one query.
    """
    found: Trec = {}
    for fields, place in _fields(Path(path), (6,), "qid Q0 pid rank score tag"):
        query, document, score = fields[0], fields[2], _number(fields[4], place)
        if document in found.setdefault(query, {}):
            raise place.error(f"Query {query!r} ranks {document!r} twice", cure="Keep one of the lines.")
        found[query][document] = score
    return {query: dict(sorted(scores.items(), key=lambda item: -item[1])) for query, scores in found.items()}


def write_run(path: Path | str, ranked: Mapping[str, Mapping[str, float]], tag: str) -> None:
    """Write rankings, best first, in TREC's format; white space within an id becomes "_"."""
    lines = [
        f"{_solid(query)} Q0 {_solid(document)} {rank} {score:.6f} {tag}\n"
        for query, scores in ranked.items()
        for rank, (document, score) in enumerate(scores.items(), start=1)
    ]
    Path(path).write_text("".join(lines), encoding="utf-8")


def _solid(name: str) -> str:
    return "_".join(name.split())


def _fields(path: Path, sizes: tuple[int, ...], form: str) -> Iterator[tuple[list[str], Place]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(
            f"The file cannot be read: {error.strerror}", where=str(path), cure="Check the path."
        ) from None
    except UnicodeDecodeError:
        raise DataError("The file is not UTF-8", where=str(path), cure="Save it as UTF-8.") from None
    for number, line in enumerate(text.splitlines(), start=1):
        fields = line.split("\t") if "\t" in line else line.split()
        place = Place(str(path), number, "line")
        if line.strip() and len(fields) not in sizes:
            raise place.error(f"The line has {len(fields)} fields", cure=f"Write {form!r}.")
        if line.strip():
            yield [field.strip() for field in fields], place


def _number(text: str, place: Place) -> float:
    try:
        return float(text)
    except ValueError:
        raise place.error(f"{text!r} is not a number", cure="Write e.g. 1.") from None


def read_beir(folder: Path | str) -> Data:
    """A BEIR folder as Data; queries without a relevant document are left out, and their number is logged.

    Raises DataError for a duplicate id, for a judgement about an unknown query or document, and where files are missing.
    """
    folder = Path(folder)
    corpus, queries = _texts(folder / "corpus.jsonl"), _texts(folder / "queries.jsonl")
    files = sorted([*folder.glob("qrels/*.tsv"), *folder.glob("qrels/*.txt"), *folder.glob("qrels/*.qrels")])
    if not files:
        raise DataError("There are no judgements", where=str(folder / "qrels"), cure="Put SPLIT.tsv there.")
    parts: dict[str, list[Ranking] | list[Text]] = {
        path.stem: _judged(read_qrels(path), queries, corpus, path) for path in files
    }
    return Data({"corpus": [Text(text, id=name) for name, text in corpus.items()], **parts}, str(folder))


def is_beir(folder: Path) -> bool:
    """Whether the folder is laid out as BEIR's are."""
    return (folder / "corpus.jsonl").is_file() and (folder / "qrels").is_dir()


def beir_rows(folder: Path) -> dict[str, Iterator[NumberedRow]]:
    """The parts of `read_beir` as numbered rows, as `load_data` takes them."""
    data = read_beir(folder)
    return {part: rows_of(map(to_row, data[part]), f"{folder}: {part}") for part in data}


def _texts(path: Path) -> dict[str, str]:
    texts: dict[str, str] = {}
    for row, place in read_rows(path):
        name = str(row.get("_id", "")) if isinstance(row, Mapping) else ""
        if not name or not isinstance(row.get("text"), str):
            raise place.error("The row lacks _id or text", cure='Write {"_id": "...", "text": "..."}.')
        if name in texts:
            raise place.error(
                f"The id {name!r} stands twice", column="_id", cure="Give every row an id of its own."
            )
        texts[name] = " ".join(part for part in (row.get("title"), row["text"]) if part)
    return texts


def _judged(qrels: Qrels, queries: Mapping[str, str], corpus: Mapping[str, str], path: Path) -> list[Ranking]:
    records, empty = [], 0
    for query, grades in qrels.items():
        for name, known, where in ((query, queries, "queries"), *((d, corpus, "corpus") for d in grades)):
            if name not in known:
                raise DataError(
                    f"The judgements name {name!r}, which {where}.jsonl does not have", where=str(path),
                    cure="Give the files that belong together.",
                )  # fmt: skip
        relevant = {document: grade for document, grade in grades.items() if grade > 0}
        empty += not relevant
        records += [
            Ranking(
                queries[query], corpus[document], id=f"{query}/{document}",
                extra={"query_id": query, "positive_id": document, "relevance": grade},
            )
            for document, grade in relevant.items()
        ]  # fmt: skip
    if empty:
        logger.warning("%s: %d queries without a relevant document are left out", path, empty)
    return records


class _Documents:
    """Documents as they are met: by id where they have one, else by text."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}
        self.texts: list[str] = []
        self.known: set[str] = set()

    def add(self, text: str, name: str = "") -> None:
        """Take a document in; raises DataError for an id that stands for two texts."""
        if not name and text in self.known:
            return
        name = name or f"document-{len(self.texts)}"
        place = self.ids.setdefault(name, len(self.texts))
        if place == len(self.texts):
            self.texts.append(text)
            self.known.add(text)
        elif self.texts[place] != text:
            raise DataError(
                f"The document id {name!r} stands for two texts", cure="Give every document an id of its own."
            )


def corpus_of(data: Data) -> Corpus:
    """All documents of the data: those of the part `corpus`, then positives and negatives that it lacks."""
    documents = _Documents()
    for document in data.records("corpus", Text):
        documents.add(document.text, document.id)
    rankings = [record for part in data for record in data[part] if isinstance(record, Ranking)]
    for record in rankings:
        documents.add(record.positive, _column(record, "positive_id"))
    for text in chain.from_iterable(record.negatives for record in rankings):
        documents.add(text)
    return Corpus(tuple(documents.ids), tuple(documents.texts))


def _column(record: Ranking, name: str) -> str:
    return str(record.extra.get(name, ""))


def questions_of(records: Sequence[Ranking], corpus: Corpus) -> tuple[Question, ...]:
    """Queries with places in the corpus; records of one query are joined.

    Documents with the same text as a relevant one are relevant too: no training may push them away.
    """
    groups: dict[str, list[Ranking]] = {}
    for record in records:
        groups.setdefault(_column(record, "query_id") or record.query, []).append(record)
    return tuple(_question(name, group, corpus) for name, group in groups.items())


def _question(name: str, group: Sequence[Ranking], corpus: Corpus) -> Question:
    relevant: dict[int, int] = {}
    for record in group:
        if record.query != group[0].query:
            raise DataError(
                f"The query id {name!r} stands for two texts", where=f"row {record.id}",
                cure="Give every query an id of its own.",
            )  # fmt: skip
        relevant |= dict.fromkeys(corpus.twins[record.positive], int(record.extra.get("relevance", 1)))
    others = chain.from_iterable(corpus.twins[text] for record in group for text in record.negatives)
    negatives = tuple(dict.fromkeys(place for place in others if place not in relevant))
    return Question(_column(group[0], "query_id") or group[0].id, group[0].query, relevant, negatives)


def qrels_of(questions: Iterable[Question], ids: Sequence[str]) -> Qrels:
    """The questions' judgements by id."""
    return {q.id: {ids[place]: grade for place, grade in q.relevant.items()} for q in questions}
