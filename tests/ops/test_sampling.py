import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from temper.ops.sampling import choose_tokens, keep_top, row_uniforms
from temper.systems.base import Sampling

LOGITS = torch.tensor([[0.5, 0.1, 0.3, 0.1]]).log()


def draw(logits_BV, uniforms, **settings_of):
    sampling = Sampling(**{"temperature": 1.0, **settings_of})
    return choose_tokens(
        logits_BV.expand(len(uniforms), -1), sampling, torch.tensor(uniforms).double()
    ).tolist()


def test_greedy_takes_the_most_probable_token():
    assert choose_tokens(LOGITS, Sampling(), None).tolist() == [0]


def test_uniforms_pick_by_cumulative_probability():
    assert draw(LOGITS, [0.0, 0.49, 0.51, 0.59, 0.61, 0.89, 0.91, 0.999999]) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_temperature_sharpens():
    # squared and renormalised: 25, 1, 9, 1 of 36
    assert draw(LOGITS, [0.69, 0.70, 0.73, 0.96, 0.98], temperature=0.5) == [0, 1, 2, 2, 3]


def test_top_k_keeps_the_k_largest_renormalised():
    # 5 and 3 of 8
    assert draw(LOGITS, [0.62, 0.63, 0.9999], top_k=2) == [0, 2, 2]


def test_top_p_keeps_the_fewest_that_reach_it():
    # 0.5 alone does not reach 0.6; with 0.3 it does
    assert draw(LOGITS, [0.62, 0.63, 0.9999], top_p=0.6) == [0, 2, 2]
    assert draw(LOGITS, [0.0, 0.9999], top_p=0.01) == [0, 0]


def test_excluded_tokens_are_never_drawn_even_at_the_end():
    logits = torch.tensor([[0.0, 0.0, -torch.inf, -torch.inf]])
    assert draw(logits, [0.0, 0.4999, 0.5001, 1.0]) == [0, 0, 1, 1]


def slow_top_p(probs, top_p):
    order = sorted(range(len(probs)), key=lambda i: -probs[i])
    kept, mass = set(), 0.0
    for token in order:
        kept.add(token)
        mass += probs[token]
        if mass >= top_p:
            break
    return kept


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.05, 0.99), st.sampled_from([0.3, 3.0]))
def test_the_nucleus_equals_a_plain_loop_over_a_large_vocabulary(seed, top_p, scale):
    logits = scale * torch.randn(1, 700, generator=torch.Generator().manual_seed(seed))
    probs_BK, ids_BK = keep_top(logits, 0, top_p)
    got = set(ids_BK[0, probs_BK[0] > 0].tolist())
    want = slow_top_p(torch.softmax(logits[0].double(), -1).tolist(), top_p)
    assert len(got ^ want) <= 1, "only the token on the border may differ, by rounding"


def test_uniforms_depend_on_seed_prompt_and_sample_only():
    base = row_uniforms(1, 2, 3, 10)
    assert torch.equal(base[:4], row_uniforms(1, 2, 3, 4))
    for other in (row_uniforms(0, 2, 3, 10), row_uniforms(1, 3, 3, 10), row_uniforms(1, 2, 4, 10)):
        assert not torch.equal(base, other)
    assert torch.equal(row_uniforms(-1, 0, 0, 2), row_uniforms(-1, 0, 0, 2))


def test_drawn_shares_match_the_probabilities():
    shares = (
        torch.bincount(torch.tensor(draw(LOGITS, row_uniforms(0, 0, 0, 4000).tolist())), minlength=4) / 4000
    )
    assert shares.tolist() == pytest.approx([0.5, 0.1, 0.3, 0.1], abs=0.03)
