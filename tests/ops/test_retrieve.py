"""Exact search beside a full sort of all scores, in both precisions, with ties, clusters and odd shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from temper.core.errors import ConfigError, NumericsError
from temper.core.types import Run
from temper.ops import retrieve
from temper.ops.retrieve import build_index, search

FLOAT, BF16 = Run(), Run(precision="bf16")


def slow_search(queries_ND, corpus_MD, k):
    """All scores in float64, rounded to float32, sorted whole."""
    ordered = (queries_ND.double() @ corpus_MD.double().T).float().sort(dim=1, descending=True, stable=True)
    return ordered.values[:, :k], ordered.indices[:, :k]


def assert_same(found, expected):
    assert torch.equal(found.indices_NK, expected[1])
    assert torch.equal(found.scores_NK, expected[0])


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 20), st.integers(1, 400), st.integers(1, 40)),
    k=st.integers(1, 30),
    seed=st.integers(0, 2**16),
    length=st.sampled_from([0.0, 1e-3, 1.0, 300.0]),
    run=st.sampled_from([FLOAT, BF16]),
)
def test_equals_the_full_sort(shape, k, seed, length, run):
    num_queries, num_items, width = shape
    generator = torch.Generator().manual_seed(seed)
    queries_ND = torch.randn(num_queries, width, generator=generator)
    corpus_MD = length * torch.randn(num_items, width, generator=generator)
    corpus_MD[num_items // 2] = corpus_MD[0]
    assert_same(search(queries_ND, corpus_MD, k, run), slow_search(queries_ND, corpus_MD, k))


@pytest.mark.parametrize("run", [FLOAT, BF16])
def test_chunks_change_nothing(run, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    queries_ND, corpus_MD = (
        torch.randn(37, 12, generator=generator),
        torch.randn(3000, 12, generator=generator),
    )
    corpus_MD[1000:1500] = corpus_MD[:500]
    expected = slow_search(queries_ND, corpus_MD, 11)
    assert_same(search(queries_ND, corpus_MD, 11, run), expected)
    for name, value in (("SCORES", 4096), ("QUERIES", 5), ("ITEMS", 700), ("PAIRS", 13), ("ROWS", 100)):
        monkeypatch.setattr(retrieve, name, value)
    assert_same(search(queries_ND, build_index(corpus_MD, run), 11, run), expected)


@pytest.mark.parametrize("run", [FLOAT, BF16])
def test_a_crowd_of_near_equals_is_told_apart(run):
    """Items closer to one another than bfloat16 can see."""
    generator = torch.Generator().manual_seed(1)
    corpus_MD = torch.nn.functional.normalize(1 + 1e-4 * torch.randn(5000, 64, generator=generator))
    queries_ND = torch.nn.functional.normalize(torch.randn(4, 64, generator=generator) + 1)
    assert_same(search(queries_ND, corpus_MD, 5, run), slow_search(queries_ND, corpus_MD, 5))


def test_ties_go_to_the_smaller_index():
    corpus_MD = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [2.0, 0.0]])
    found = search(torch.tensor([[1.0, 0.0]]), corpus_MD, 4, FLOAT)
    assert found.indices_NK.tolist() == [[3, 0, 2, 1]]
    assert found.scores_NK.tolist() == [[2.0, 1.0, 1.0, 0.0]]


def test_an_item_finds_itself_and_k_is_clipped():
    corpus_MD = torch.nn.functional.normalize(torch.randn(40, 6, generator=torch.Generator().manual_seed(2)))
    found = search(corpus_MD, corpus_MD, 100, FLOAT)
    assert found.indices_NK.shape == (40, 40)
    assert found.indices_NK[:, 0].tolist() == list(range(40))
    assert search(corpus_MD[:0], corpus_MD, 3, FLOAT).indices_NK.shape == (0, 3)


def test_bad_input_is_named():
    good = torch.ones(3, 2)
    with pytest.raises(ConfigError, match="corpus has shape"):
        search(good, good[:0], 1, FLOAT)
    with pytest.raises(ConfigError, match="the items width 2"):
        search(torch.ones(3, 4), good, 1, FLOAT)
    with pytest.raises(ConfigError, match="k is 0"):
        search(good, good, 0, FLOAT)
    with pytest.raises(NumericsError, match="item 1"):
        search(good, torch.tensor([[1.0], [torch.nan]]).expand(2, 2), 1, FLOAT)
    with pytest.raises(NumericsError, match="query 0"):
        search(torch.full((1, 2), torch.inf), good, 1, FLOAT)
