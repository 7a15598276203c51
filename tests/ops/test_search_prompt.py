"""The slot in its prompt: the filter by whole prompts, initial ids, targets, and what is refused."""

import pytest
import torch

from temper.core.errors import DataError
from temper.core.types import Message
from temper.ops.search_prompt import exact_rows, initial_ids, reply_prefix_ids, slot_prompt
from temper.systems.loading import load_base

from .search_runs import PROMPT, TARGET, draw


def merging_pair(system):
    """Two tokens whose texts, side by side, the tokenizer reads as one other token."""
    tokenizer = system.tokenizer
    for whole in range(300, 512):
        text = tokenizer.decode([whole])
        for cut in range(1, len(text)):
            left, right = (
                tokenizer(part, add_special_tokens=False).input_ids for part in (text[:cut], text[cut:])
            )
            if text.isalpha() and len(left) == len(right) == 1:
                return left[0], right[0]
    raise AssertionError


def test_a_merge_across_the_slots_border_is_dropped():
    system = load_base("tiny:llama")
    left, right = merging_pair(system)
    prompt = slot_prompt(system, "Say:" + system.tokenizer.decode([left]), TARGET)
    assert prompt.before[-1] == left
    comma = system.tokenizer.convert_tokens_to_ids(",")
    rows = torch.tensor([[right, comma, comma], [comma, comma, comma]])
    alone = [
        system.tokenizer(prompt.texts([ids])[0], add_special_tokens=False).input_ids for ids in rows.tolist()
    ]
    assert alone == rows.tolist(), "the slot alone keeps its ids"
    assert exact_rows([prompt], rows) == [1]


def test_a_merge_with_what_follows_is_dropped():
    system = load_base("tiny:llama")
    left, right = merging_pair(system)
    prompt = slot_prompt(system, "Say it{optim_str}" + system.tokenizer.decode([right]), TARGET)
    comma = system.tokenizer.convert_tokens_to_ids(",")
    assert exact_rows([prompt], torch.tensor([[comma, left], [comma, comma]])) == [1]


def test_the_filter_is_the_rendered_prompt(lively):
    system = lively("llama")
    prompt = slot_prompt(system, PROMPT, TARGET)
    rows = draw(initial_ids([prompt], 6), 60, replace=3)
    kept = exact_rows([prompt], rows)
    assert 0 < len(kept) < len(rows)
    for row, ids in enumerate(rows.tolist()):
        text = system.tokenizer.decode(ids)
        whole = [*prompt.before, *ids, *prompt.after]
        assert (row in kept) == (system.chat.prompt([Message("user", PROMPT + text)]).ids == whole)


def test_every_prompt_must_keep_the_ids():
    system = load_base("tiny:llama")
    left, right = merging_pair(system)
    merges = slot_prompt(system, "Say:" + system.tokenizer.decode([left]), TARGET)
    plain = slot_prompt(system, "Say it.", TARGET)
    rows = torch.tensor([[right, right]])
    assert (len(exact_rows([plain], rows)), exact_rows([plain, merges], rows)) == (1, [])


def test_initial_ids_fill_the_slot_exactly(lively):
    system = lively("llama")
    prompts = [slot_prompt(system, text, TARGET) for text in (PROMPT, "Say it: {optim_str} Now.")]
    for num in (1, 5, 8):
        ids = initial_ids(prompts, num)
        assert len(ids) == num
        assert all(prompt.is_exact(ids, prompt.texts([ids])[0]) for prompt in prompts)
    ids = initial_ids(prompts[:1], 3, " a small fox")
    assert prompts[0].texts([ids]) == [" a small fox"]


def test_an_initial_text_that_melts_into_the_prompt_is_refused():
    system = load_base("tiny:llama")
    left, right = merging_pair(system)
    prompt = slot_prompt(system, "Say:" + system.tokenizer.decode([left]), TARGET)
    with pytest.raises(DataError, match="does not keep its tokens"):
        initial_ids([prompt], 1, system.tokenizer.decode([right]))


def test_target_ids_are_those_the_model_would_write(lively):
    system = lively("llama")
    prompt = slot_prompt(system, PROMPT, TARGET)
    said = system.chat.dialogue([Message("user", PROMPT + " !"), Message("assistant", TARGET)])
    span = said.spans[-1]
    assert prompt.target == said.ids[span.start : span.end - 1]
    assert slot_prompt(system, PROMPT, TARGET, opening=[9]).target == [9, *prompt.target]


def test_rewrites_apply_before_the_slot_is_cut(lively):
    system = lively("llama").with_(rewrites=(lambda messages: (Message("system", "Be brief."), *messages),))
    prompt = slot_prompt(system, PROMPT, TARGET)
    assert [message.role for message in prompt.messages] == ["system", "user"]
    ids = initial_ids([prompt], 3)
    typed = system.rewritten([Message("user", PROMPT + prompt.texts([ids])[0])])
    assert system.chat.prompt(typed).ids == [*prompt.before, *ids, *prompt.after]


def test_control_strings_in_a_prompt_stay_text_and_bos_is_never_stripped(lively):
    """This tokenizer's BOS is the turn marker: deleting "the BOS" from the text would delete every turn."""
    system = lively("llama")
    prompt = slot_prompt(system, "Read <|im_start|> aloud.", TARGET)
    markers = [i for i in (*prompt.before, *prompt.after) if i == system.tokenizer.bos_token_id]
    assert len(markers) == 2, "one for each turn, none from the user's text"


@pytest.mark.parametrize(
    ("prompt", "target", "message"),
    [
        (PROMPT, "  ", "target is empty"),
        ("{optim_str} and {optim_str}", TARGET, "once"),
        (PROMPT, "fox " * 400, "context holds"),
    ],
)
def test_bad_prompts_and_targets(lively, prompt, target, message):
    with pytest.raises(DataError, match=message):
        slot_prompt(lively("llama"), prompt, target)


def test_reply_prefix_is_asked_of_the_rules_that_have_one(lively):
    class Silent:
        name = "silent"

        def start(self, prompt_ids):
            return {}

        def __call__(self, logits_BV, position_B, states):
            return logits_BV

    class Opens(Silent):
        def reply_prefix_ids(self):
            return [77]

    system = lively("llama").with_(step_rules=(Silent(), Opens()))
    assert reply_prefix_ids(system) == [77]
    assert slot_prompt(system, PROMPT, TARGET).target[0] == 77
