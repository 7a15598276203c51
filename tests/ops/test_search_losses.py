"""Losses of candidates: by hand, and beside whole rows one at a time."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AttentionInterface

from temper.core.types import Run
from temper.ops import prefix_cache, search_losses
from temper.ops.prefix_cache import PrefixCache
from temper.ops.search_losses import SlotLoss, SlotScorer, mean_nll, mellowmax
from temper.ops.search_prompt import slot_prompt

from .search_runs import EAGER, KEPT, PROMPT, TARGET, draw, scorer_of, slow_losses


def test_losses_by_hand():
    logits = torch.tensor([[[0.0, 0.0], [1.0, 3.0]]])
    target = torch.tensor([[0, 1]])
    wanted = (torch.log(torch.tensor(2.0)) + torch.log1p(torch.exp(torch.tensor(-2.0)))) / 2
    assert mean_nll(logits, target).item() == pytest.approx(wanted.item())
    z = torch.tensor([0.0, -3.0])
    soft = (torch.logsumexp(2 * z, 0) - torch.log(torch.tensor(2.0))) / 2
    assert mellowmax(logits, target, 2.0).item() == pytest.approx(soft.item())
    assert mellowmax(logits, target, 1e4).item() == pytest.approx(0.0, abs=1e-3), "towards the worst token"
    assert mellowmax(logits, target, 1e-3).item() == pytest.approx(-1.5, abs=1e-2), "towards the mean"


@pytest.mark.parametrize("kind", KEPT)
@pytest.mark.parametrize("replace", [1, 3])
def test_kept_keys_give_the_losses_of_whole_rows(lively, kind, replace):
    system = lively(kind, "eager" if kind in EAGER else "sdpa")
    kept = scorer_of(system, run=Run(batch_tokens=200))
    current = [40, 50, 60, 70, 80, 90]
    for seed in (0, 1):  # twice: a pass that changed the prefix would show in the next
        rows = torch.cat([draw(current, 20, seed, replace), torch.tensor([current])])
        found = kept.losses(rows, current)
        slow = slow_losses(system, kept.prompt, rows)
        torch.testing.assert_close(found.loss_K, slow, atol=1e-4, rtol=1e-5)
        whole = scorer_of(system, reuse=False).losses(rows, current)
        torch.testing.assert_close(found.loss_K, whole.loss_K, atol=1e-4, rtol=1e-5)
        current = rows[3].tolist()
    assert kept.reuses_prefix
    assert slow.std() > 1e-3, "candidates that all score the same would show nothing"


@settings(deadline=None, max_examples=25)
@given(
    kind=st.sampled_from(["llama", "gpt2", "gemma2", "mistral"]),
    num_slot=st.integers(1, 9),
    target=st.sampled_from(["Yes", TARGET, TARGET + " in the long grass of the field"]),
    text=st.sampled_from([PROMPT, "Now {optim_str} fold it.", PROMPT * 9]),
    budget=st.sampled_from([1, 60, 4096]),
    seed=st.integers(0, 99),
)
def test_losses_of_any_slot_prompt_and_target_are_those_of_whole_rows(
    lively, kind, num_slot, target, text, budget, seed
):
    """Positions, lengths, models and batches drawn at random; the gradient's keys serve the losses after it."""
    system = lively(kind, "eager" if kind in EAGER else "sdpa")
    kept = scorer_of(system, prompt=text, target=target, run=Run(batch_tokens=budget))
    current = torch.randint(4, 512, (num_slot,), generator=torch.Generator().manual_seed(seed)).tolist()
    for _ in range(2):
        kept.gradient(current)
        rows = draw(current, 9, seed, replace=min(2, num_slot))
        slow = slow_losses(system, kept.prompt, rows)
        torch.testing.assert_close(kept.losses(rows, current).loss_K, slow, atol=1e-4, rtol=1e-5)
        current = rows[0].tolist()
    assert kept.reuses_prefix


def test_the_gradients_pass_leaves_the_slots_keys(lively):
    """After a gradient on the same slot nothing of it is run again; after one on another slot it is."""
    scorer = scorer_of(lively("llama"))
    current = [40, 50, 60, 70, 80, 90]
    rows = draw(current, 12)
    plain = scorer.losses(rows, current).loss_K
    spent = scorer.tokens
    again = scorer.losses(rows, current).loss_K
    whole = scorer.tokens - spent
    scorer.gradient(current)
    spent = scorer.tokens
    torch.testing.assert_close(scorer.losses(rows, current).loss_K, plain, atol=1e-5, rtol=1e-5)
    assert torch.equal(again, plain)
    deepest = int((rows != torch.tensor(current)).int().argmax(1).max())
    assert whole - (scorer.tokens - spent) == deepest
    scorer.gradient([7, *current[1:]])
    spent = scorer.tokens
    torch.testing.assert_close(scorer.losses(rows, current).loss_K, plain, atol=1e-5, rtol=1e-5)
    assert scorer.tokens - spent == whole


def test_a_model_without_such_a_cache_is_scored_in_whole_rows(lively, caplog):
    system = lively("mamba", "eager")
    scorer = scorer_of(system)
    rows = draw([40, 50, 60], 6)
    with caplog.at_level(logging.WARNING):
        found = scorer.losses(rows, [40, 50, 60])
    torch.testing.assert_close(found.loss_K, slow_losses(system, scorer.prompt, rows), atol=1e-4, rtol=1e-5)
    assert not scorer.reuses_prefix
    assert "without kept keys" in caplog.text


