"""What a pass over candidates runs and keeps: changed ends, packed rows, prefixes read once, batches that fit in memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from temper.core.errors import NeedsError
from temper.ops import prefix_cache, search_losses
from temper.ops.prefix_cache import PrefixCache
from temper.ops.search_losses import SlotScorer

from .search_runs import draw, scorer_of, slow_losses


def test_only_the_changed_end_is_run(lively):
    system = lively("llama")
    scorer = scorer_of(system)
    current = [40, 50, 60, 70, 80, 90]
    scorer.losses(torch.tensor([current]), current)
    before = scorer.tokens
    rows = torch.tensor([current] * 64)
    rows[:, 4] = torch.arange(100, 164)
    scorer.losses(rows, current)
    tail = len(scorer.prompt.after) + len(scorer.prompt.target) - 1
    assert scorer.tokens - before == 4 + 64 * (2 + tail)
    assert scorer.queries == 65


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_packed_rows_run_no_token_in_vain(lively, kind, monkeypatch):
    """One pass for candidates of all positions; a window shorter than the text forbids it."""
    system = lively(kind)
    scorer = scorer_of(system)
    current = [40, 50, 60, 70, 80, 90]
    rows = draw(current, 14)
    wanted = slow_losses(system, scorer.prompt, rows)
    torch.testing.assert_close(scorer.losses(rows, current).loss_K, wanted, atol=1e-4, rtol=1e-5)
    scorer.gradient(current)
    packs, real = [], search_losses.packed
    monkeypatch.setattr(search_losses, "packed", lambda *args: packs.append(1) or real(*args))
    spent = scorer.tokens
    torch.testing.assert_close(scorer.losses(rows, current).loss_K, wanted, atol=1e-4, rtol=1e-5)
    first = (rows != torch.tensor(current)).int().argmax(1)
    least = 14 * (6 + len(scorer.prompt.after) + len(scorer.prompt.target) - 1) - int(first.sum())
    if kind == "mistral":
        assert not packs
        assert scorer.tokens - spent > least
    else:
        assert packs == [1]
        assert scorer.tokens - spent == least


def test_places_of_packed_rows_by_hand():
    """Rows that leave the prefix at 2 and at 3 and end at 5."""
    rows = prefix_cache.packed([2, 3], 5, torch.device("cpu"))
    assert rows.position_S.tolist() == [2, 3, 4, 3, 4]
    assert rows.place_S.tolist() == [0, 1, 2, 4, 5]
    assert rows.token_BW.tolist()[0] == [0, 1, 2]
    assert rows.token_BW.tolist()[1][1:] == [3, 4]
    assert rows.seen_B1WK[0, 0, 2].int().tolist() == [1, 1, 0, 1, 1, 1]
    assert rows.seen_B1WK[1, 0, 1].int().tolist() == [1, 1, 1, 0, 1, 0]


def test_memory_that_runs_out_halves_the_batch_once(lively, monkeypatch):
    system = lively("llama")
    scorer = scorer_of(system, reuse=False)
    sizes = []
    real = SlotScorer._pass

    def small(self, ids_BN, start, cache):
        sizes.append(len(ids_BN))
        if len(ids_BN) > 5:
            raise torch.OutOfMemoryError("out of memory")
        return real(self, ids_BN, start, cache)

    monkeypatch.setattr(SlotScorer, "_pass", small)
    current = [40, 50, 60]
    rows = draw(current, 16)
    found = scorer.losses(rows, current)
    torch.testing.assert_close(found.loss_K, slow_losses(system, scorer.prompt, rows), atol=1e-4, rtol=1e-5)
    assert (sizes[0], scorer.max_rows) == (16, 4)
    sizes.clear()
    scorer.losses(rows, current)
    assert sizes == [4, 4, 4, 4], "the size that fitted is remembered"
    monkeypatch.setattr(SlotScorer, "_pass", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("none")))
    with pytest.raises(NeedsError, match="single candidate"):
        scorer.losses(rows[:1], current)


def test_other_errors_are_not_taken_for_memory(lively, monkeypatch):
    scorer = scorer_of(lively("llama"), reuse=False)
    monkeypatch.setattr(SlotScorer, "_pass", lambda *_: (_ for _ in ()).throw(RuntimeError("shape")))
    with pytest.raises(RuntimeError, match="shape"):
        scorer.losses(torch.tensor([[1, 2]]), [1, 2])


def test_a_prefix_is_read_and_never_changed(lively):
    """transformers' own cache grows with each pass over it; this one does not."""
    model = lively("llama").model
    prefix = PrefixCache.empty(model).extended(model, [5, 6, 7, 8])
    keys = prefix.prefix[0].keys.clone()
    own = DynamicCache()
    model(input_ids=torch.tensor([[5, 6, 7, 8]]), past_key_values=own)
    for _ in range(2):
        with torch.no_grad():
            rows = model(input_ids=torch.tensor([[9, 10], [11, 12]]), past_key_values=prefix).logits
            model(input_ids=torch.tensor([[9, 10]]), past_key_values=own)
    assert (prefix.num_tokens, own.get_seq_length()) == (4, 8)
    assert torch.equal(prefix.prefix[0].keys, keys)
    with torch.no_grad():
        whole = model(input_ids=torch.tensor([[5, 6, 7, 8, 11, 12]])).logits[0, -2:]
    torch.testing.assert_close(rows[1], whole, atol=1e-5, rtol=1e-4)
    short = prefix.first(2)
    assert short.num_tokens == 2
    assert short.prefix[0].keys.data_ptr() == prefix.prefix[0].keys.data_ptr(), "a view"
    assert prefix.extended(model, []) is prefix
    with pytest.raises(NeedsError, match="reads no keys"):
        prefix.recorder().recorded()


@settings(deadline=None, max_examples=25)
@given(
    kind=st.sampled_from(["llama", "gpt2", "gemma", "neox", "qwen2", "mistral"]),
    num_prefix=st.integers(1, 40),
    num_own=st.integers(1, 30),
    num_rows=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_a_prefix_read_once_gives_the_logits_of_whole_texts(
    lively, kind, num_prefix, num_own, num_rows, seed
):
    """Also past a sliding window, with key heads shared or not; afterwards the model is as it was."""
    model = lively(kind).model
    generator = torch.Generator().manual_seed(seed)
    head = torch.randint(4, 512, (num_prefix,), generator=generator)
    rows = torch.randint(4, 512, (num_rows, num_own), generator=generator)
    prefix = PrefixCache.empty(model).extended(model, head.tolist())
    with torch.no_grad():
        copied = model(input_ids=rows, past_key_values=prefix).logits
        with prefix_cache.read_once(model, prefix):
            once = model(input_ids=rows, past_key_values=prefix).logits
        whole = model(input_ids=torch.cat([head.expand(num_rows, -1), rows], dim=1)).logits[:, num_prefix:]
        torch.testing.assert_close(once, whole, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(once, copied, atol=1e-4, rtol=1e-4)
        assert torch.equal(model(input_ids=rows, past_key_values=prefix).logits, copied)
    assert model.config._attn_implementation == "sdpa"


def test_only_plain_sdpa_reads_a_prefix_once(lively):
    eager = lively("gemma2", "eager").model
    prefix = PrefixCache.empty(eager).extended(eager, [5, 6, 7])
    with prefix_cache.read_once(eager, prefix):
        assert eager.config._attn_implementation == "eager"
    with pytest.raises(RuntimeError, match="more than a softmax"):
        prefix_cache._attend(None, None, None, None, None, softcap=50.0)
