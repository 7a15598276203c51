"""Qrels, run files and BEIR folders; records joined into queries over one corpus."""

from __future__ import annotations

import json

import pytest

from temper.core.errors import DataError
from temper.data.loading import load_data
from temper.data.retrieval import (
    beir_rows,
    corpus_of,
    is_beir,
    qrels_of,
    questions_of,
    read_beir,
    read_qrels,
    read_run,
    write_run,
)
from temper.data.schemas import Data, Ranking, Text


def beir(folder, *, qrels="q1\td1\t2\nq1\td2\t1\nq2\td2\t0\n", corpus=None):
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    corpus = corpus or [("d1", "One", "first text"), ("d2", "", "second text"), ("d3", "", "third text")]
    rows = [json.dumps({"_id": name, "title": title, "text": text}) for name, title, text in corpus]
    (folder / "corpus.jsonl").write_text("\n".join(rows))
    queries = [json.dumps({"_id": f"q{n}", "text": f"query {n}"}) for n in (1, 2)]
    (folder / "queries.jsonl").write_text("\n".join(queries))
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + qrels)
    return folder


def test_beir_folder(tmp_path, caplog):
    data = read_beir(beir(tmp_path))
    assert list(data) == ["corpus", "test"]
    assert "1 queries without a relevant document" in caplog.text
    corpus = corpus_of(data)
    assert corpus.ids == ("d1", "d2", "d3")
    assert corpus.texts[0] == "One first text"
    (question,) = questions_of(data.records("test", Ranking), corpus)
    assert (question.id, question.text, question.relevant) == ("q1", "query 1", {0: 2, 1: 1})
    assert qrels_of([question], corpus.ids) == {"q1": {"d1": 2, "d2": 1}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qrels": "q1\td9\t1\n"}, "name 'd9', which corpus.jsonl does not have"),
        ({"qrels": "q9\td1\t1\n"}, "name 'q9', which queries.jsonl does not have"),
        ({"qrels": "q1\td1\t1\nq1\td1\t1\n"}, "judges 'd1' twice"),
        ({"qrels": "q1\td1\n"}, "has 2 fields"),
        ({"qrels": "q1\td1\tyes\n"}, "'yes' is not a number"),
        ({"corpus": [("d1", "", "a"), ("d1", "", "b")]}, "id 'd1' stands twice"),
    ],
)
def test_bad_folders_are_named(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        read_beir(beir(tmp_path, **changes))


def test_rows_of_a_folder(tmp_path):
    assert not is_beir(tmp_path)
    assert is_beir(beir(tmp_path))
    rows = beir_rows(tmp_path)
    (first, *_) = rows["test"]
    assert first.values["query_id"] == "q1"
    assert len(list(rows["corpus"])) == 3


def test_load_data_knows_the_folder(tmp_path):
    data = load_data(f"{beir(tmp_path)}/", {"test": "Ranking", "corpus?": "Text"})
    assert {part: len(data[part]) for part in data} == {"corpus": 3, "test": 2}
    assert len(questions_of(data.records("test", Ranking), corpus_of(data))) == 1
    cut = load_data(f"{tmp_path}/", {"test": "Ranking"}, limit=1)
    assert corpus_of(cut).texts == ("One first text",)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_beir(tmp_path)
    (beir(tmp_path) / "qrels" / "test.tsv").unlink()
    with pytest.raises(DataError, match="no judgements"):
        read_beir(tmp_path)
    with pytest.raises(DataError, match="cannot be read"):
        read_qrels(tmp_path / "none.tsv")


def test_trec_files(tmp_path):
    path = tmp_path / "qrels.txt"
    path.write_text("1 0 a 1\n1 0 b 0\n\n2 0 c 2\n")
    assert read_qrels(path) == {"1": {"a": 1, "b": 0}, "2": {"c": 2}}
    run = tmp_path / "run.txt"
    run.write_text("1 Q0 a 1 0.5 x\n1 Q0 b 2 0.9 x\n")
    assert read_run(run) == {"1": {"b": 0.9, "a": 0.5}}
    write_run(tmp_path / "again.txt", read_run(run), "x")
    assert (tmp_path / "again.txt").read_text().splitlines()[0] == "1 Q0 b 1 0.900000 x"
    assert read_run(tmp_path / "again.txt") == read_run(run)
    write_run(run, {"my query": {"a b": 1.0}}, "x")
    assert read_run(run) == {"my_query": {"a_b": 1.0}}
    run.write_text("1 Q0 a 1 0.5 x\n1 Q0 a 2 0.4 x\n")
    with pytest.raises(DataError, match="ranks 'a' twice"):
        read_run(run)


def test_plain_records_share_documents_and_queries():
    data = Data(
        {
            "train": [
                Ranking("q", "one", ("two", "same"), id="a"),
                Ranking("q", "three", id="b"),
                Ranking("other", "two", id="c"),
            ],
            "corpus": [Text("same", id="x"), Text("one", id="y"), Text("one", id="z")],
        }
    )
    corpus = corpus_of(data)
    assert corpus.texts == ("same", "one", "one", "three", "two")
    first, second = questions_of(data.records("train", Ranking), corpus)
    assert (first.id, set(first.relevant), first.negatives) == ("a", {1, 2, 3}, (4, 0))
    assert (second.id, set(second.relevant), second.negatives) == ("c", {4}, ())


def test_ids_stand_for_one_text():
    rows = [Ranking("q", text, id=text, extra={"positive_id": "d"}) for text in ("one", "two")]
    with pytest.raises(DataError, match="document id 'd' stands for two texts"):
        corpus_of(Data({"train": rows}))
    rows = [Ranking(text, "one", id=text, extra={"query_id": "q"}) for text in ("one", "two")]
    with pytest.raises(DataError, match="query id 'q' stands for two texts"):
        questions_of(rows, corpus_of(Data({"train": rows})))