def test_keys_that_change_the_losses_are_not_trusted(lively, monkeypatch):
    system = lively("llama")
    monkeypatch.setattr(
        PrefixCache, "first", lambda self, num: PrefixCache([(None, None)] * len(self.prefix))
    )
    scorer = scorer_of(system)
    rows = draw([40, 50, 60], 6)
    found = scorer.losses(rows, [40, 50, 60])
    assert not scorer.reuses_prefix
    torch.testing.assert_close(found.loss_K, slow_losses(system, scorer.prompt, rows), atol=1e-4, rtol=1e-5)


def test_attention_that_reads_the_prefix_once_is_given_up_where_it_changes_the_losses(lively, monkeypatch):
    """Then each row has its copy of the prefix, still cheaper than whole rows."""
    system = lively("llama")
    real, calls = prefix_cache._attend, []

    def wrong(*args, **more):
        calls.append(1)
        out, weights = real(*args, **more)
        return out * 1.1, weights

    monkeypatch.setitem(AttentionInterface._global_mapping, prefix_cache.READ_ONCE, wrong)
    scorer = scorer_of(system)
    rows = draw([40, 50, 60], 6)
    for _ in range(2):
        found = scorer.losses(rows, [40, 50, 60]).loss_K
        torch.testing.assert_close(found, slow_losses(system, scorer.prompt, rows), atol=1e-4, rtol=1e-5)
    assert calls
    assert scorer.reuses_prefix
    calls.clear()
    scorer.losses(rows, [40, 50, 60])
    assert not calls


def test_a_hook_in_the_model_means_whole_rows(lively):
    system = lively("llama")
    scorer = scorer_of(system)
    handle = system.model.model.layers[0].register_forward_hook(lambda module, args, out: None)
    assert not scorer.reuses_prefix
    handle.remove()
    assert scorer.reuses_prefix


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_fluency_counts_the_slots_own_tokens(lively, kind):
    system = lively(kind, "eager" if kind in EAGER else "sdpa")
    current = [40, 50, 60, 70]
    rows = draw(current, 10)
    scorer = scorer_of(system, loss=SlotLoss(control_weight=0.5, target_weight=2.0))
    found = scorer.losses(rows, current).loss_K
    whole = scorer_of(system, loss=SlotLoss(control_weight=0.5, target_weight=2.0), reuse=False)
    torch.testing.assert_close(found, whole.losses(rows, current).loss_K, atol=1e-4, rtol=1e-5)
    for row, ids in enumerate(rows.tolist()):
        before = scorer.prompt.before
        with torch.no_grad():
            logits = system.model(input_ids=torch.tensor([[*before, *ids]])).logits[0].float()
        nll = mean_nll(logits[None, len(before) - 1 : -1], torch.tensor([ids]))
        target = slow_losses(system, scorer.prompt, rows[row : row + 1])
        assert found[row].item() == pytest.approx((2 * target + 0.5 * nll).item(), abs=1e-3)


def test_mellowmax_is_scored_and_differentiated(lively):
    system = lively("llama")
    scorer = scorer_of(system, loss=SlotLoss(kind="mellowmax", alpha=0.7))
    plain = scorer_of(system)
    ids = [40, 50, 60]
    assert not torch.allclose(scorer.gradient(ids), plain.gradient(ids))
    assert (
        scorer.losses(torch.tensor([ids]), ids).loss_K.item()
        != plain.losses(torch.tensor([ids]), ids).loss_K.item()
    )


def test_a_hit_is_the_target_as_the_likeliest_token_everywhere(lively, slow_greedy):
    system = lively("llama")
    base = slot_prompt(system, PROMPT, TARGET)
    ids = [40, 50, 60]
    said = slow_greedy(system, [*base.before, *ids, *base.after], 4)
    import dataclasses

    hit = SlotScorer(dataclasses.replace(base, target=said), SlotLoss(), Run()).losses(
        torch.tensor([ids]), ids
    )
    near = SlotScorer(dataclasses.replace(base, target=[*said[:-1], 7]), SlotLoss(), Run())
    assert hit.hit_K.tolist() == [True]
    assert near.losses(torch.tensor([ids]), ids).hit_K.tolist() == [False]


def test_exact_mode_does_not_depend_on_company(lively):
    scorer = scorer_of(lively("llama"), run=Run(exact=True))
    current = [40, 50, 60]
    rows = draw(current, 9)
    together = scorer.losses(rows, current).loss_K
    alone = torch.cat([scorer.losses(row[None], current).loss_K for row in rows])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("budget", [1, 60, 4096])
def test_batches_change_nothing_and_keep_the_order(lively, budget, monkeypatch):
    monkeypatch.setattr(search_losses, "FILL_TOKENS", 30)
    system = lively("gpt2")
    scorer = scorer_of(system, run=Run(batch_tokens=budget))
    current = [40, 50, 60, 70]
    rows = draw(current, 25, replace=2)[torch.randperm(25, generator=torch.Generator().manual_seed(3))]
    torch.testing.assert_close(
        scorer.losses(rows, current).loss_K, slow_losses(system, scorer.prompt, rows), atol=1e-4, rtol=1e-5
    )


def test_bf16_losses_stay_near(lively):
    system = lively("llama")
    rows = draw([40, 50, 60], 8)
    low = scorer_of(system, run=Run(precision="bf16")).losses(rows, [40, 50, 60]).loss_K
    torch.testing.assert_close(low, slow_losses(system, scorer_of(system).prompt, rows), atol=0.2, rtol=0.05)
