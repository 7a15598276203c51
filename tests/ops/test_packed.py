"""Rows read end to end beside the same rows alone: values and gradients, on every kind of attention."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from temper.ops import projection
from temper.ops.batching import Example, collate
from temper.ops.logprobs import score_batch
from temper.ops.packed import PackedAttention, Segment, _by_torch, can_pack, pack, packed_forward

PACKS = {"llama": True, "qwen2": True, "gemma": True, "mistral-wide": False, "neox": True, "gpt2": True}
REFUSES = ["gemma2", "mistral", "mamba"]


def examples(prompts):
    return [Example(ids, [False] + [place % 3 > 0 for place in range(1, len(ids))]) for ids in prompts]


@pytest.mark.parametrize("kind", [*PACKS, *REFUSES])
def test_a_model_packs_only_where_rows_stay_what_they_are_alone(kind, lively, random_prompts):
    model = lively(kind, "eager" if kind in ("gemma2", "mamba") else "sdpa").model
    assert can_pack(model) == PACKS.get(kind, False)
    rows = examples(random_prompts([5, 40, 17, 9]))
    fast = score_batch(model, collate(rows, 3)).logp_S
    fast.sum().backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    slow = torch.cat([score_batch_alone(model, row) for row in rows])
    torch.testing.assert_close(fast, slow, atol=1e-4, rtol=1e-5)
    slow.sum().backward()
    for name, parameter in model.named_parameters():
        if name in ours:
            torch.testing.assert_close(ours[name], parameter.grad, atol=2e-3, rtol=2e-3)


def test_what_all_rows_of_a_pass_begin_with_is_read_once(lively, random_prompts, monkeypatch):
    model = lively("llama").model
    beginning, *ends = random_prompts([12, 5, 1, 30])
    replies = [Example(beginning + end, [False] * 12 + [True] * len(end)) for end in ends]
    # The second row scores a token that all begin with: what is read once ends before it is predicted.
    early = [replies[0], replies[1]._replace(scored=[place > 9 for place in range(13)]), replies[2]]
    seen = []
    for rows, num_read in ((replies, 11 + 5 + 1 + 30), (early, 9 + 7 + 3 + 32)):
        seen.clear()
        monkeypatch.setattr(
            projection, "packed_forward", lambda m, line: seen.append(line) or packed_forward(m, line)
        )
        fast = score_batch(model, collate(rows, 3)).logp_S
        fast.sum().backward()
        ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        slow = torch.cat([score_batch_alone(model, row) for row in rows])
        slow.sum().backward()
        torch.testing.assert_close(fast, slow, atol=1e-4, rtol=1e-5)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(ours[name], parameter.grad, atol=2e-3, rtol=2e-3)
        model.zero_grad()
        assert seen[0].ids_1S.shape[1] == num_read


def score_batch_alone(model, row):
    ids = torch.tensor(row.ids)
    logp = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
    return logp[torch.tensor(row.scored[1:])]


def test_hooks_and_recomputed_activations_get_rows_of_the_usual_shape(lively):
    model = lively("llama").model
    assert can_pack(model)
    handle = model.model.layers[0].register_forward_hook(lambda *_: None)
    assert not can_pack(model)
    handle.remove()
    model.activation_checkpointing_enable()
    assert not can_pack(model)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 150), min_size=1, max_size=3), min_size=1, max_size=3),
    st.integers(0, 99),
)
def test_blocks_of_products_equal_torch_attention(sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    layout = pack([[[1] * size for size in row] for row in sizes]).layout
    total = sum(sum(row) for row in sizes)
    parts = [
        torch.randn(1, heads, total, 4, dtype=torch.float64, generator=generator).requires_grad_()
        for heads in (6, 2, 2)
    ]
    slow = _by_torch(*parts, layout, 0.4, 0.0)[0]
    fast = PackedAttention.apply(*(part[0] for part in parts), layout, 0.4)
    torch.testing.assert_close(fast, slow)
    weight = torch.randn(slow.shape, dtype=torch.float64, generator=generator)
    wanted = torch.autograd.grad((slow * weight).sum(), parts)
    for one, other in zip(torch.autograd.grad((fast * weight).sum(), parts), wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_a_line_says_positions_and_what_each_part_sees():
    line = pack([[[7, 8]], [[1, 2, 3], [4], [5, 6]]])
    assert line.ids_1S.tolist() == [[7, 8, 1, 2, 3, 4, 5, 6]]
    assert line.positions_1S.tolist() == [[0, 1, 0, 1, 2, 3, 3, 4]]
    assert line.layout == (Segment(0, 2), Segment(2, 5), Segment(5, 6, (2, 5)), Segment(6, 8, (2, 5)))
