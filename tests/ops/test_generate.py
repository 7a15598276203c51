"""Generation beside its slow twin: batches, samples, prefixes and precisions change nothing."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from temper.core.types import Run
from temper.ops import decode_cache
from temper.ops.decode_backends import PromptRow, RowBackend, SlotBackend, slots_work
from temper.ops.decoding import prefill_groups
from temper.ops.generate import Sampling, generate
from temper.ops.rows import current_rows

from .generation_runs import DRAWN, LENGTHS, RUN, ids_of


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "kind", ["llama", "gpt2", "qwen2", "gemma", "gemma2", "mistral", "mistral-wide", "neox"]
)
def test_greedy_batches_equal_the_slow_twin(lively, random_prompts, slow_greedy, kind, attention):
    if (kind, attention) == ("gemma2", "sdpa"):
        pytest.skip("this architecture has no sdpa")
    system = lively(kind, attention)
    prompts = random_prompts(LENGTHS, prefix=random_prompts([20])[0]) + random_prompts([5])
    for group in (prompts[:-1], prompts):  # with and without a common prefix
        want = [slow_greedy(system, ids, 14) for ids in group]
        for options in ({"width": 3}, {"width": 64}, {"engine": "rows"}):
            got = generate(system, group, Sampling(max_new_tokens=14), RUN, **options)
            assert ids_of(got) == want, options


@pytest.mark.parametrize(
    ("kind", "together"),
    [("llama", True), ("gpt2", True), ("mistral-wide", True), ("mistral", False), ("mamba", False)],
)
def test_rows_share_passes_only_where_the_cache_allows(lively, kind, together):
    system = lively(kind, "eager" if kind == "mamba" else "sdpa")
    assert slots_work(system.model, system.device, longest=100) is together


@pytest.mark.filterwarnings("ignore")  # the reference kernels announce themselves
def test_a_model_without_key_value_cache_still_generates(lively, random_prompts, slow_greedy):
    system = lively("mamba", "eager")
    prompts = random_prompts((3, 6))
    got = generate(system, prompts, Sampling(max_new_tokens=5), RUN)
    assert ids_of(got) == [slow_greedy(system, ids, 5) for ids in prompts]


def test_exact_mode_is_bit_equal_whatever_the_batch(lively, random_prompts):
    system = lively("llama")
    prompts = [PromptRow(n, ids) for n, ids in enumerate(random_prompts(range(1, 65)))]
    with torch.no_grad():
        together = RowBackend(system.model, system.device)
        alone = [RowBackend(system.model, system.device) for _ in prompts]
        first = together.prefill(prompts)
        firsts = [backend.prefill([p])[0] for backend, p in zip(alone, prompts, strict=True)]
        for slot, prefilled in enumerate(first):
            together.load(slot, prefilled)
            alone[slot].load(0, firsts[slot])
            assert torch.equal(prefilled.logits_V, firsts[slot].logits_V)
        tokens, positions = list(range(9, 73)), [len(p.ids) for p in prompts]
        logits_BV = together.step(prompts, tokens, positions)
        for row, backend in enumerate(alone):
            one_V = backend.step([prompts[row]], [tokens[row]], [positions[row]])[0]
            assert torch.equal(logits_BV[row], one_V)


def test_exact_and_sampled_replies_do_not_depend_on_neighbours(lively, random_prompts):
    system = lively("llama")
    prompts = random_prompts(LENGTHS)
    for run in (Run(exact=True), RUN):
        whole = generate(system, prompts, DRAWN, run, num_samples=2)
        assert len({tuple(reply.ids) for reply in whole}) == len(whole)
        part = generate(system, prompts[:3], DRAWN, run, num_samples=2)
        assert ids_of(part) == ids_of(whole[:6])
    assert ids_of(generate(system, prompts, DRAWN, RUN, num_samples=2, width=3)) == ids_of(whole)
    fewer = generate(system, prompts, DRAWN, RUN)
    assert ids_of(fewer) == ids_of(whole[::2]), "sample 0 is the same however many are drawn"
    assert ids_of(
        generate(system, prompts, Sampling(max_new_tokens=12, temperature=1.0, seed=4), RUN)
    ) != ids_of(fewer)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.integers(1, 25), min_size=1, max_size=7),
    st.integers(1, 5),
    st.integers(16, 200),
    st.booleans(),
)
def test_any_batch_gives_what_single_prompts_give(
    lively, random_prompts, slow_greedy, lengths, width, budget, shared
):
    system = lively("llama")
    prefix = random_prompts([17], seed=9)[0] if shared else ()
    prompts = random_prompts(lengths, seed=sum(lengths), prefix=prefix)
    got = generate(system, prompts, Sampling(max_new_tokens=6), Run(batch_tokens=budget), width=width)
    assert ids_of(got) == [slow_greedy(system, ids, 6) for ids in prompts]


@pytest.mark.parametrize("lengths", [(6,) * 9, LENGTHS])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_attention_a_few_rows_at_a_time_changes_nothing(
    lively, random_prompts, slow_greedy, monkeypatch, kind, lengths
):
    system = lively(kind)
    prompts = random_prompts(lengths)
    calls = []
    plain = decode_cache.ALL_ATTENTION_FUNCTIONS["sdpa"]

    def count(module, query, key, *args, **more):
        calls.append((len(query), key.shape[2]))
        return plain(module, query, key, *args, **more)

    monkeypatch.setattr(decode_cache, "SPAN_ROWS", 4)
    monkeypatch.setattr(decode_cache, "ALL_ATTENTION_FUNCTIONS", {"sdpa": count})
    got = generate(system, prompts, Sampling(max_new_tokens=5), RUN)
    assert ids_of(got) == [slow_greedy(system, ids, 5) for ids in prompts]
    assert {rows for rows, _ in calls} <= {1, 2, 3, 4}
    assert (4, max(lengths) + 1) in calls
    if lengths == LENGTHS:
        assert (4, sorted(lengths)[3] + 1) in calls
    assert system.model.config._attn_implementation == "sdpa"


def test_only_last_positions_reach_the_vocabulary(lively, random_prompts):
    system = lively("llama")
    seen = []
    handle = system.model.lm_head.register_forward_hook(lambda m, args, out: seen.append(out.shape[1]))
    generate(system, random_prompts(LENGTHS), Sampling(max_new_tokens=3), RUN)
    handle.remove()
    assert set(seen) == {1}


def test_a_shared_prefix_is_computed_once(lively, random_prompts):
    system = lively("llama")
    prompts = random_prompts((4, 5, 6), prefix=random_prompts([40])[0])
    counted = []

    def count(backend):
        original = system.model.model.forward

        def forward(*args, **kwargs):
            counted.append(kwargs["input_ids"].numel())
            return original(*args, **kwargs)

        system.model.model.forward = forward
        with torch.no_grad():
            backend.prefill([PromptRow(n, ids) for n, ids in enumerate(prompts)])
        del system.model.model.forward

    count(SlotBackend(system.model, system.device, 3, prompts[0][:40]))
    assert counted == [40, 3 * 6]


def test_samples_share_their_prompts_prefill(lively, random_prompts):
    system = lively("llama")
    lengths = []

    def look(module, args, kwargs):
        rows = current_rows()
        if rows and rows.start_B[0] == 0:
            lengths.append(len(rows.index_B))

    generate(system, random_prompts((5,)), DRAWN, RUN)  # the probe of the model is over
    handle = system.model.model.register_forward_pre_hook(look, with_kwargs=True)
    generate(system, random_prompts((5, 9)), DRAWN, RUN, num_samples=7, width=4)
    handle.remove()
    assert lengths == [2]


def test_training_mode_is_off_inside_and_back_afterwards(lively, random_prompts, slow_greedy):
    system = lively("gpt2")
    system.model.train()
    system.model.transformer.h[0].eval()
    prompts = random_prompts((4, 9))
    got = generate(system, prompts, Sampling(max_new_tokens=6), RUN)
    assert system.model.training
    assert not system.model.transformer.h[0].training
    system.model.eval()
    assert ids_of(got) == [slow_greedy(system, ids, 6) for ids in prompts]


def test_bf16_autocast_and_bf16_weights_run(lively, random_prompts):
    system = lively("llama")
    prompts = random_prompts(LENGTHS)
    half = generate(system, prompts, Sampling(max_new_tokens=5), Run(precision="bf16"))
    assert all(len(reply.ids) == 5 or reply.finish == "stop" for reply in half)
    system.model.to(torch.bfloat16)
    assert slots_work(system.model, system.device, 40)
    assert len(generate(system, prompts, Sampling(max_new_tokens=5), RUN)) == len(prompts)


def test_order_of_prompts_does_not_change_greedy_replies(lively, random_prompts):
    system = lively("llama")
    prompts = random_prompts(LENGTHS)
    order = list(range(len(prompts)))
    random.Random(1).shuffle(order)
    plain = generate(system, prompts, Sampling(max_new_tokens=8), RUN)
    shuffled = generate(system, [prompts[n] for n in order], Sampling(max_new_tokens=8), RUN)
    assert ids_of(shuffled) == [plain[n].ids for n in order]


@pytest.mark.filterwarnings("ignore")  # what PEFT says of tied weights is not the point here
def test_an_adapted_model_with_new_token_rows_generates_like_its_slow_twin(
    lively, random_prompts, slow_greedy
):
    from peft import LoraConfig, get_peft_model

    system = lively("llama")
    config = LoraConfig(
        r=4, target_modules="all-linear", init_lora_weights=False, trainable_token_indices=[5, 6]
    )
    adapted = system.with_(model=get_peft_model(system.model, config).eval())
    prompts = random_prompts((4, 9, 14))
    assert slots_work(adapted.model, adapted.device, 40)
    got = generate(adapted, prompts, Sampling(max_new_tokens=8), RUN)
    assert ids_of(got) == [slow_greedy(adapted, ids, 8) for ids in prompts]


@given(st.lists(st.integers(1, 400), min_size=1, max_size=40), st.integers(1, 3000))
def test_prefill_groups_hold_every_prompt_once_within_budget_and_little_padding(lengths, budget):
    prompts = [PromptRow(n, [0] * length) for n, length in enumerate(lengths)]
    groups = list(prefill_groups(prompts, budget, 0))
    assert sorted(p.number for group in groups for p in group) == list(range(len(lengths)))
    sizes = [[len(p.ids) for p in group] for group in groups]
    assert [n for group in sizes for n in group] == sorted(lengths, reverse=True)
    for group in sizes:
        padded = group[0] * len(group)
        assert padded <= budget or len(group) == 1
        assert padded - sum(group) <= 0.1 * padded or padded - group[0] < 256
