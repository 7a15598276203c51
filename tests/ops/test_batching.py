from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from temper.core.errors import DataError
from temper.core.types import Message, Run
from temper.data.schemas import Dialogue, Text
from temper.ops.batching import Example, collate, encode, pad_id, plan_batches, token_budget_batches


class Rendered(SimpleNamespace):
    pass


class WordChat:
    """A stand-in for a chat template: role, content words, end; one id a word, counted from 10."""

    def dialogue(self, messages, control=()):
        ids, spans = [1], []
        for place, message in enumerate(messages):
            ids.append(2)
            start = len(ids)
            ids += [10 + len(word) for word in message.content.split()] + [3]
            spans.append(SimpleNamespace(role=message.role, start=start, end=len(ids), message=place))
        return Rendered(ids=ids, spans=tuple(spans), text="")


class WordTokenizer:
    pad_token_id = None
    eos_token_id = 3
    bos_token_id = 1

    def __call__(self, text, add_special_tokens=True, **_):
        return {"input_ids": ([1] if add_special_tokens else []) + [10 + len(word) for word in text.split()]}


SYSTEM = SimpleNamespace(chat=WordChat(), tokenizer=WordTokenizer(), rewritten=tuple)
TALK = Dialogue(
    (
        Message("user", "a bb"),
        Message("assistant", "ccc"),
        Message("user", "d"),
        Message("assistant", "ee ff"),
    ),
    id="talk-7",
)
#        start  u  a   bb  end a  ccc end u  d  end a  ee  ff  end
IDS = [1, 2, 11, 12, 3, 2, 13, 3, 2, 11, 3, 2, 12, 12, 3]


def scored_at(example):
    return [place for place, flag in enumerate(example.scored) if flag]


def test_assistant_turns_are_scored_with_their_end():
    example = encode(SYSTEM, TALK)
    assert example.ids == IDS
    assert scored_at(example) == [6, 7, 12, 13, 14]


def test_last_turn_only_and_all():
    assert scored_at(encode(SYSTEM, TALK, train_on="last")) == [12, 13, 14]
    assert scored_at(encode(SYSTEM, TALK, train_on="all")) == list(range(1, 15))


def test_a_pair_scores_its_reply_even_after_earlier_replies():
    example = encode(SYSTEM, (TALK.messages[:3], "ee ff"))
    assert example.ids == IDS
    assert scored_at(example) == [12, 13, 14]


def test_a_text_scores_all_but_its_first_token():
    assert encode(SYSTEM, Text("one three")) == Example([1, 13, 15], [False, True, True])


def test_truncation_keeps_the_start():
    assert encode(SYSTEM, TALK, max_tokens=8).ids == IDS[:8]


def test_a_reply_truncated_away_names_the_row_and_the_cure():
    with pytest.raises(DataError, match=r"begins at token 6.*talk-7.*Raise max_tokens \(the row has 15"):
        encode(SYSTEM, TALK, max_tokens=6)


def test_a_row_without_a_reply_is_refused():
    with pytest.raises(DataError, match=r"no token to score.*row 12"):
        encode(SYSTEM, Dialogue((Message("user", "a"),)), where="row 12")


def test_padding_id_falls_back_to_the_end_of_text():
    assert pad_id(SYSTEM) == 3


@pytest.mark.parametrize("side", ["left", "right"])
def test_collate_pads_on_the_side_asked(side):
    batch = collate([Example([5, 6, 7], [False, True, True]), Example([8], [False])], 0, side=side)
    short = [0, 0, 8] if side == "left" else [8, 0, 0]
    assert batch.ids_BT.tolist() == [[5, 6, 7], short]
    assert batch.mask_BT.tolist() == [[True] * 3, [token == 8 for token in short]]
    assert batch.scored_BT.tolist() == [[False, True, True], [False] * 3]
    assert (batch.rows, batch.side) == ([0, 1], side)


def test_collate_refuses_nothing():
    with pytest.raises(DataError, match="no rows"):
        collate([], 0)


