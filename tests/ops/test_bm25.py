"""BM25 beside its formula."""

from __future__ import annotations

import math

import pytest

from temper.core.errors import ConfigError, DataError
from temper.ops.bm25 import bm25_search

CORPUS = ["grey fox jumps", "fox fox river stone bridge", "blue whale", "grey stone"]


def test_by_hand():
    found = bm25_search(["fox"], CORPUS, 2, k1=1.2, b=0.5)
    mean, num = (3 + 5 + 2 + 2) / 4, 2
    idf = math.log(1 + (4 - num + 0.5) / (num + 0.5))

    def score(count, length):
        return idf * count / (count + 1.2 * (1 - 0.5 + 0.5 * length / mean))

    assert found.indices_NK.tolist() == [[1, 0]]
    assert found.scores_NK[0].tolist() == pytest.approx([score(2, 5), score(1, 3)], rel=1e-5)


def test_ties_and_unknown_words_keep_the_order():
    found = bm25_search(["zebra", "the", "whale"], CORPUS, 10)
    assert found.indices_NK.shape == (3, 4)
    assert found.indices_NK[:2].tolist() == [[0, 1, 2, 3]] * 2
    assert found.indices_NK[2, 0] == 2
    assert found.scores_NK[:2].sum() == 0


def test_bad_input_is_named():
    with pytest.raises(DataError, match="holds no word"):
        bm25_search(["fox"], ["the", "!"], 1)
    with pytest.raises(ConfigError, match="k is 0"):
        bm25_search(["fox"], CORPUS, 0)
    assert len(bm25_search([], CORPUS, 3).indices_NK) == 0
