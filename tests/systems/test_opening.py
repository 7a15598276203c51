"""Replies begun for the model: what is context, what is scored, and that prompts and dialogues agree."""

import copy
import pickle

import pytest
from tests.systems.tokenizers_for_chat import STYLES, style_tokenizer

from temper.core.types import Message
from temper.systems.chat import Chat
from temper.systems.opening import Opening
from temper.systems.tiny import build_tokenizer

ASK = (Message("user", "Who wrote it?"),)
SURE = Opening("Sure, it is")


@pytest.fixture
def chat():
    return Chat(build_tokenizer())


def spelled(chat, ids):
    return chat.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_the_model_goes_on_from_the_opening(chat):
    begun = chat.with_(opening=SURE)
    plain, opened = chat.prompt(ASK), begun.prompt(ASK)
    assert opened.ids[: len(plain.ids)] == plain.ids
    assert spelled(chat, opened.ids[len(plain.ids) :]) == "Sure, it is"
    assert opened.text == plain.text + "Sure, it is"
    assert begun.prompt(ASK, open_reply=False) == chat.prompt(ASK, open_reply=False)
    assert begun.sha256 != chat.sha256
    assert chat.with_(opening=None).sha256 == chat.sha256


@pytest.mark.parametrize(
    ("reply", "scored"), [("Sure, it is Anna.", " Anna."), ("Anna.", " Anna."), (" Anna.", " Anna.")]
)
def test_only_what_comes_after_it_is_scored(chat, reply, scored):
    begun = chat.with_(opening=SURE)
    whole = begun.dialogue([*ASK, Message("assistant", reply)])
    opened = begun.prompt(ASK)
    assert whole.ids[: len(opened.ids)] == opened.ids
    span = whole.spans[-1]
    assert span.start == len(opened.ids)
    assert spelled(chat, whole.ids[span.start : span.end]).removesuffix(chat.end_of_turn) == scored
    assert whole.text.startswith(opened.text + scored)


def test_each_prompt_may_have_its_own(chat):
    begun = chat.with_(opening=Opening(by_prompt={"Who wrote it?": "Anna"}))
    other = (Message("user", "Who sang it?"),)
    assert begun.prompt(other) == chat.prompt(other)
    answer = [*other, Message("assistant", "Ben.")]
    assert begun.dialogue(answer) == chat.dialogue(answer)
    assert begun.prompt(ASK).text.endswith("Anna")
    later = (*ASK, Message("assistant", "Anna."), *other)
    assert begun.prompt(later) == chat.prompt(later)


@pytest.mark.parametrize("style", STYLES)
def test_it_stands_where_a_reply_stands_in_every_template(style):
    chat = Chat(style_tokenizer(style))
    begun = chat.with_(opening=SURE)
    opened = begun.prompt(ASK)
    whole = begun.dialogue([*ASK, Message("assistant", "Sure, it is Anna.")])
    same = chat.dialogue([*ASK, Message("assistant", "Sure, it is Anna.")])
    if not chat.opens_reply:
        assert whole.ids[: len(opened.ids)] == opened.ids
    assert whole.text == same.text
    assert opened.text.endswith("Sure, it is")


def test_copies_keep_it(chat):
    begun = chat.with_(opening=SURE)
    for again in (copy.deepcopy(begun), pickle.loads(pickle.dumps(begun)), begun.with_(system_prompt="none")):
        assert again.opening == SURE
        assert again.prompt(ASK).text.endswith("Sure, it is")
