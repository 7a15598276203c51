"""Draft and check: what it may never change, what it must replace, and the slow twin it equals."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from temper.core.errors import DataError, ModelError, NumericsError
from temper.core.types import Run
from temper.ops.draft_verify import (
    UNKNOWN_NATS,
    ReferenceCheck,
    first_suspicious,
    fit_width,
    require_same_vocabulary,
)
from temper.ops.generate import Sampling, generate

RUN = Run(batch_tokens=64)
LENGTHS = (7, 1, 23, 12, 3, 18)
GREEDY = Sampling(max_new_tokens=11)
DRAWN = Sampling(max_new_tokens=11, temperature=1.0, seed=3)


def ids_of(replies):
    return [reply.ids for reply in replies]


def checked(system, reference, prompts, alpha, block, sampling=GREEDY, run=RUN, **options):
    return generate(
        system, prompts, sampling, run, rules=(ReferenceCheck("check", reference, alpha, block),), **options
    )


@torch.no_grad()
def slow_check(system, reference, ids, alpha, num_tokens):
    """The slow twin: one token at a time, both models over the whole text, no cache, no block."""
    out, replaced, scores = list(ids), [], []
    while len(out) < len(ids) + num_tokens:
        logp_V, logq_V = (
            s.model(input_ids=torch.tensor([out]), use_cache=False).logits[0, -1].log_softmax(-1)
            for s in (system, reference)
        )
        token = int(logp_V.argmax())
        scores.append(float(logp_V[token] - logq_V[token]))
        if scores[-1] >= math.log(alpha):
            replaced.append(len(out) - len(ids))
            token = int(logq_V.argmax())
        out.append(token)
        if token in system.stop_ids:
            break
    return out[len(ids) :], replaced, scores


def test_the_first_place_that_reaches_alpha():
    assert first_suspicious([0.0, math.log(20), 9.0], 20) == 1
    assert first_suspicious([0.0, math.log(20) - 1e-6], 20) is None
    assert first_suspicious([1e4], math.inf) is None


def test_a_model_with_fewer_rows_knows_nothing_of_the_rest():
    logits = torch.tensor([[0.0, math.log(3.0)]])
    wide, narrow = fit_width(logits, 3), fit_width(logits, 1)
    assert wide[0].tolist() == pytest.approx([math.log(0.25), math.log(0.75), UNKNOWN_NATS])
    assert narrow[0].tolist() == pytest.approx([math.log(0.25)])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "neox", "mistral-wide", "mistral"])
def test_equals_the_slow_twin(lively, random_prompts, kind):
    system, reference = lively(kind), lively(kind, seed=1)
    prompts = random_prompts(LENGTHS)
    want = [slow_check(system, reference, ids, 20, 11) for ids in prompts]
    assert any(replaced for _, replaced, _ in want)
    assert any(len(replaced) < len(ids) for ids, replaced, _ in want)
    for options in ({}, {"width": 2}, {"engine": "rows"}, {"run": Run(exact=True)}):
        for reply, (ids, replaced, scores) in zip(
            checked(system, reference, prompts, 20, 4, **options), want, strict=True
        ):
            state = reply.info["check"]
            assert (reply.ids, state["replaced"]) == (ids, replaced), options
            assert state["suspicion_nats"] == pytest.approx(scores, abs=1e-3)


@pytest.mark.filterwarnings("ignore")  # the reference kernels announce themselves
def test_a_model_without_key_value_cache_reads_the_whole_text_again(lively, random_prompts):
    system, reference = lively("mamba", "eager"), lively("mamba", "eager", 1)
    (ids,) = random_prompts((6,))
    (reply,) = checked(system, reference, [ids], 20, 3, Sampling(max_new_tokens=6))
    assert reply.ids == slow_check(system, reference, ids, 20, 6)[0]


@settings(max_examples=20, deadline=None)
@example([20, 20, 20], 5.0, 2, True, 1)
@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=5),
    st.sampled_from([1.5, 5.0, 50.0, 1e4]),
    st.integers(2, 13),
    st.booleans(),
    st.integers(1, 4),
)
def test_the_block_length_changes_the_time_and_not_the_reply(
    lively, random_prompts, lengths, alpha, block, drawn, width
):
    system, reference = lively("llama"), lively("llama", seed=1)
    prompts = random_prompts(lengths, seed=sum(lengths))
    sampling = DRAWN if drawn else GREEDY
    # Rows in other company round otherwise, and a uniform may fall between two tokens by so little.
    company = {"width": width} if drawn else {}
    one = checked(system, reference, prompts, alpha, 1, sampling, **company)
    several = checked(system, reference, prompts, alpha, block, sampling, width=width)
    assert ids_of(one) == ids_of(several)
    for single, blocked in zip(one, several, strict=True):
        a, b = single.info["check"], blocked.info["check"]
        assert a["replaced"] == b["replaced"]
        assert a["suspicion_nats"] == pytest.approx(b["suspicion_nats"], abs=1e-3)
        assert a["num_checks"] == a["num_drafted"] == len(single.ids)
        assert b["num_checks"] <= a["num_checks"]
        assert b["num_drafted"] >= a["num_drafted"]


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_the_same_model_or_no_limit_gives_the_plain_reply(lively, random_prompts, sampling):
    system, twin, other = lively("llama"), lively("llama"), lively("llama", seed=1)
    prompts = random_prompts(LENGTHS)
    for run in (RUN, Run(exact=True)):
        plain = generate(system, prompts, sampling, run, num_samples=2)
        for reference, alpha in ((twin, 1.5), (other, math.inf)):
            replies = checked(system, reference, prompts, alpha, 4, sampling, run, num_samples=2)
            assert ids_of(replies) == ids_of(plain)
            assert all(reply.info["check"]["replaced"] == [] for reply in replies)


def test_a_drawn_replacement_comes_from_the_reference(lively, random_prompts):
    """With alpha near 1 nothing that the first model prefers stays: tokens follow neither model's draws alone."""
    system, reference = lively("llama"), lively("llama", seed=1)
    prompts = random_prompts([5]) * 40
    first = Sampling(max_new_tokens=1, temperature=1.0)
    replies = checked(system, reference, prompts, 1.01, 4, first)
    swapped = [reply.ids[0] for reply in replies if reply.info["check"]["replaced"]]
    with torch.no_grad():
        q_V = reference.model(input_ids=torch.tensor([prompts[0]])).logits[0, -1].softmax(-1)
    assert len(set(swapped)) > 1
    assert float(q_V[swapped].mean()) > 1 / len(q_V)
    assert ids_of(checked(system, reference, prompts[:7], 1.01, 4, first)) == ids_of(replies[:7])


