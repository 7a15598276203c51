"""An index belongs to one document encoder and one corpus."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from temper.artefacts import Weights
from temper.core.errors import DataError, ModelError
from temper.core.types import Run
from temper.ops.corpus_index import check_rows, index_corpus, load_index, save_index, search_texts
from temper.ops.embed import embed
from temper.ops.retrieve import build_index
from temper.systems.loading import load_base

TEXTS = ["the fox", "a boat and a lighthouse", "the river and the mill", "one and one", "yes"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TEMPER_CACHE", str(tmp_path / "cache"))


def test_rows_are_the_texts_and_are_kept(monkeypatch):
    system = load_base("tiny:bert")
    index = index_corpus(system, TEXTS, Run())
    assert torch.equal(index.vectors_MD, embed(system, TEXTS, Run()))
    again = index_corpus(system, TEXTS, Run())
    assert torch.equal(again.vectors_MD, index.vectors_MD)
    assert not torch.equal(index_corpus(system.cut(3), TEXTS, Run()).vectors_MD, index.vectors_MD)
    assert search_texts(system, TEXTS, index, 99, Run()).indices_NK.shape == (5, 5)


def test_another_encoder_or_corpus_is_refused(tmp_path):
    system = load_base("tiny:bert")
    save_index(index_corpus(system, TEXTS, Run()), tmp_path / "index")
    found = load_index(tmp_path / "index", system, TEXTS, Run())
    assert torch.equal(found.vectors_MD, embed(system, TEXTS, Run()))
    with pytest.raises(ModelError, match="made by document encoder"):
        load_index(tmp_path / "index", load_base("tiny:bert:1"), TEXTS, Run())
    with pytest.raises(ModelError, match="made by document encoder"):
        load_index(tmp_path / "index", system.cut(4), TEXTS, Run())
    with pytest.raises(DataError, match="from other documents"):
        load_index(tmp_path / "index", system, TEXTS[::-1], Run())
    (tmp_path / "index" / "index.json").write_text("{}")
    with pytest.raises(DataError, match="cannot be read"):
        load_index(tmp_path / "index", system, TEXTS, Run())


def test_a_document_that_does_not_find_itself_is_named():
    system = load_base("tiny:bert")
    index = index_corpus(system, TEXTS, Run())
    check_rows(index, system, TEXTS, Run())
    shifted = dataclasses.replace(index, dense=build_index(index.vectors_MD.roll(1, 0), Run()))
    with pytest.raises(ModelError, match="Document 0 does not find itself: row 1 is nearer"):
        check_rows(shifted, system, TEXTS, Run())


def test_a_query_model_leaves_the_documents_alone(tmp_path):
    system = load_base("tiny:bert")
    name = "encoder.layer.0.output.dense.bias"
    moved = {name: system.model.get_parameter(name).detach() + torch.randn(32)}
    weights = Weights(system.fingerprint, "test", moved, side="query")
    calm, index = embed(system, TEXTS, Run()), index_corpus(system, TEXTS, Run())
    with weights.apply(system) as both:
        assert torch.equal(embed(both, TEXTS, Run()), calm)
        queries = embed(both.for_queries, TEXTS, Run())
        assert (queries - calm).abs().max() > 0.1
        index.check(both, TEXTS)
        assert both.fingerprint != both.document_fingerprint == system.fingerprint
        assert index_corpus(both, TEXTS, Run()).encoder == index.encoder
        shared = both.query_model.get_parameter("encoder.layer.1.output.dense.weight")
        assert shared is system.model.get_parameter("encoder.layer.1.output.dense.weight")
        with pytest.raises(ModelError, match="query model was trained against"):
            Weights(both.fingerprint, "test", moved).apply(both).__enter__()
        assert both.cut(4).document_fingerprint == system.cut(4).document_fingerprint
    with Weights(system.fingerprint, "test", moved).apply(system) as whole:
        assert torch.equal(embed(whole, TEXTS, Run()), queries)
    assert torch.equal(embed(system, TEXTS, Run()), calm)
    with weights.apply(system, 0.5) as half:
        between = half.query_model.get_parameter(name)
        torch.testing.assert_close(between, system.model.get_parameter(name).lerp(moved[name], 0.5))
