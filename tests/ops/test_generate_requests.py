"""What may be asked of generation: rules of a step, where a reply ends, forms of prompts, other engines, bad requests."""

import sys
import types

import pytest
import torch

from temper.core.errors import ConfigError, DataError, NeedsError, NumericsError
from temper.core.types import Message, Run
from temper.ops.generate import Reply, Sampling, generate, prompt_ids
from temper.systems.remote import Remote

from .generation_runs import DRAWN, LENGTHS, RUN


class Force:
    """Writes 2 + (prompt length) at the first step and counts its calls."""

    name = "force"

    def start(self, prompt_ids):
        return {"token": 20 + len(prompt_ids), "calls": 0}

    def __call__(self, logits_BV, position_B, states):
        for row, (position, state) in enumerate(zip(position_B, states, strict=True)):
            state["calls"] += 1
            if position == 0:
                logits_BV[row] = -torch.inf
                logits_BV[row, state["token"]] = 0.0
        return logits_BV


@pytest.mark.parametrize("engine", ["auto", "rows"])
def test_step_rules_see_their_own_row_and_report(lively, random_prompts, slow_greedy, engine):
    system = lively("llama").with_(step_rules=(Force(),))
    prompts = random_prompts(LENGTHS)
    replies = generate(system, prompts, Sampling(max_new_tokens=9), RUN, width=3, engine=engine)
    for prompt, reply in zip(prompts, replies, strict=True):
        assert reply.ids[0] == 20 + len(prompt)
        assert reply.info["force"] == {"token": 20 + len(prompt), "calls": len(reply.ids)}
        assert reply.ids[1:] == slow_greedy(system, [*prompt, reply.ids[0]], 8)


def test_rules_passed_in_come_after_the_systems(lively):
    class Undo(Force):
        name = "undo"

        def start(self, prompt_ids):
            return {"token": 11, "calls": 0}

    system = lively("llama").with_(step_rules=(Force(),))
    reply = generate(system, [[5, 6]], Sampling(max_new_tokens=2), RUN, rules=(Undo(),))[0]
    assert reply.ids[0] == 11
    assert list(reply.info) == ["force", "undo"]


def test_stop_strings_end_the_row_and_leave_the_text(lively, random_prompts):
    system = lively("llama")
    prompts = random_prompts(LENGTHS)
    free = generate(system, prompts, Sampling(max_new_tokens=20), RUN)
    stop = free[0].text[3:6]
    stopped = generate(system, prompts, Sampling(max_new_tokens=20, stop=(stop,)), RUN)
    assert stop in free[0].text
    for before, after in zip(free, stopped, strict=True):
        assert stop not in after.text
        assert after.ids == before.ids[: len(after.ids)]
        assert after.text == before.text.split(stop)[0]
        if stop in before.text:
            assert after.finish == "stop"
            assert stop in system.tokenizer.decode(after.ids, skip_special_tokens=True)
            assert stop not in system.tokenizer.decode(after.ids[:-1], skip_special_tokens=True)


def test_an_end_token_finishes_the_row_and_stays_out_of_the_text(lively):
    class EndAtThree(Force):
        def __call__(self, logits_BV, position_B, states):
            for row, position in enumerate(position_B):
                if position == 3:
                    logits_BV[row, 2] = 1e4
            return logits_BV

    system = lively("llama")
    reply = generate(system, [[5, 6, 7]], Sampling(max_new_tokens=20), RUN, rules=(EndAtThree(),))[0]
    assert reply.finish == "stop"
    assert reply.ids[3:] == [2]
    assert "<|im_end|>" not in reply.text
    assert reply.num_prompt_tokens == 3


def test_prompts_as_text_messages_and_ids_agree(lively):
    system = lively("llama")
    ids = prompt_ids(system, "Who wrote the letter?")
    forms = ["Who wrote the letter?", [Message("user", "Who wrote the letter?")],
             [{"role": "user", "content": "Who wrote the letter?"}], ids]  # fmt: skip
    replies = generate(system, forms, Sampling(max_new_tokens=4), RUN)
    assert len({reply.text for reply in replies}) == 1
    assert ids == list(system.chat.prompt([Message("user", "Who wrote the letter?")]).ids)