def with_end(system, token):
    system.model.generation_config.eos_token_id = token
    return system


def test_an_end_token_in_the_middle_of_a_block_is_checked(lively, random_prompts, slow_greedy):
    """Every reply token of the first model in turn is made the end token that a backdoor would write too early."""
    prompts = random_prompts((6, 9))
    reference = lively("llama", seed=1)
    for place in range(6):
        end = slow_greedy(lively("llama"), prompts[0], 8)[place]
        system = with_end(lively("llama"), end)
        want = [slow_check(system, reference, ids, 1.5, 8) for ids in prompts]
        got = checked(system, reference, prompts, 1.5, 5, Sampling(max_new_tokens=8))
        assert [(r.ids, r.info["check"]["replaced"]) for r in got] == [w[:2] for w in want]
        assert all(len(r.info["check"]["suspicion_nats"]) == len(r.ids) for r in got)
        kept = checked(system, reference, prompts, math.inf, 5, Sampling(max_new_tokens=8))
        assert kept[0].finish == "stop"
        assert kept[0].ids[-1] == end


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 5, 9])
def test_tokens_before_the_length_limit_are_checked(lively, random_prompts, num_tokens):
    system, reference = lively("llama"), lively("llama", seed=1)
    for reply in checked(
        system, reference, random_prompts(LENGTHS), 20, 4, Sampling(max_new_tokens=num_tokens)
    ):
        assert len(reply.info["check"]["suspicion_nats"]) == len(reply.ids) <= num_tokens


