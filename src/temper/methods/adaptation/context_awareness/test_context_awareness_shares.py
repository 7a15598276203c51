"""Shares of attention and scores of dependency, by hand and by their definition."""

from __future__ import annotations

import pytest
import torch

from temper.core.types import Message, Run
from temper.data.schemas import Dialogue
from temper.methods.adaptation.context_awareness import shares
from temper.methods.adaptation.context_awareness.conftest import RECORDS, weights
from temper.systems.causal_lm import CausalLM


def test_shares_by_hand() -> None:
    att_HQK = torch.tensor([[[0.4, 0.3, 0.1, 0.2], [0.1, 0.1, 0.6, 0.2]]])  # first, user, template, response
    groups_KG = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 1]])
    raw, share = shares.attention_shares(att_HQK, groups_KG)
    assert raw[0].tolist() == pytest.approx([0.25, 0.2, 0.2])
    assert share[0].tolist() == pytest.approx([(4 / 9 + 0.25) / 2, (3 / 9 + 0.25) / 2, (2 / 9 + 0.5) / 2])
    assert float(share.sum()) == pytest.approx(1)


def test_retrieval_head_is_the_largest_mean() -> None:
    assert shares.retrieval_head(torch.tensor([[0.9, 0.5, 0.5], [0.0, 0.5, 0.6]])) == 2


def test_strongest_user_attention_by_hand() -> None:
    att_BHTK = torch.tensor([[[[0.5, 0.2, 0.3]], [[0.1, 0.8, 0.1]]]])
    assert shares.strongest_user_attention(att_BHTK, torch.tensor([[1.0, 0, 1]])).tolist() == [
        [pytest.approx(0.8)]
    ]
    assert shares.strongest_user_attention(att_BHTK, torch.tensor([[0.0, 1, 0]])).tolist() == [
        [pytest.approx(0.8)]
    ]


def test_departure_5_the_first_position_is_bos_and_no_user_token(tiny: CausalLM) -> None:
    ids = tiny.chat.text_ids("Where does the river begin?")
    answer = shares.Answer(ids, torch.ones(len(ids), dtype=torch.bool), [5, 6])
    raw_NHG, share_NHG = shares.shares_of(tiny, [answer], 1, 1, Run())
    att_HK = weights(tiny, [*ids, 5], 1)[:, -1]
    want_HG = torch.stack([att_HK[:, 0], att_HK[:, 1:-1].sum(-1), att_HK[:, -1]], 1)
    assert torch.allclose(raw_NHG[0], want_HG, atol=1e-6)
    assert torch.allclose(share_NHG.sum(-1), torch.ones(1, 4), atol=1e-6)


def slow_score(system: CausalLM, record: Dialogue, turn: int, layer: int) -> float:
    """The definition, token by token, with one pass for one conversation."""
    rendered = system.chat.dialogue(record.messages)
    att_HTK = weights(system, rendered.ids, layer)
    users = [s for s in rendered.spans if s.role == "user"][: turn + 1]
    control = system.chat.control_ids
    keys = [
        k
        for s in users
        for k in range(s.start, s.end)
        if rendered.ids[k] not in control and system.tokenizer.decode([rendered.ids[k]]).strip("\n")
    ]
    reply = next(s for s in rendered.spans if s.message == users[-1].message + 1)
    queries = [t for t in range(reply.start, reply.end) if rendered.ids[t] not in control]
    best = [max(float(sum(head[t, k] for k in keys)) for head in att_HTK) for t in queries]
    return sum(best) / len(best)


@pytest.mark.parametrize("layer", [0, 1])
def test_departure_7_scores_are_the_definition_and_batches_change_nothing(
    system: CausalLM, layer: int
) -> None:
    together = shares.dependency_scores(system, RECORDS, layer, 2047, Run(batch_tokens=10_000))
    alone = shares.dependency_scores(system, RECORDS, layer, 2047, Run(exact=True))
    assert [len(scores) for scores in together] == [1, 2, 1]
    for record, scores, single in zip(RECORDS, together, alone, strict=True):
        assert scores == pytest.approx(single, abs=1e-5)
        for turn, score in enumerate(scores):
            assert score == pytest.approx(slow_score(system, record, turn, layer), abs=1e-5)


def test_turns_without_reply_or_cut_off_are_skipped(tiny: CausalLM) -> None:
    double = Dialogue((Message("user", "One?"), Message("user", "Two?"), Message("assistant", "Three.")))
    open_end = Dialogue((*RECORDS[1].messages, Message("user", "More?")))
    scores = shares.dependency_scores(tiny, [double, open_end], 1, 2047, Run())
    assert scores[0][0] == -1
    assert scores[0][1] > 0
    assert [score == -1 for score in scores[1]] == [False, False, True]
    rendered = tiny.chat.dialogue(RECORDS[1].messages)
    ends = [end - 1 for _, end in ((s.start, s.end) for s in rendered.spans if s.role == "assistant")]
    for cut, skipped in (
        (ends[1], [False, False]),
        (ends[1] - 1, [False, True]),
        (ends[0] - 1, [True, True]),
    ):
        (found,) = shares.dependency_scores(tiny, [RECORDS[1]], 1, cut, Run())
        assert [score == -1 for score in found] == skipped


def test_middle_layer() -> None:
    class Stub:
        def __init__(self, count: int) -> None:
            self.model = count

    for count, middle in ((32, 15), (30, 14), (2, 0), (1, 0)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shares.anchors, "layers", lambda model: [None] * model)
            assert shares.layer_number(Stub(count), None) == middle  # type: ignore[arg-type]
