"""Rows of a family read end to end beside the same rows alone; the reference's log-probabilities by either way."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from temper.core.types import Run
from temper.ops import logprobs, projection
from temper.ops.batching import Example
from temper.ops.families import families, score_families
from temper.ops.logprobs import reference_logprobs, response_logprobs


def replies(random_prompts):
    """Two prompts with three replies each, one row of its own, and one that asks within the others' prompt."""
    rows = []
    for seed, size in ((1, 20), (2, 12)):
        (prompt,) = random_prompts([size], seed=seed)
        rows += [
            Example(prompt + end, [False] * size + [True] * len(end)) for end in random_prompts([3, 9, 1])
        ]
    lone, early = random_prompts([15], seed=3)[0], rows[0].ids
    rows.append(Example(lone, [False] + [place % 3 > 0 for place in range(1, 15)]))
    rows.append(Example(early, [False] * 10 + [True] * 8 + [False] * (len(early) - 18)))
    return [rows[place] for place in (3, 7, 0, 6, 5, 1, 4, 2)]


def alone(model, row):
    ids = torch.tensor(row.ids)
    logits = model(input_ids=ids[None]).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(-1, ids[1:, None])[:, 0][torch.tensor(row.scored[1:])]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "gemma", "neox"])
def test_values_and_gradients_equal_rows_alone(kind, lively, random_prompts):
    model, rows = lively(kind).model, replies(random_prompts)
    logp_S, row_S = score_families(model, families(rows, 4096))
    logp_S.square().sum().backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    slow = [alone(model, row) for row in rows]
    torch.cat(slow).square().sum().backward()
    for number, wanted in enumerate(slow):
        torch.testing.assert_close(logp_S[row_S == number], wanted, atol=1e-4, rtol=1e-5)
    for name, parameter in model.named_parameters():
        if name in ours:
            torch.testing.assert_close(ours[name], parameter.grad, atol=5e-3, rtol=5e-3)


def test_neighbours_join_while_that_saves_tokens(random_prompts):
    rows = replies(random_prompts)
    found = {tuple(sorted(len(row.ids) for row in family.rows)): family for family in families(rows, 4096)}
    # The row that asks early shares what stands before its first question, one token less than is scored.
    assert set(found) == {(21, 23, 23, 29), (13, 15, 21), (15,)}
    assert found[13, 15, 21].num_shared == 11
    assert found[21, 23, 23, 29].num_shared == 9
    assert sum(family.num_tokens for family in found.values()) < sum(len(row.ids) - 1 for row in rows)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(2, 30), st.integers(1, 29)), min_size=1, max_size=9),
    st.integers(1, 99),
)
def test_every_row_stands_in_one_family_and_asks_for_nothing_that_is_shared(drawn, budget):
    rows = [
        Example([kind, *range(size)], [False] * min(ask, size) + [True] * (size + 1 - min(ask, size)))
        for kind, size, ask in drawn
    ]
    found = families(rows, budget)
    assert sorted(place for family in found for place in family.places) == list(range(len(rows)))
    for family in found:
        assert family.num_tokens <= budget or len(family.rows) == 1
        for row, place in zip(family.rows, family.places, strict=True):
            assert row is rows[place]
            assert row.ids[: family.num_shared] == family.rows[0].ids[: family.num_shared]
            assert not any(row.scored[: family.num_shared + 1])


@pytest.fixture
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TEMPER_CACHE", str(tmp_path))


@pytest.mark.parametrize("budget", [4096, 20])
def test_the_reference_in_bf16_is_near_float32(budget, lively, random_prompts, own_cache, monkeypatch):
    system, rows, passes = lively("llama"), replies(random_prompts), []
    monkeypatch.setattr(
        logprobs, "score_families", lambda model, batch: passes.append(batch) or score_families(model, batch)
    )
    run = Run(precision="bf16", batch_tokens=budget)
    fast, slow = reference_logprobs(system, rows, run), response_logprobs(system, rows, run=run)
    wanted = response_logprobs(system, rows, run=Run())
    assert (len(passes) == 1) == (budget == 4096)
    num_S = torch.tensor([float(sum(row.scored)) for row in rows])
    assert ((fast - wanted) / num_S).abs().max() <= max(0.05, 2 * ((slow - wanted) / num_S).abs().max())


@pytest.mark.parametrize(("kind", "run"), [("gemma2", Run(precision="bf16")), ("llama", Run(exact=True))])
def test_elsewhere_the_reference_is_read_as_replies_are(kind, run, lively, random_prompts, own_cache):
    system = lively(kind, "eager" if kind == "gemma2" else "sdpa")
    rows = replies(random_prompts)
    assert torch.equal(reference_logprobs(system, rows, run), response_logprobs(system, rows, run=run))


def test_without_gradient_no_slope_of_the_vocabulary_is_computed(lively, random_prompts, monkeypatch):
    model, rows = lively("llama").model, families(replies(random_prompts), 4096)
    assert model.get_output_embeddings().weight.requires_grad
    monkeypatch.setattr(projection, "_slope", lambda *given: pytest.fail("computed"))
    with torch.no_grad():
        score_families(model, rows)