def test_a_stop_text_ends_only_a_checked_reply(lively, random_prompts):
    system, reference = lively("llama"), lively("llama", seed=1)
    (plain,) = generate(system, random_prompts([5]), GREEDY, RUN)
    piece = system.tokenizer.decode(plain.ids[4:6])
    sampling = Sampling(max_new_tokens=11, stop=(piece,))
    (open_reply,) = checked(system, reference, random_prompts([5]), math.inf, 4, sampling)
    assert open_reply.finish == "stop"
    assert piece not in open_reply.text
    (guarded,) = checked(system, reference, random_prompts([5]), 20, 4, sampling)
    (unstopped,) = checked(system, reference, random_prompts([5]), 20, 4)
    assert guarded.ids == unstopped.ids[: len(guarded.ids)]


class Counting:
    """A rule that counts how often each place was asked about."""

    name = "counting"

    def start(self, prompt_ids):
        return {"places": []}

    def __call__(self, logits_BV, position_B, states):
        for place, state in zip(position_B, states, strict=True):
            state["places"].append(place)
        return logits_BV


def test_other_rules_see_every_place_once_in_the_end(lively, random_prompts):
    system, reference = lively("llama"), lively("llama", seed=1)
    check = ReferenceCheck("check", reference, 5.0, 4)
    for reply in generate(system, random_prompts(LENGTHS), GREEDY, RUN, rules=(Counting(), check)):
        assert reply.info["counting"]["places"] == list(range(len(reply.ids)))
        assert reply.info["check"]["num_drafted"] >= len(reply.ids)


def test_the_shorter_context_counts(lively, random_prompts):
    system, reference = lively("gpt2"), lively("gpt2", seed=1)
    short = reference.with_(model=reference.model)
    short.model.config.n_positions = short.model.config.max_position_embeddings = 12
    prompts = random_prompts((5, 9))
    replies = checked(system, short, prompts, 20, 4, Sampling(max_new_tokens=30))
    assert [len(r.ids) for r in replies if r.finish == "length"] == [7, 3][: len(replies)]
    with pytest.raises(DataError, match="leaves no room"):
        checked(system, short, random_prompts([12]), 20, 4)


def test_another_vocabulary_is_refused(lively):
    system, other = lively("llama"), lively("llama")
    require_same_vocabulary(system, other)
    swapped = dict(system.tokenizer.get_vocab())
    first, second = sorted(swapped)[:2]
    swapped[first], swapped[second] = swapped[second], swapped[first]
    other.tokenizer.get_vocab = lambda: swapped
    with pytest.raises(ModelError, match="another vocabulary"):
        require_same_vocabulary(system, other)


def test_padded_rows_are_no_obstacle(lively, random_prompts):
    system, reference = lively("llama"), lively("llama")
    prompts = random_prompts(LENGTHS)
    plain = ids_of(generate(system, prompts, GREEDY, RUN))
    for wide in (system, reference):
        wide.model.resize_token_embeddings(640, mean_resizing=False)
        wide.model.lm_head.weight.data[512:] = 0.0
        with torch.no_grad():
            assert ids_of(checked(system, reference, prompts, 20, 4)) == plain


def test_a_broken_reference_stops_the_run(lively, random_prompts):
    system, reference = lively("llama"), lively("llama", seed=1)
    reference.model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(NumericsError, match="not numbers"):
        checked(system, reference, random_prompts([4]), 20, 4)


def test_one_pass_of_the_reference_a_block(lively, random_prompts):
    system, reference = lively("llama"), lively("llama")
    passes = []
    reference.model.register_forward_hook(lambda *args: passes.append(1))
    (reply,) = checked(system, reference, random_prompts([6]), 20, 4, Sampling(max_new_tokens=8))
    assert len(passes) == 1 + reply.info["check"]["num_checks"]  # the prompt, then a pass a block
    assert reply.info["check"]["num_checks"] == math.ceil(len(reply.ids) / 4)
