"""Toward and away losses by hand, against the naive formula, and their cutoffs."""

import math

import pytest
import torch

from temper.ops.batching import Example, collate
from temper.ops.logprobs import score_batch
from temper.ops.toward_away import (
    TokenScores,
    away_tokens,
    bounded_logp,
    log_one_minus_p,
    mean_rows,
    score_tokens,
    softened,
    toward_away,
)


def scores_of(logp, rows, num_rows):
    logp_S = torch.tensor(logp)
    return TokenScores(
        logp_S, torch.log1p(-logp_S.exp()), torch.tensor(rows), num_rows, lambda mask_S: mask_S
    )


def test_log_one_minus_p_by_hand_and_where_the_naive_formula_gives_out():
    logits_SV = torch.tensor([[0.0, math.log(3.0)], [30.0, 0.0]], dtype=torch.float32)
    found = log_one_minus_p(logits_SV, torch.tensor([1, 0]))
    assert found.tolist() == pytest.approx([math.log(0.25), -30.0])
    naive = torch.log1p(-logits_SV.softmax(-1)[1, 0])
    assert naive == -math.inf


def test_away_leaves_unlikely_tokens_alone_and_still_counts_them():
    logp_S = torch.tensor([math.log(0.5), -6.0, -4.0], requires_grad=True)
    scores = scores_of([0.0], [0], 1)._replace(
        logp_S=logp_S, log_rest_S=torch.log1p(-logp_S.exp()), row_S=torch.tensor([0, 0, 0])
    )
    tokens_S = away_tokens(scores)
    assert tokens_S.tolist() == pytest.approx([math.log(2.0), 0.0, -math.log1p(-math.exp(-4.0))])
    tokens_S.sum().backward()
    assert logp_S.grad[1] == 0
    assert logp_S.grad[0] > 0
    assert logp_S.grad[2] > 0
    terms = toward_away(scores, scores)
    assert terms["away"].count == 3
    assert terms["toward"].count == 3
    assert terms["toward"].total.item() == pytest.approx(math.log(2.0) + 10.0)


def test_softened_keeps_the_loss_above_the_cutoff_and_a_thousandth_of_its_slope_below():
    loss_B = torch.tensor([0.8, 0.4, -4.0, -6.0], requires_grad=True)
    toward = softened(loss_B[:2], 0.5)
    away = softened(loss_B[2:], -5.0)
    assert toward.tolist() == pytest.approx([0.8, 0.5004])
    assert away.tolist() == pytest.approx([-4.0, -5.006])
    (toward.sum() + away.sum()).backward()
    assert loss_B.grad.tolist() == pytest.approx([1.0, 0.001, 1.0, 0.001])


def test_bounded_logp_keeps_the_denominator():
    scores = scores_of([-1.0, -7.0, -0.1], [0, 0, 1], 2)
    assert bounded_logp(scores, least=-5.0).tolist() == pytest.approx([-0.5, -0.1])
    assert bounded_logp(scores, most=-0.5).tolist() == pytest.approx([-4.0, 0.0])
    assert mean_rows(scores.logp_S, scores).tolist() == pytest.approx([-4.0, -0.1])


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_scores_agree_with_score_batch_whatever_the_padding(lively, kind):
    system = lively(kind, "eager")
    rows = [
        Example([5, 6, 7, 8, 9], [False, False, True, True, True]),
        Example([5, 9, 4], [False, True, True]),
    ]
    batch = collate(rows, 3)
    scores = score_tokens(system.model, batch)
    slow = score_batch(system.model, batch)
    assert torch.allclose(scores.logp_S, slow.logp_S, atol=1e-5)
    assert torch.allclose(scores.log_rest_S.exp() + scores.logp_S.exp(), torch.ones(5), atol=1e-5)
    alone = score_tokens(system.model, collate(rows[1:], 3))
    part = scores.of(1, 2)
    assert part.num_rows == 1
    assert part.row_S.tolist() == [0, 0]
    assert torch.allclose(part.logp_S, alone.logp_S, atol=1e-5)
    logits = part.logits_of(torch.tensor([False, True]))
    assert torch.allclose(logits.log_softmax(-1)[0, 4], part.logp_S[1], atol=1e-5)