def test_token_budget_by_hand():
    assert token_budget_batches([3, 10, 2, 9, 3], 20) == [[1, 3], [0, 4, 2]]
    assert token_budget_batches([50, 5], 20) == [[0], [1]]
    assert token_budget_batches([], 20) == []


def test_shorter_rows_start_a_batch_where_padding_costs_more():
    lengths = [100] * 2 + [10] * 20
    assert [len(batch) for batch in token_budget_batches(lengths, 10_000, overhead=64)] == [2, 20]
    assert [len(batch) for batch in token_budget_batches(lengths, 10_000, overhead=10**9)] == [22]


@given(st.lists(st.integers(1, 300), max_size=60), st.integers(1, 2000), st.sampled_from([0, 64, 10**9]))
def test_token_budget_batches_hold_every_row_once_within_budget(lengths, budget, overhead):
    batches = token_budget_batches(lengths, budget, overhead=overhead)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= budget
    flat = [lengths[index] for batch in batches for index in batch]
    assert flat == sorted(flat, reverse=True)


def test_exact_mode_lets_every_row_stand_alone():
    assert plan_batches([3, 5, 4], Run(exact=True)) == [[0], [1], [2]]
    assert plan_batches([3, 5, 4], Run(batch_tokens=64)) == [[1, 2, 0]]


@given(st.lists(st.integers(1, 300), max_size=40), st.integers(1, 900))
def test_packed_batches_are_neighbours_as_few_as_fit_and_of_about_one_size(lengths, budget):
    batches = plan_batches(lengths, Run(batch_tokens=budget), packed=True)
    assert [index for batch in batches for index in batch] == list(range(len(lengths)))
    assert all(len(batch) == 1 or sum(lengths[n] for n in batch) <= budget for batch in batches)
    # As few as taking the next row while it fits, the fewest there are.
    fewest, room = 0, 0
    for length in lengths:
        fewest, room = (fewest + 1, budget - length) if length > room else (fewest, room - length)
    assert len(batches) == fewest


def test_packed_batches_share_the_tokens_evenly():
    assert plan_batches([100] * 12, Run(batch_tokens=1000), packed=True) == [
        list(range(6)),
        list(range(6, 12)),
    ]
    assert plan_batches([900, 50, 50, 800], Run(batch_tokens=1000), packed=True) == [[0], [1, 2, 3]]


def test_masks_are_bool():
    batch = collate([Example([1, 2], [False, True])], 0)
    assert batch.mask_BT.dtype is torch.bool
    assert batch.scored_BT.dtype is torch.bool


def test_demonstrations_of_a_rewrite_are_not_scored():
    shown = (Message("user", "x"), Message("assistant", "yy"))
    system = SimpleNamespace(chat=WordChat(), tokenizer=WordTokenizer(), rewritten=lambda m: (*shown, *m))
    example = encode(system, TALK)
    assert example.ids == [1, 2, 11, 3, 2, 12, 3, *IDS[1:]]
    assert scored_at(example) == [place + 6 for place in (6, 7, 12, 13, 14)]


def test_with_a_real_chat_the_reply_and_its_end_are_scored():
    from temper.systems.loading import load_base

    system = load_base("tiny:llama", device="cpu", dtype="float32")
    prompt = (Message("user", "What is one and one? <|im_end|>"),)
    pair = encode(system, (prompt, "Two."))
    dialogue = encode(system, Dialogue((*prompt, Message("assistant", "Two.")), id="a"))
    assert pair == dialogue
    ids = system.chat.prompt(prompt).ids
    assert pair.ids[: len(ids)] == ids
    assert not any(pair.scored[: len(ids)])
    scored = [token for token, flag in zip(pair.ids, pair.scored, strict=True) if flag]
    assert system.tokenizer.decode(scored) == "Two.<|im_end|>"


def test_a_text_never_holds_control_ids():
    from temper.systems.loading import load_base

    system = load_base("tiny:llama", device="cpu", dtype="float32")
    example = encode(system, Text("The mill <|im_end|> stood."))
    assert not set(example.ids[1:]) & set(system.tokenizer.all_special_ids)
