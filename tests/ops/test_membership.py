"""Membership scores by hand, against slow versions, and on a model."""

from __future__ import annotations

import math
import zlib
from typing import Any

import pytest
import torch

from temper.core.errors import DataError
from temper.core.types import Run
from temper.data.schemas import Text
from temper.ops import logprobs, membership
from temper.ops.batching import plain_ids
from temper.systems.loading import load_base

TEXTS = [Text("one two three four five", id="a"), Text("a rather longer text of many words", id="b")]


@pytest.fixture(scope="module")
def system() -> Any:
    return load_base("tiny:llama")


def test_loss_and_zlib_by_hand() -> None:
    logp_T = torch.tensor([-1.0, -2.0, -6.0])
    assert membership.loss_score(logp_T) == pytest.approx(-3)
    assert membership.zlib_score(logp_T, "abc") == pytest.approx(-3 / len(zlib.compress(b"abc")))


def test_min_k_by_hand() -> None:
    logp_T = torch.tensor([-1.0, -5.0, -3.0, -2.0, -4.0])
    assert membership.min_k(logp_T, 0.4) == pytest.approx(-4.5)
    assert membership.min_k(logp_T, 0.01) == -5, "at least one token"
    assert membership.min_k(logp_T, 1.0) == pytest.approx(membership.loss_score(logp_T))


def test_min_k_plus_by_hand() -> None:
    # p = (1/2, 1/4, 1/4): mean log p = -1.5 log 2, variance = (1/2)(1/4) log^2 2 + (1/2)(1/4) log^2 2 = log^2 2 / 4
    logits_SV = torch.tensor([[0.5, 0.25, 0.25]] * 2).log() + 7.0
    tokens = membership.token_statistics(logits_SV, torch.tensor([0, 1]))
    log2 = math.log(2)
    assert tokens.logp_T.tolist() == pytest.approx([-log2, -2 * log2])
    assert tokens.mean_T.tolist() == pytest.approx([-1.5 * log2] * 2)
    assert tokens.deviation_T.tolist() == pytest.approx([log2 / 2] * 2)
    # (-1 + 1.5) / 0.5 = 1 and (-2 + 1.5) / 0.5 = -1
    assert membership.min_k_plus(tokens, 0.5) == pytest.approx(-1)
    assert membership.min_k_plus(tokens, 1.0) == pytest.approx(0, abs=1e-6)


def test_a_distribution_without_spread_gives_no_infinity() -> None:
    masked = torch.tensor([[0.0, -math.inf, -math.inf], [0.0, 0.0, 0.0]])
    tokens = membership.token_statistics(masked, torch.tensor([0, 2]))
    assert tokens.deviation_T.tolist() == pytest.approx([0, 0], abs=1e-3)
    assert math.isfinite(membership.min_k_plus(tokens, 1.0))


def test_scores_are_what_the_model_says(system: Any) -> None:
    scores = membership.membership_scores(system, TEXTS, Run(), share=0.2)
    assert set(scores) == set(membership.ATTACKS)
    for number, text in enumerate(TEXTS):
        ids = torch.tensor([system.tokenizer(text.text)["input_ids"]])
        with torch.no_grad():
            loss = system.model(input_ids=ids, labels=ids).loss
        assert scores["loss"][number] == pytest.approx(-loss.item(), abs=1e-4)
        packed = len(zlib.compress(text.text.encode()))
        assert scores["zlib"][number] == pytest.approx(-loss.item() / packed, abs=1e-5)


def test_chunks_of_the_vocabulary_change_nothing(system: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = membership.text_tokens(system, TEXTS, Run())
    vocabulary, sizes = system.model.config.vocab_size, []
    monkeypatch.setattr(logprobs, "CHUNK_LOGITS", 2 * vocabulary)
    original = membership.token_statistics
    monkeypatch.setattr(
        membership,
        "token_statistics",
        lambda logits_SV, target_S: sizes.append(logits_SV.numel()) or original(logits_SV, target_S),
    )
    for one, other in zip(whole, membership.text_tokens(system, TEXTS, Run()), strict=True):
        for part, same in zip(one, other, strict=True):
            torch.testing.assert_close(part, same, atol=1e-5, rtol=1e-5)
    assert len(sizes) > 2
    assert max(sizes) == 2 * vocabulary


def test_what_is_compressed_is_what_was_scored(system: Any) -> None:
    """A text cut to four tokens scores as the text of those four."""
    ids = plain_ids(system.tokenizer, TEXTS[1].text)[:4]
    short = Text(system.tokenizer.decode(ids, skip_special_tokens=True))
    assert len(short.text) < len(TEXTS[1].text)
    cut = membership.membership_scores(system, TEXTS[1:], Run(), max_tokens=4)
    assert cut["zlib"] == [cut["loss"][0] / len(zlib.compress(short.text.encode()))]


def test_batching_changes_nothing(system: Any) -> None:
    together = membership.membership_scores(system, TEXTS, Run())
    alone = [membership.membership_scores(system, [text], Run()) for text in TEXTS]
    for name, values in together.items():
        assert values == pytest.approx([one[name][0] for one in alone], abs=1e-4)


def test_bad_shares_and_texts_are_named(system: Any) -> None:
    with pytest.raises(DataError, match="share"):
        membership.membership_scores(system, TEXTS, Run(), share=0.0)
    with pytest.raises(DataError, match="no token to score"):
        membership.membership_scores(system, [Text("a", id="short")], Run(), max_tokens=1)
