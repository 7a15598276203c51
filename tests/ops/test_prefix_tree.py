"""Rows read as a tree against the same rows read one by one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from temper.core.types import Run
from temper.ops import logprobs, prefix_tree
from temper.ops.batching import Example
from temper.ops.logprobs import next_token_logits, response_logprobs

KINDS = ("llama", "gpt2", "qwen2", "gemma", "mistral-wide", "neox")
ALONE = Run(exact=True)


@torch.no_grad()
def slow_logprobs(system, example):
    """Full logits of the whole row, log-softmax, gather."""
    logits_TV = system.model(input_ids=torch.tensor([example.ids]), use_cache=False).logits[0].float()
    logp_TV = logits_TV.log_softmax(-1)
    places = [t for t, scored in enumerate(example.scored) if scored]
    return torch.stack([logp_TV[t - 1, example.ids[t]] for t in places])


def grow(draw, depth=0):
    """Rows of a random tree: a segment, then its branches; segments long and short, rows that are prefixes of others."""
    own = draw(st.lists(st.integers(4, 9), min_size=1, max_size=draw(st.sampled_from([2, 6, 24]))))
    branches = draw(st.integers(0, 3)) if depth < 3 else 0
    rows = [own] if not branches or draw(st.booleans()) else []
    for _ in range(branches):
        rows += [own + row for row in grow(draw, depth + 1)]
    return rows


@st.composite
def forests(draw):
    rows = [row for _ in range(draw(st.integers(1, 3))) for row in grow(draw)]
    rows = draw(st.permutations([[5, *row] for row in rows]))
    examples = []
    for row in rows:
        scored = [False, *draw(st.lists(st.booleans(), min_size=len(row) - 1, max_size=len(row) - 1))]
        scored[draw(st.integers(1, len(row) - 1))] = True
        examples.append(Example(row, scored))
    return examples


@settings(max_examples=40, deadline=None)
@given(
    examples=forests(),
    pack=st.sampled_from([8, 32, 512]),
    shared=st.sampled_from([1, 4]),
    kept=st.sampled_from([1, 16]),
    budget=st.sampled_from([1, 64, 4096]),
)
def test_a_forest_equals_its_rows(lively, examples, pack, shared, kept, budget):
    system = lively("llama")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_tree, "PACK_TOKENS", pack)
        patch.setattr(prefix_tree, "MIN_SHARED", shared)
        patch.setattr(prefix_tree, "MIN_KEPT", kept)
        got = response_logprobs(system, examples, reduce="tokens", run=Run(batch_tokens=budget))
        first = next_token_logits(system, [e.ids for e in examples], Run(batch_tokens=budget))
    for example, values in zip(examples, got, strict=True):
        torch.testing.assert_close(values, slow_logprobs(system, example), atol=1e-5, rtol=1e-5)
    assert torch.equal(
        first.argmax(-1), next_token_logits(system, [e.ids for e in examples], ALONE).argmax(-1)
    )


@settings(max_examples=60, deadline=None)
@given(examples=forests(), pack=st.sampled_from([8, 32, 512]))
def test_a_plan_holds_every_row_once_behind_tokens_that_it_begins_with(examples, pack):
    rows = sorted(example.ids[:-1] for example in examples)
    tree = prefix_tree._Tree(rows, [[len(row) - 1] for row in rows])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_tree, "PACK_TOKENS", pack)
        nodes = tree.plan()
    assert sorted(n for node in nodes for span in node.spans for n in range(*span)) == list(range(len(rows)))
    for node in nodes:
        for span in node.spans:
            packed = tree.pack(span, node.depth)
            assert len(packed.ids) == tree.size(span, node.depth)
            for n, wanted in zip(range(*span), packed.wanted, strict=True):
                assert rows[n][: node.depth] == rows[node.lo][: node.depth]
                assert [packed.ids[column] for column in wanted] == [rows[n][-1]]
                assert [packed.position[column] for column in wanted] == [len(rows[n]) - 1]


def passages(random_prompts, count=3):
    return [
        Example(passage + question + choice, [False] * (len(passage) + len(question)) + [True] * len(choice))
        for passage in random_prompts([30] * count, seed=1)
        for question in random_prompts([9, 14], seed=2)
        for choice in random_prompts([1, 3, 2, 3], seed=3)
    ]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_equals_whole_rows(lively, random_prompts, kind, attention):
    system = lively(kind, attention)
    examples = passages(random_prompts)
    assert prefix_tree.tree_works(system, 60)
    got = response_logprobs(system, examples, run=Run())
    torch.testing.assert_close(got, response_logprobs(system, examples, run=ALONE), atol=1e-5, rtol=1e-5)


def test_rows_share_under_autocast_too(lively, random_prompts):
    system, run = lively("llama"), Run(precision="bf16")
    examples = passages(random_prompts)
    got = response_logprobs(system, examples, run=run)
    with prefix_tree.reading(system, run, 0, 0):
        assert prefix_tree.tree_works(system, 60)
    torch.testing.assert_close(got, response_logprobs(system, examples, run=Run()), atol=0.05, rtol=0.02)


def tokens_run(system, work):
    """How many tokens the decoder reads."""
    counted = []
    stack = system.model.model
    handle = stack.register_forward_pre_hook(
        lambda module, args, kwargs: counted.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    hooked = prefix_tree.is_hooked
    try:
        prefix_tree.is_hooked = lambda model: False
        work()
    finally:
        prefix_tree.is_hooked = hooked
        handle.remove()
    return sum(counted)


def test_what_rows_share_is_read_once(lively, random_prompts, monkeypatch):
    system = lively("llama")
    examples = passages(random_prompts)
    response_logprobs(system, examples[:1], run=Run())  # the probe
    unique = {tuple(e.ids[:n]) for e in examples for n in range(1, len(e.ids))}
    most = 1.2 * len(unique)  # padding
    assert tokens_run(system, lambda: response_logprobs(system, examples, run=Run())) <= most
    monkeypatch.setattr(
        prefix_tree, "PACK_TOKENS", 24
    )  # passages, then questions, are kept as keys and values
    assert tokens_run(system, lambda: response_logprobs(system, examples, run=Run())) <= 1.5 * len(unique)
    assert tokens_run(system, lambda: response_logprobs(system, examples, run=ALONE)) == sum(
        len(e.ids) - 1 for e in examples
    )


@pytest.mark.parametrize("kind", ["mistral", "mamba"])
@pytest.mark.filterwarnings("ignore")  # the reference kernels announce themselves
def test_where_a_cache_cannot_be_shared_rows_are_read_whole(lively, random_prompts, kind):
    system = lively(kind, "eager" if kind == "mamba" else "sdpa")
    examples = passages(random_prompts, 1)
    assert not prefix_tree.tree_works(system, 60)
    got = response_logprobs(system, examples, run=Run())
    want = torch.stack([slow_logprobs(system, example).sum() for example in examples])
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-5)


def test_a_model_that_counts_columns_is_found_out(lively, random_prompts, monkeypatch):
    """Positions by column, not as told, as in models that bias attention by distance."""
    system = lively("llama")
    forward = system.model.model.forward
    monkeypatch.setattr(
        system.model.model, "forward", lambda *args, position_ids=None, **kwargs: forward(*args, **kwargs)
    )
    assert not prefix_tree.tree_works(system, 60)
    examples = passages(random_prompts, 1)
    want = torch.stack([slow_logprobs(system, example).sum() for example in examples])
    torch.testing.assert_close(response_logprobs(system, examples, run=Run()), want, atol=1e-5, rtol=1e-5)


def test_under_a_hook_nothing_is_shared(lively, random_prompts):
    system = lively("llama")
    examples = passages(random_prompts, 1)
    plain = response_logprobs(system, examples, run=ALONE)
    seen = []
    handle = system.model.model.layers[0].register_forward_hook(
        lambda m, args, out: seen.append(args[0].shape)
    )
    got = response_logprobs(system, examples, run=Run())
    handle.remove()
    assert sum(shape[0] for shape in seen) == len(examples)
    torch.testing.assert_close(got, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_rows", [1, 2, 7, 64])
def test_exact_mode_is_bit_equal_whatever_the_batch(lively, random_prompts, num_rows):
    system = lively("llama")
    prefix = random_prompts([20])[0]
    prompts = random_prompts(range(3, 67), seed=4, prefix=prefix)
    examples = [Example(ids, [t > len(ids) - 3 for t in range(len(ids))]) for ids in prompts]
    for budget in (1, 4096):
        run = Run(exact=True, batch_tokens=budget)
        alone = torch.cat([response_logprobs(system, [example], run=run) for example in examples[:num_rows]])
        assert torch.equal(response_logprobs(system, examples[:num_rows], run=run), alone)
        first = torch.cat([next_token_logits(system, [ids], run) for ids in prompts[:num_rows]])
        assert torch.equal(next_token_logits(system, prompts[:num_rows], run), first)


def test_logits_come_in_chunks_of_any_size(lively, random_prompts, monkeypatch):
    system = lively("llama")
    examples = passages(random_prompts)
    whole = response_logprobs(system, examples, run=Run())
    monkeypatch.setattr(logprobs, "CHUNK_LOGITS", 5 * 512)
    torch.testing.assert_close(response_logprobs(system, examples, run=Run()), whole)


@pytest.mark.parametrize("head_from", [1, 1 << 30])
def test_many_tokens_run_on_packed_weights_and_give_the_same(lively, random_prompts, monkeypatch, head_from):
    system = lively("llama")
    examples = passages(random_prompts)
    whole = response_logprobs(system, examples, run=Run())
    monkeypatch.setattr(prefix_tree, "REPACK_FROM_TOKENS", 1)
    monkeypatch.setattr(prefix_tree, "REPACK_HEAD_FROM", head_from)
    monkeypatch.setattr("temper.ops.packed_linear.MIN_WEIGHTS", 1)
    torch.testing.assert_close(response_logprobs(system, examples, run=Run()), whole, atol=1e-5, rtol=1e-5)


def test_equal_rows_and_none(lively):
    system = lively("llama")
    rows = [Example([5, 6, 7, 8, 9, 10], [False] * 5 + [True])] * 3
    values = response_logprobs(system, rows, run=Run())
    assert torch.equal(values, values[:1].expand(3))
    assert len(response_logprobs(system, [], run=Run())) == 0
    assert next_token_logits(system, [[5, 6], [5], [5, 6]], Run()).shape == (3, 512)


def test_bfloat16_stays_within_its_precision(lively, random_prompts):
    system = lively("llama")
    examples = passages(random_prompts)
    assert prefix_tree.tree_works(system, 60)
    half = response_logprobs(system, examples, reduce="mean", run=Run(precision="bf16"))
    torch.testing.assert_close(
        half, response_logprobs(system, examples, reduce="mean", run=ALONE), atol=0.3, rtol=0.03
    )
