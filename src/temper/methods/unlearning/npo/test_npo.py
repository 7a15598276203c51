"""The losses by hand and in their limits, and the tables that name them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from temper.methods.unlearning.npo import losses
from temper.methods.unlearning.npo.card import FORGET_NAMES, TERM_NAMES, loss_parts
from temper.methods.unlearning.npo.conftest import doubles

logp = st.lists(st.tuples(st.floats(-300, 0), st.floats(-300, 0)), min_size=1, max_size=5)


def test_npo_by_hand() -> None:
    # p / p_ref = 1/2 with beta 1: 2 log(1 + 1/2)
    assert losses.npo_loss(doubles(math.log(0.1)), doubles(math.log(0.2)), 1.0).item() == pytest.approx(
        2 * math.log(1.5)
    )
    assert losses.npo_loss(doubles(-3, -3), doubles(-3, -3), 0.1).item() == pytest.approx(
        2 * 20 * math.log(2)
    )


def test_simnpo_and_dpo_by_hand() -> None:
    nll_mean, delta, beta = 6 / 3, 0.5, 2.0
    expected = -2 / beta * math.log(1 / (1 + math.exp(-beta * (nll_mean - delta))))
    assert losses.simnpo_loss(doubles(-6), doubles(3), beta, delta).item() == pytest.approx(expected)
    margin = 0.1 * ((-4 - -5) - (-9 - -7))
    expected = -2 / 0.1 * math.log(1 / (1 + math.exp(-margin)))
    assert losses.dpo_loss(doubles(-4), doubles(-5), doubles(-9), doubles(-7), 0.1).item() == pytest.approx(
        expected
    )


@given(logp, st.floats(0.01, 5))
def test_npo_gradient_is_ascent_times_w(rows: list[tuple[float, float]], beta: float) -> None:
    now = doubles(*(a for a, _ in rows)).requires_grad_()
    ref = doubles(*(b for _, b in rows))
    (grad,) = torch.autograd.grad(losses.npo_loss(now, ref, beta), now)
    assert torch.allclose(grad, losses.npo_weight(now, ref, beta), atol=1e-12)
    assert ((grad >= 0) & (grad <= 2)).all()


def test_w_by_its_own_formula() -> None:
    now, ref, beta = doubles(-1.0, -8.0), doubles(-2.0, -2.0), 0.7
    p, q = now.exp() ** beta, ref.exp() ** beta
    assert torch.allclose(losses.npo_weight(now, ref, beta), 2 * p / (p + q))
    assert losses.npo_weight(ref, ref, beta).tolist() == [1.0, 1.0], "weight 1 at the start"
    assert losses.npo_weight(doubles(-500.0), doubles(-2.0), beta).item() < 1e-100, (
        "0 once an answer is unlikely"
    )


@given(logp)
def test_beta_towards_0_is_gradient_ascent(rows: list[tuple[float, float]]) -> None:
    now = doubles(*(a for a, _ in rows)).requires_grad_()
    ref = doubles(*(b for _, b in rows))
    beta = 1e-7
    loss = losses.npo_loss(now, ref, beta)
    (grad,) = torch.autograd.grad(loss, now)
    assert torch.allclose(grad, torch.ones_like(grad), atol=1e-4)
    # In value too, up to the constant 2 log 2 / beta a row, the reference, and the next term of the series.
    constant = len(rows) * 2 * math.log(2) / beta
    gaps = (now - ref).detach()
    next_term = beta / 4 * gaps.square().sum().item()
    assert loss.item() - constant == pytest.approx(gaps.sum().item(), abs=1e-3 + next_term)


def test_nothing_overflows_where_a_probability_vanished() -> None:
    for value in (-1e30, -1e4, 1e4, 1e30):
        assert torch.isfinite(losses.npo_loss(torch.tensor([value]), torch.tensor([-5.0]), 0.1)).all()
        assert torch.isfinite(
            losses.kto_loss(*(torch.tensor([value]),) * 2, torch.tensor([-5.0]), torch.tensor([1.0]), 1.0)
        )


def test_departure_6_the_constant_of_kto_leaves_its_gradient() -> None:
    rows = [doubles(-3, -6), doubles(-4, -5), doubles(-8, -2), doubles(-7, -3)]
    now, again = rows[2].clone().requires_grad_(), rows[2].clone().requires_grad_()
    ours = losses.kto_loss(rows[0], rows[1], now, rows[3], 0.5) / 2
    point = (rows[0] - rows[1]).mean()
    released = 1 - torch.sigmoid(point - 0.5 * (again - rows[3])).mean() * 2 / 0.5
    assert ours.item() - released.item() == pytest.approx(2 / 0.5 - 1)
    (a,), (b,) = torch.autograd.grad(ours, now), torch.autograd.grad(released, again)
    assert torch.allclose(a, b)


def test_kl_by_hand() -> None:
    ref, now = doubles(0.5, 0.5).log()[None], doubles(0.25, 0.75).log()[None]
    assert losses.kl_divergence(ref, now).item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert losses.kl_divergence(ref, ref).item() == 0


def test_names_and_tables_agree() -> None:
    assert set(losses.FORGET) == set(FORGET_NAMES)
    assert set(losses.TERMS) == set(TERM_NAMES)
    assert loss_parts("graddiff") == ("ga", ("rt",))
    assert losses.parse("npo+rt+kl").answers == ("forget", "retain")
    assert losses.parse("idk+rt").answers == ("idk", "retain")
    assert not losses.parse("ga+fkl").needs_retain
