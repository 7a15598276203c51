"""Hard negatives: positives and likely positives never among them."""

from __future__ import annotations

import pytest
import torch

from temper.core.errors import DataError, ModelError
from temper.core.types import Run
from temper.ops.negatives import cross_rater, drop_likely_positives, encoder_rater, mine
from temper.systems.loading import load_base

CORPUS = ["the fox", "a boat", "the river and the mill", "one and one"]


def test_positives_are_removed_and_the_order_kept():
    found_NK = torch.tensor([[3, 0, 2, 1], [1, 0, 3, 2]])
    assert mine(found_NK, [{0, 3}, set()], 2) == [[2, 1], [1, 0]]
    assert mine(found_NK, [{0, 1, 2, 3}, {1}], 9) == [[], [0, 3, 2]]
    with pytest.raises(DataError, match="2 rankings for 1 queries"):
        mine(found_NK, [{0}], 2)


def test_what_is_rated_like_the_positive_is_dropped():
    ratings = {("q", CORPUS[0]): 0.9, ("q", CORPUS[1]): 0.85, ("q", CORPUS[2]): 0.5, ("p", CORPUS[3]): 0.1}

    def rate(pairs):
        return torch.tensor([ratings.get(pair, 0.0) for pair in pairs])

    kept = drop_likely_positives([[1, 2], [0, 1]], ["q", "p"], [{0}, {3}], CORPUS, rate, 0.2)
    assert kept == [[2], []], "0.0 is not more than 0.2 below 0.1"
    assert drop_likely_positives([[1, 2], [0]], ["q", "p"], [{0}, {3}], CORPUS, rate, 0.0) == [[1, 2], [0]]


def test_an_encoder_rates_by_cosine():
    rate = encoder_rater(load_base("tiny:bert"), Run())
    values = rate([("the fox", "the fox"), ("the fox", "a boat"), ("a boat", "the fox")])
    assert values[0] == pytest.approx(1.0, abs=1e-5)
    assert values[1] == pytest.approx(float(values[2]), abs=1e-5)
    assert values[1] < 1


def test_a_cross_encoder_rates_pairs(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    settings = {"vocab_size": 512, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}  # fmt: skip
    system = load_base("tiny:bert")
    for labels in (1, 2):
        torch.manual_seed(0)
        model = BertForSequenceClassification(BertConfig(**settings, num_labels=labels)).eval()
        model.save_pretrained(tmp_path / str(labels))
        system.tokenizer.save_pretrained(tmp_path / str(labels))
    rate = cross_rater(tmp_path / "1", Run(), batch_rows=2)
    pairs = [("the fox", CORPUS[2]), ("the fox", CORPUS[0]), ("one", CORPUS[3])]
    one_by_one = torch.cat([rate([pair]) for pair in pairs])
    torch.testing.assert_close(rate(pairs), one_by_one, atol=1e-5, rtol=1e-4)
    with pytest.raises(ModelError, match="has 2 outputs"):
        cross_rater(tmp_path / "2", Run())
