"""Fitting and measuring: what is trained and what stays, the files left, sentence-transformers, bad input."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import temper
from temper.artefacts import Adapter, Weights, load_artefact
from temper.core import config as core_config
from temper.core.errors import ConfigError, DataError, ModelError
from temper.core.types import Row, Run
from temper.data.schemas import Data, Ranking
from temper.methods.retrieval.star_adore.card import Config
from temper.methods.retrieval.star_adore.conftest import PAIRS, items_of, pairs, quick
from temper.methods.retrieval.star_adore.method import fit, measure
from temper.methods.retrieval.star_adore.training import scale_of
from temper.ops.contrast import ContrastObjective, pairwise_loss
from temper.ops.embed import embed
from temper.systems.loading import load_base


def mean_loss(system: Any, config: Config) -> float:
    objective = ContrastObjective(
        system, cosine=False, loss=partial(pairwise_loss, scale=scale_of(system, config)), per="pair"
    )
    items = items_of(load_base("tiny:bert"), config)
    with torch.no_grad():
        found = objective(system.model, items)["contrast"]
    return float(found.total / found.count)


@pytest.mark.parametrize("changes", [{}, {"mode": "lora"}, {"loss": "softmax", "optimizer": "adamw"}])
def test_star_learns_and_leaves_the_base_alone(system: Any, changes: dict[str, Any]) -> None:
    config = quick(max_steps=12, **changes)
    calm = {name: value.clone() for name, value in system.model.state_dict().items()}
    artefact = fit(system, pairs(), config, Run())
    assert isinstance(artefact, Adapter if config.mode == "lora" else Weights)
    assert all(torch.equal(value, calm[name]) for name, value in system.model.state_dict().items())
    start = mean_loss(system, config)
    with artefact.apply(system) as trained:
        assert mean_loss(trained, config) < start
        assert trained.query_model is None


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_adore_moves_queries_and_no_document(system: Any, mode: str, tmp_path: Path) -> None:
    texts = [text for pair in PAIRS for text in pair]
    calm = embed(system, texts, Run())
    config = quick(stage="adore", mode=mode, index=str(tmp_path / "index"))
    artefact = fit(system, pairs(), config, Run())
    assert isinstance(artefact, Weights)
    assert artefact.side == "query"
    artefact.save(tmp_path / "saved")
    with load_artefact(tmp_path / "saved").apply(system) as both:
        assert torch.equal(embed(both, texts, Run()), calm)
        assert not torch.allclose(embed(both.for_queries, texts, Run()), calm, atol=1e-4)
        with pytest.raises(ConfigError, match="has a query model already"):
            fit(both, pairs(), quick(), Run())
    again = fit(system, pairs(), config, Run())
    assert again.fingerprint == artefact.fingerprint, "from the kept index"
    with pytest.raises(ModelError, match="made by document encoder"):
        fit(load_base("tiny:bert:1"), pairs(), config, Run())
    with pytest.raises(DataError, match="from other documents"):
        fit(system, pairs(num=5), config, Run())


def test_adore_raises_the_relevant_document(system: Any) -> None:
    config = quick(stage="adore", lr=3e-3, max_steps=40, dropout=False, top_k=200)  # more than there are
    before = values(measure(system, pairs("test"), config, Run()), "MRR@10")
    with fit(system, pairs(), config, Run()).apply(system) as both:
        after = values(measure(both, pairs("test"), config, Run()), "MRR@10")
    assert after[None] > before[None]


def values(rows: Any, metric: str) -> dict[Any, float]:
    found: list[Row] = [row for row in rows if row.metric == metric]
    return {row.item: row.value for row in found if row.value is not None}


def test_measures_by_query_and_files(system: Any, tmp_path: Path) -> None:
    run = Run(folder=tmp_path)
    rows = list(measure(system, pairs("test"), quick(engine="bm25", depth=2, export=True), run))
    found = values(rows, "MRR@10")
    assert list(found) == [None, "q0", "q1", "q2", "q3", "q4", "q5"]
    assert found[None] == pytest.approx(sum(found[f"q{n}"] for n in range(6)) / 6)
    assert found["q1"] == 1, "a word that stands in its document alone"
    lines = (tmp_path / "ranking.trec").read_text().splitlines()
    assert len(lines) == 12
    assert lines[2].startswith("q1 Q0 document-1 1 ")
    curve = json.loads((tmp_path / "figures.json").read_text())["curves"]["Precision against recall"]
    precision = curve["lines"]["bm25"]["y"]
    assert len(precision) == 11
    assert precision == sorted(precision, reverse=True), "interpolated precision never rises"
    assert curve["shared"] is True, "arms stand in one picture"


@pytest.mark.parametrize("stage", ["star", "adore"])
def test_sentence_transformers_reads_the_result(system: Any, stage: str, tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    texts = [text for pair in PAIRS for text in pair]
    with fit(system, pairs(), quick(stage=stage), Run()).apply(system) as trained:
        list(measure(trained, pairs("test"), quick(export=True), Run(folder=tmp_path)))
        sides = {"": trained} if stage == "star" else {"documents": trained, "queries": trained.for_queries}
        for folder, side in sides.items():
            theirs = library.SentenceTransformer(str(tmp_path / "encoder" / folder), device="cpu")
            found = torch.as_tensor(theirs.encode(texts))
            torch.testing.assert_close(found, embed(side, texts, Run()), atol=1e-5, rtol=1e-4)


def test_an_adapter_of_an_encoder_is_one_for_peft(system: Any, tmp_path: Path) -> None:
    from peft import PeftModelForFeatureExtraction

    artefact = fit(system, pairs(), quick(mode="lora"), Run())
    artefact.save(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert config["task_type"] == "FEATURE_EXTRACTION"
    ids_BT = torch.tensor(system.ids(["who wrote the letter ?"]))
    with artefact.apply(system), torch.no_grad():
        ours_BTD = system.model(ids_BT).last_hidden_state.clone()
    theirs = PeftModelForFeatureExtraction.from_pretrained(load_base("tiny:bert").model, tmp_path / "saved")
    with torch.no_grad():
        found_BTD = theirs.eval()(input_ids=ids_BT).last_hidden_state
    torch.testing.assert_close(found_BTD, ours_BTD, atol=1e-5, rtol=1e-4)


# ---- bad input, and a user's own files


def test_a_users_own_files(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    rows = [{"query": query, "positive": text, "negatives": ["something else"]} for query, text in PAIRS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"batch_rows": 4, "max_steps": 2, "warmup_steps": 0, "lr": 1e-3}
    artefact = temper.fit("star-adore", "tiny:roberta", str(path), **settings)
    assert artefact.method == "star-adore"
    found = values(temper.measure("star-adore", "tiny:roberta", str(path)), "R@100")
    assert found[None] == 1
    path.write_text('{"query": "no document"}\n')
    with pytest.raises(DataError, match="positive"):
        temper.fit("star-adore", "tiny:bert", {"train": str(path)}, **settings)


def test_bad_input_is_named(system: Any) -> None:
    with pytest.raises(DataError, match="1 queries are left"):
        fit(system, pairs(num=1), quick(negatives="in-batch"), Run())
    twice = Data({"test": [Ranking("a", "one", id="x"), Ranking("b", "two", id="x")]})
    with pytest.raises(DataError, match="have one id"):
        list(measure(system, twice, quick(), Run()))
    with pytest.raises(ConfigError, match="no prompt 'query'"):
        fit(system, pairs(), quick(query_prompt="query"), Run())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stage": "starr"}, "not a valid value"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"lr": -1.0}, "lr must be at least 0"),
        ({"reset_layers": 2, "mode": "lora"}, "needs mode=full"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        core_config.build(Config, [("test", settings)])
