"""Conversations found again by their ids."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from temper.core.types import Message
from temper.systems.chat import Chat
from temper.systems.recent import Recent, Seen
from temper.systems.tiny import build_tokenizer

IDS = st.lists(st.integers(0, 3), min_size=1, max_size=6)


@given(st.lists(IDS, max_size=12), IDS)
def test_the_longest_known_beginning_is_found(conversations, asked):
    recent: Recent[str] = Recent()
    for ids in conversations:
        recent.add(ids, (str(ids),))
    begins = [ids for ids in conversations if asked[: len(ids)] == ids]
    longest = max(begins, key=len, default=None)
    assert recent.find(asked) == (None if longest is None else Seen(len(longest), (str(longest),)))


def test_the_oldest_goes_first():
    recent: Recent[str] = Recent(limit=2)
    for ids in ([1], [2], [1], [3]):
        recent.add(ids, (str(ids),))
    assert [recent.find(ids) is not None for ids in ([1], [2], [3])] == [True, False, True]


def test_a_chat_knows_its_prompts_also_with_a_reply_behind_and_after_a_change():
    chat = Chat(build_tokenizer())
    rendered = chat.prompt([Message("user", "Where is the mill?")])
    other = chat.with_(system_prompt="none")
    assert other.recent.find([*rendered.ids, 9, 9]) == Seen(len(rendered.ids), rendered.spans)
    assert chat.recent.find(rendered.ids[:-1]) is None