def test_rewrites_apply_to_messages_and_text_but_not_to_ids(lively):
    def shout(messages):
        return [Message(m.role, m.content.upper()) for m in messages]

    system = lively("llama")
    loud = system.with_(rewrites=(shout,))
    assert prompt_ids(loud, "where") == prompt_ids(system, "WHERE")
    assert prompt_ids(loud, [5, 6]) == [5, 6]


def test_a_reply_ends_at_the_context_and_a_full_prompt_is_refused(lively, random_prompts):
    system = lively("llama")
    prompts = [*random_prompts((150, 4))]
    replies = generate(system, prompts, Sampling(max_new_tokens=40), RUN)
    assert len(replies[0].ids) == 10
    assert replies[0].finish == "length"
    with pytest.raises(DataError, match=r"prompt 1\b"):
        generate(system, [*random_prompts((4, 160))], Sampling(), RUN)
    with pytest.raises(DataError, match="no tokens"):
        generate(system, [[]], Sampling(), RUN)


def test_bad_requests_are_refused(lively):
    system = lively("llama")
    with pytest.raises(ConfigError, match="num_samples=0"):
        generate(system, ["a"], Sampling(), RUN, num_samples=0)
    assert generate(system, [], Sampling(), RUN) == []


def test_nan_logits_stop_with_the_prompts_number(lively):
    system = lively("llama")
    with torch.no_grad():
        system.model.model.norm.weight[:] = torch.nan
    with pytest.raises(NumericsError, match="prompt 0"):
        generate(system, [[5, 6]], Sampling(max_new_tokens=2), RUN)


def test_progress_counts_every_reply(lively, random_prompts):
    seen = []

    def ticker(items, *, total=None, label=""):
        seen.append(total)
        for item in items:
            seen.append(item.finish)
            yield item

    generate(lively("llama"), random_prompts((3, 4)), DRAWN, Run(ticker=ticker), num_samples=2)
    assert seen[0] == 4
    assert len(seen) == 5


def test_vllm_is_asked_for_by_name_and_missing_kindly(lively):
    with pytest.raises(NeedsError, match="pip install vllm"):
        generate(lively("llama"), ["hello"], Sampling(), RUN, engine="vllm")


def test_vllm_gets_ids_and_settings_and_refuses_what_it_cannot_run(lively, monkeypatch):
    asked = {}

    class LLM:
        def __init__(self, **kwargs):
            asked.update(kwargs)

        def generate(self, prompts, wanted):
            asked.update(prompts=prompts, wanted=wanted)
            one = types.SimpleNamespace(text="so", token_ids=[7, 8], finish_reason="stop")
            return [types.SimpleNamespace(outputs=[one, one]) for _ in prompts]

    fake = types.SimpleNamespace(LLM=LLM, SamplingParams=lambda **kwargs: kwargs)
    monkeypatch.setitem(sys.modules, "vllm", fake)
    system = lively("llama")
    with pytest.raises(NeedsError, match="step rules and a model without a place"):
        generate(system, [[5, 6]], DRAWN, RUN, engine="vllm", rules=(Force(),))
    system.model.config._name_or_path = "some/model"
    replies = generate(system, [[5, 6], [7]], DRAWN, RUN, engine="vllm", num_samples=2)
    assert [reply.num_prompt_tokens for reply in replies] == [2, 2, 1, 1]
    assert asked["prompts"] == [{"prompt_token_ids": [5, 6]}, {"prompt_token_ids": [7]}]
    assert (asked["wanted"]["top_k"], asked["wanted"]["max_tokens"]) == (-1, 12)


def test_a_remote_system_gets_messages_and_refuses_what_it_cannot_run(monkeypatch):
    asked = []

    def complete(self, conversations, sampling, **options):
        asked.append((conversations, sampling.seed))
        return [Reply(f"{len(c)}/{sampling.seed}", [], "stop", 1, {}) for c in conversations]

    monkeypatch.setattr(Remote, "complete", complete)
    system = Remote(model="m", base_url="http://127.0.0.1:1")
    talk = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    replies = generate(system, ["hello", talk], Sampling(seed=5), RUN, num_samples=2)
    assert [reply.text for reply in replies] == ["1/5", "1/6", "3/5", "3/6"]
    assert asked[0][0][0] == [Message("user", "hello")]
    with pytest.raises(NeedsError, match="step rules"):
        generate(system, ["hello"], Sampling(), RUN, rules=(Force(),))
    with pytest.raises(NeedsError, match="prompt 1"):
        generate(system, ["hello", [5, 6]], Sampling(), RUN)
