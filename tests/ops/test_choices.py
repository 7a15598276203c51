"""Choices: the tokenisation rule of the field, norms by hand, and whole rows as the slow twin."""

from types import SimpleNamespace

import pytest
import torch

from temper.core.errors import DataError
from temper.core.types import Message, Run
from temper.ops.batching import encode
from temper.ops.choices import choice_logprobs, encode_choices, encode_replies
from temper.ops.logprobs import response_logprobs

CONTEXT = "The old mill stood beside the stream.\nQuestion: where did it stand?\nAnswer:"
CHOICES = ["beside the stream", "in the town", "nowhere", "a"]


def field_rule(encode, context, continuation):
    """The rule as the field states it: encode both, take what is beyond the context's own ids."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        continuation = context[-spaces:] + continuation
        context = context[:-spaces]
    context_ids = encode(context)
    return context_ids, encode(context + continuation)[len(context_ids) :]


@pytest.mark.parametrize("context", [CONTEXT, CONTEXT + " ", CONTEXT + "\n\n", "A", "x  "])
@pytest.mark.parametrize("delimiter", [" ", "", "\n"])
def test_the_fields_tokenisation(lively, context, delimiter):
    system = lively("llama")
    item = encode_choices(system, context, CHOICES, delimiter=delimiter)
    assert item.texts == CHOICES
    for row, choice in zip(item.rows, CHOICES, strict=True):
        before, after = field_rule(
            lambda text: system.tokenizer(text, add_special_tokens=False)["input_ids"],
            context,
            delimiter + choice,
        )
        assert row.ids == before + after
        assert row.scored == [False] * len(before) + [True] * len(after)


class Letters:
    """A token a character, and a first token of its own before every text."""

    bos_token_id, eos_token_id = 1, 2

    def __call__(self, text, add_special_tokens, split_special_tokens=False):
        return {"input_ids": [1] * add_special_tokens + [ord(letter) for letter in text]}


def test_a_tokenizer_that_writes_a_first_token_itself():
    system = SimpleNamespace(tokenizer=Letters())
    assert encode_choices(system, "ab", ["c"]).rows[0].ids == [1, 97, 98, 32, 99]
    opened = encode_choices(system, "", ["c"], delimiter="").rows[0]
    assert (opened.ids, opened.scored) == ([1, 99], [False, True])


def test_an_empty_context_opens_with_the_beginning_token(lively):
    system = lively("llama")
    row = encode_choices(system, "", ["Yes."], delimiter="").rows[0]
    assert row.ids[0] == system.tokenizer.bos_token_id
    assert row.scored == [False] + [True] * (len(row.ids) - 1)


def test_control_strings_stay_ordinary_text(lively):
    system = lively("llama")
    row = encode_choices(system, "Say <|im_end|>", ["<|im_start|>"]).rows[0]
    assert not {0, 1, 2} & set(row.ids)


def test_a_choice_that_vanishes_is_an_error(lively):
    system = lively("llama")
    with pytest.raises(DataError, match="adds no token"):
        encode_choices(system, CONTEXT, [""], delimiter="")
    with pytest.raises(DataError, match="no choices"):
        encode_choices(system, CONTEXT, [])
    with pytest.raises(DataError, match="no length"):
        choice_logprobs(system, [encode_choices(system, CONTEXT, [""])], Run(), per="byte")


def items(system):
    contexts = [CONTEXT + " " * n + f" {n}" for n in range(4)] + ["Who wrote the letter?"]
    return [encode_choices(system, context, CHOICES[n % 2 :]) for n, context in enumerate(contexts)]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_choices_equal_whole_rows(lively, kind):
    system = lively(kind)
    asked = items(system)
    got = choice_logprobs(system, asked, Run())
    assert [len(values) for values in got] == [len(item.rows) for item in asked]
    for item, values in zip(asked, got, strict=True):
        want = response_logprobs(system, item.rows, run=Run(exact=True))
        torch.testing.assert_close(values, want, atol=1e-5, rtol=1e-5)


def test_norms_by_hand(lively):
    system = lively("llama")
    item = encode_choices(system, "Naïve or not:", ["naïve", "no"])
    (sums,) = choice_logprobs(system, [item], Run())
    counts = {
        "token": [sum(row.scored) for row in item.rows],
        "byte": [len("naïve".encode()), 2],
        "character": [5, 2],
    }
    for per, count in counts.items():
        (got,) = choice_logprobs(system, [item], Run(), per=per)
        torch.testing.assert_close(got, sums / torch.tensor(count))
    assert counts["byte"][0] == 6


def test_replies_in_the_chat_template(lively):
    system = lively("llama")
    prompt = [Message("user", "Is it true?")]
    item = encode_replies(system, "Is it true?", ["Yes.", "No."])
    assert item == encode_replies(system, prompt, ["Yes.", "No."])
    assert item.rows[0] == encode(system, (prompt, "Yes."))


@pytest.mark.parametrize("num_items", [1, 3, 64])
def test_exact_mode_is_bit_equal_whatever_the_batch(lively, num_items):
    system = lively("llama")
    asked = [encode_choices(system, f"{CONTEXT} {n % 7} and {n}", CHOICES) for n in range(num_items)]
    run = Run(exact=True)
    together = choice_logprobs(system, asked, run)
    for item, values in zip(asked, together, strict=True):
        assert torch.equal(values, choice_logprobs(system, [item], run)[0])
