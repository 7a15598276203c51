"""Context awareness: shares and steering by hand, each departure, tagging, needles, and what must be refused."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from temper.artefacts import Prompt, Steer, load_artefact
from temper.core import config as core_config
from temper.core.errors import ConfigError, DataError, ModelError, NeedsError
from temper.core.types import Message, Run
from temper.data.schemas import Data, Dialogue
from temper.methods.adaptation.context_awareness import conversations, method, needles, prose, shares, tagging
from temper.methods.adaptation.context_awareness.card import INDICATOR, Config
from temper.methods.adaptation.context_awareness.conversations import build_conversations
from temper.methods.adaptation.context_awareness.steering import steered, steering_bias, user_mask
from temper.ops.batching import Example, collate, encode
from temper.ops.generate import Sampling, generate
from temper.ops.hooks import attention_weights
from temper.ops.text import contains, words
from temper.run import verbs
from temper.systems.causal_lm import CausalLM
from temper.systems.chat import Chat
from temper.systems.loading import load_base

NONE = Data({}, "none")


def load(name: str, **options: Any) -> CausalLM:
    system = load_base(name, **options)
    assert isinstance(system, CausalLM)
    return system


TALKS = (
    [Message("user", "Where does the river begin?")],
    [Message("system", "Be brief."), Message("user", "Tell me about the mill.\nAnd the fox.")],
    [
        Message("user", "One?"),
        Message("assistant", "Two, of course, as the letter says."),
        Message("user", "Three?"),
    ],
)


@pytest.fixture(scope="module")
def tiny() -> CausalLM:
    return load("tiny:llama")


@pytest.fixture(params=["tiny:llama", "tiny:gpt2", "tiny:gemma2"])
def system(request: pytest.FixtureRequest) -> CausalLM:
    return load(request.param)


def weights(system: CausalLM, ids: list[int], layer: int = 0) -> torch.Tensor:
    with torch.no_grad(), attention_weights(system.model, [layer]) as kept:
        system.model(input_ids=torch.tensor([ids]), use_cache=False)
    return kept[layer][0][0]


def logits(system: CausalLM, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return system.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def reweighted(att_HTK: torch.Tensor, factor_K: torch.Tensor) -> torch.Tensor:
    """Att * factor / Z, the equation as it stands in the card."""
    changed = att_HTK * factor_K
    return changed / changed.sum(-1, keepdim=True)


# Steering.


def test_bias_by_hand() -> None:
    user_T = torch.tensor([False, True, True, False])
    log = math.log(0.5)
    assert steering_bias(user_T, 6, 0.5, False).tolist() == pytest.approx([log, 0, 0, log, 0, 0])
    assert steering_bias(user_T, 2, 0.5, False).tolist() == pytest.approx([log, 0])


def test_departure_2_generated_keys_are_weighed_only_if_asked(tiny: CausalLM) -> None:
    log = math.log(0.5)
    assert steering_bias(torch.tensor([False, True]), 4, 0.5, True).tolist() == pytest.approx(
        [log, 0, log, log]
    )
    talk = [*TALKS[0], Message("assistant", "By the old mill, they say.")]
    rendered = tiny.chat.dialogue(talk)
    start = rendered.spans[-1].start
    plain = weights(tiny, rendered.ids)
    for generated in (False, True):
        factor_K = torch.where(user_mask(rendered.spans, len(rendered.ids)), 1.0, 0.3)
        factor_K[start:] = 0.3 if generated else 1.0
        with steered(tiny, 0.3, steer_generated=generated):
            found = weights(tiny, rendered.ids)
        assert torch.allclose(found, reweighted(plain, factor_K), atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(alpha=st.floats(0.05, 1), which=st.integers(0, 2))
def test_steered_attention_is_the_equation(alpha: float, which: int) -> None:
    tiny = load("tiny:llama")
    rendered = tiny.chat.prompt(TALKS[which])
    factor_K = torch.where(user_mask(rendered.spans, len(rendered.ids)), 1.0, alpha)
    want = reweighted(weights(tiny, rendered.ids), factor_K)
    with steered(tiny, alpha):
        found = weights(tiny, rendered.ids)
    assert torch.allclose(found, want, atol=1e-6)
    assert torch.allclose(found.sum(-1), torch.ones(found.shape[:2]), atol=1e-5)


def test_departure_1_two_user_spans_make_one_mask(tiny: CausalLM) -> None:
    rendered = tiny.chat.prompt(TALKS[2])
    user_T = user_mask(rendered.spans, len(rendered.ids))
    first, second = (s for s in rendered.spans if s.role == "user")
    assert user_T[first.start : first.end].all()
    assert user_T[second.start : second.end].all()
    assert not user_T[first.end : second.start].any(), "template and the assistant's turn between them"
    union = steering_bias(user_T, len(rendered.ids), 0.5, False)
    released = sum(
        steering_bias(user_mask([span], len(rendered.ids)), len(union), 0.5, False)
        for span in (first, second)
    )
    assert union[first.start] == union[second.start] == 0
    assert released[first.start] == released[second.start] == pytest.approx(math.log(0.5)), "what it would do"  # type: ignore[index]
    assert released[0] == pytest.approx(2 * math.log(0.5))  # type: ignore[index]


def test_alpha_one_is_the_base_bit_for_bit_and_nearly_one_is_near(system: CausalLM) -> None:
    ids = system.chat.prompt(TALKS[0]).ids
    plain = logits(system, ids)
    with steered(system, 1.0):
        assert torch.equal(logits(system, ids), plain)
    with steered(system, 1 - 1e-6):
        assert torch.allclose(logits(system, ids), plain, atol=1e-4)
    with steered(system, 0.2):
        assert (logits(system, ids) - plain).abs().max() > 1e-4
    assert torch.equal(logits(system, ids), plain)


@pytest.mark.parametrize("generated", [False, True])
def test_generation_steers_every_step_and_every_row_alike(system: CausalLM, generated: bool) -> None:
    sampling = Sampling(max_new_tokens=8)
    with steered(system, 0.2, steer_generated=generated):
        together = generate(system, TALKS, sampling, Run())
        alone = [generate(system, [talk], sampling, Run(exact=True))[0] for talk in TALKS]
        assert [r.ids for r in together] == [r.ids for r in alone]
        for talk, reply in zip(TALKS, together, strict=True):
            ids = list(system.chat.prompt(talk).ids)
            for token in reply.ids:  # a fresh pass over all tokens must choose what the cached step chose
                assert int(logits(system, ids)[-1].argmax()) == token
                ids.append(token)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_shifts_nothing(system: CausalLM, side: str) -> None:
    rows = [system.chat.prompt(talk).ids for talk in TALKS]
    batch = collate([Example(ids, [False] * len(ids)) for ids in rows], system.pad_id, side=side)  # type: ignore[arg-type]
    positions_BT = (batch.mask_BT.cumsum(1) - 1).clamp_min(0)
    with steered(system, 0.3), torch.no_grad():
        alone = [logits(system, ids) for ids in rows]
        out = system.model(
            input_ids=batch.ids_BT,
            attention_mask=batch.mask_BT.long(),
            position_ids=positions_BT,
            use_cache=False,
        ).logits
    for b, want in enumerate(alone):
        assert torch.allclose(out[b][batch.mask_BT[b]], want, atol=1e-4)


def test_layers_and_heads_can_be_chosen(tiny: CausalLM) -> None:
    ids = tiny.chat.prompt(TALKS[0]).ids
    plain = weights(tiny, ids)
    with steered(tiny, 0.3, heads=[1]):
        found = weights(tiny, ids)
    assert torch.equal(found[[0, 2, 3]], plain[[0, 2, 3]])
    assert not torch.allclose(found[1], plain[1])
    with steered(tiny, 0.3, layers=[1]):
        assert torch.equal(weights(tiny, ids), plain)


def test_strength_is_a_power_of_alpha(tiny: CausalLM, tmp_path) -> None:
    artefact = method.fit(tiny, NONE, Config(alpha=0.6), Run())
    assert isinstance(artefact, Steer)
    ids = tiny.chat.prompt(TALKS[1]).ids
    plain = logits(tiny, ids)
    loaded = load_artefact(artefact.save(tmp_path / "steer"))
    for strength in (0.0, 0.5, 1.0, 2.0):
        with steered(tiny, 0.6**strength):
            want = logits(tiny, ids)
        with loaded.apply(tiny, strength) as changed:
            assert torch.equal(logits(changed, ids), want)
    with artefact.apply(tiny, 0.0) as changed:
        assert torch.equal(logits(changed, ids), plain)
    with pytest.raises(ConfigError, match="alpha is 1.66"), artefact.apply(tiny, -1.0):
        pass
    assert torch.equal(logits(tiny, ids), plain)


def test_departure_6_repeated_and_trimmed_text_is_found_where_it_stands(tiny: CausalLM) -> None:
    trimming = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    )
    chat = tiny.chat.with_(template=trimming)
    rendered = chat.prompt(
        [Message("system", "Yes."), Message("user", "  Yes.  "), Message("assistant", "Yes.")],
        open_reply=False,
    )
    user_T = user_mask(rendered.spans, len(rendered.ids))
    assert tiny.tokenizer.decode([i for i, u in zip(rendered.ids, user_T, strict=True) if u]) == "Yes."
    assert rendered.spans[1].start <= int(user_T.int().argmax()) < rendered.spans[1].end


def test_ids_that_no_template_wrote_are_left_alone_with_a_warning(tiny: CausalLM, caplog) -> None:
    ids = tiny.chat.text_ids("A fox walked by the stream and never came back again.")
    plain = logits(tiny, ids)
    with steered(tiny, 0.3):
        assert torch.allclose(logits(tiny, ids), plain, atol=1e-5)
    assert "not steered" in caplog.text


def test_a_steered_system_keeps_its_steering_under_another_prompt_artefact(tiny: CausalLM) -> None:
    brief = Prompt("*", "made-up", system_prompt="Be brief.")
    with steered(tiny, 0.2), brief.apply(tiny) as changed:
        found = generate(changed, [TALKS[0]], Sampling(max_new_tokens=6), Run())
    with brief.apply(tiny) as changed, steered(changed, 0.2):
        want = generate(changed, [TALKS[0]], Sampling(max_new_tokens=6), Run())
    assert found[0].ids == want[0].ids


# Shares and scores.


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


RECORDS = [
    Dialogue((Message("user", "Two lines\n\nof text."), Message("assistant", "I see two lines.")), id="a"),
    Dialogue((*TALKS[2], Message("assistant", "Yes, three of them.")), id="b"),
    Dialogue(
        (Message("system", "Be brief."), Message("user", "Hello there"), Message("assistant", "Hi.")), id="c"
    ),
]


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


# Tags and training.


def test_tag_text_by_hand() -> None:
    assert tagging.tag_text("Who founded it?") == "Who founded it? [IND]"
    assert tagging.tag_text("Name the founder") == "Name the founder. [IND]"
    assert tagging.tag_text("") == " [IND]"


def test_make_tags_above_beta_and_keeps_scores(tiny: CausalLM) -> None:
    data = Data({"train": RECORDS}, "mine")
    scores = shares.dependency_scores(tiny, RECORDS, 0, 2047, Run())
    flat = sorted(score for found in scores for score in found)
    beta = (flat[1] + flat[2]) / 2
    made = method._dialogues(method.make(tiny, data, Config(beta=beta), Run()), "train")
    for record, made_record, found in zip(RECORDS, made, scores, strict=True):
        assert made_record.extra["context_scores"] == pytest.approx(found)
        assert made_record.extra["context_tagged"] == [score > beta for score in found]
        users = [m.content for m in made_record.messages if m.role == "user"]
        assert [text.endswith(" [IND]") for text in users] == [score > beta for score in found]
        assert tagging.without_tags(made_record).messages[-1] == record.messages[-1]
    again = method._dialogues(method.make(tiny, Data({"train": made}), Config(beta=beta), Run()), "train")
    assert sum(m.content.count("[IND]") for r in again for m in r.messages) == sum(s > beta for s in flat)


def test_departure_9_median_beta() -> None:
    assert tagging.threshold([[0.1, -1.0], [0.5, 0.3]], "median") == pytest.approx(0.3)
    assert tagging.threshold([[0.1]], 0.6) == 0.6
    with pytest.raises(DataError, match="No turn has a score"):
        tagging.threshold([[-1.0], []], "median")


@pytest.fixture(scope="module")
def tuned(tiny: CausalLM):
    config = Config(
        mode="indicator", num_conversations=8, beta="median", tuning="lora", rank=2, lr=1e-2, batch_rows=4
    )
    return method.fit(tiny, NONE, config, Run())


def test_departure_3_the_indicator_is_one_id_right_behind_the_message(tiny: CausalLM, tuned) -> None:
    record = tagging.tag(RECORDS[2], [0.9], 0.6)
    assert record.messages[1].content == "Hello there. [IND]"
    with tuned.apply(tiny) as system:
        token_id = system.tokenizer.convert_tokens_to_ids(INDICATOR)
        assert token_id == len(tiny.tokenizer)
        rendered = system.chat.dialogue(tagging.as_control(record).messages)
        place = rendered.ids.index(token_id)
        assert system.tokenizer.decode(rendered.ids[place - 1]) == "."
        example = encode(system, tagging.as_control(record))
        assert example.ids == rendered.ids
        assert not example.scored[place]


def test_departure_4_typed_text_never_is_the_indicator(tiny: CausalLM, tuned) -> None:
    middle = Dialogue((Message("user", "What is [IND] for?"), Message("assistant", "A mark [IND]")))
    assert tagging.as_control(middle) == middle
    switch = method.fit(tiny, NONE, Config(mode="switch"), Run())
    with tuned.apply(tiny) as system:
        token_id = system.tokenizer.convert_tokens_to_ids(INDICATOR)
        asked = [Message("user", "Who? [IND]")]
        assert token_id not in system.chat.prompt(system.rewritten(asked)).ids
        with switch.apply(system) as on:
            assert on.chat.prompt(on.rewritten(asked)).ids.count(token_id) == 1
            replies = [generate(s, [asked], Sampling(max_new_tokens=4), Run())[0] for s in (system, on)]
    assert replies[1].num_prompt_tokens == replies[0].num_prompt_tokens + 1


def test_the_switch_without_the_tuned_model_is_refused(tiny: CausalLM) -> None:
    with (
        method.fit(tiny, NONE, Config(mode="switch"), Run()).apply(tiny) as system,
        pytest.raises(ConfigError, match="no control token"),
    ):
        generate(system, ["Who?"], Sampling(max_new_tokens=2), Run())


def test_vanilla_trains_on_the_same_words_without_tags(tiny: CausalLM) -> None:
    made = method.make(tiny, NONE, Config(num_conversations=8, beta="median"), Run())
    rows = method._training_rows(tiny, made, Config(mode="vanilla"), Run())
    tagged = method._training_rows(tiny, made, Config(mode="indicator"), Run())
    assert [[m.content for m in r.messages] for r in rows] == [
        [m.content for m in r.messages] for r in tagged
    ]
    assert any(m.control for r in tagged for m in r.messages)
    assert not any(m.control for r in rows for m in r.messages)


def test_tuning_leaves_the_base_as_it_was(tiny: CausalLM, tuned) -> None:
    before = {name: value.clone() for name, value in tiny.model.state_dict().items()}
    with tuned.apply(tiny):
        pass
    assert all(torch.equal(before[name], value) for name, value in tiny.model.state_dict().items())


# Needles and conversations.


def test_departure_8_needles_hide_words_the_prose_never_has() -> None:
    draw = random.Random(0)
    haystack = set(words(" ".join(prose.sentence(draw) for _ in range(3000))))
    for needle in prose.build_needles(40, 3):
        assert not haystack & set(needle.keywords)
        assert not set(words(needle.question)) & set(needle.keywords)
        assert set(needle.keywords) <= set(words(needle.text))


@pytest.mark.parametrize(("depth", "place"), [(0.0, 0), (0.5, 2), (1.0, 4)])
def test_needle_stands_at_its_depth_without_line_breaks(depth: float, place: int) -> None:
    text = needles.hide(["a.", "b.", "c.", "d."], "the\nneedle.", depth)
    want = ["a.", "b.", "c.", "d."]
    want.insert(place, "the needle.")
    assert text == " ".join(want)


def test_grid_has_every_cell_and_its_lengths(tiny: CausalLM) -> None:
    config = Config(lengths=(40, 90), depths=(0, 0.5, 1), num_needles=2)
    grid = needles.build_grid(tiny, config, 1)
    assert len({test.id for test in grid}) == len(grid) == 12
    assert grid == needles.build_grid(tiny, config, 1)
    assert grid[0].text != needles.build_grid(tiny, config, 2)[0].text
    for test in grid:
        assert test.needle.text in test.text
        bare = (
            test.text.replace(test.needle.text + " ", "").replace(" " + test.needle.text, "").split("\n\n")[1]
        )
        assert test.length <= len(tiny.chat.text_ids(bare)) < test.length + 60


def test_distractors_are_of_the_needles_form_and_hold_none_of_its_words(tiny: CausalLM) -> None:
    for number, needle in enumerate(prose.build_needles(8, 1)):
        found = prose.build_distractors(needle, 5, random.Random(number))
        assert len(set(found)) == 5
        for text in found:
            assert not set(words(text)) & set(needle.keywords)
            assert text.split(" of ")[0] == needle.text.split(" of ")[0]
            assert text != needle.text
    (test,) = needles.build_grid(tiny, Config(lengths=(120,), depths=(0.5,), num_distractors=2), 0)
    plain = needles.build_grid(tiny, Config(lengths=(120,), depths=(0.5,)), 0)[0]
    form = test.needle.text.split(" of ")[0]
    assert (test.text.count(form), plain.text.count(form)) == (3, 1)


def test_departure_10_bare_text_cannot_end_its_reply(tiny: CausalLM) -> None:
    rule = needles.NoEnd(tiny.stop_ids)
    logits_BV = torch.zeros(2, 512)
    out = rule(logits_BV, [0, 3], [{}, {}])
    ended = sorted(tiny.stop_ids)
    assert torch.isinf(out[:, ended]).all()
    assert int(torch.isinf(out).sum()) == 2 * len(ended)
    assert not torch.isinf(logits_BV).any()


def test_recall_rows_by_hand(tiny: CausalLM) -> None:
    grid = needles.build_grid(tiny, Config(lengths=(40,), depths=(0, 1)), 0)
    rows = list(needles._recall_rows(grid, [1.0, 0.5], "template"))
    value = {(r.metric, r.group, r.item): r.value for r in rows}
    assert value["recall", "", None] == 0.75
    assert value["recall_all", "", None] == 0.5
    assert value["recall_all", "depth 1", None] == 0
    assert value["recall", "length 40", None] == 0.75
    assert value["recall_all", "", grid[0].id] == 1


def test_measure_needles_gives_every_arm_on_the_same_items(tiny: CausalLM, tmp_path) -> None:
    config = Config(lengths=(40,), depths=(0, 1), alphas=(1, 0.5), reply_tokens=3, share_items=1)
    rows = list(method.measure(tiny, NONE, config, Run(folder=tmp_path)))
    items = {
        arm: {r.item for r in rows if r.arm == arm and r.item}
        for arm in ("no_template", "template", "steered_1", "steered_0.5")
    }
    assert len({frozenset(found) for found in items.values()}) == 1
    assert len(items["template"]) == 2
    found = [r for r in rows if r.metric.endswith("_share")]
    assert all(r.n == 1 for r in found)
    share = {(r.arm, r.metric): r.value or 0.0 for r in found}
    for arm in items:
        assert sum(share[arm, f"{g}_share"] for g in shares.GROUPS) == pytest.approx(1, abs=1e-5)
    assert share["steered_1", "user_share"] == share["template", "user_share"]
    assert share["steered_0.5", "user_share"] > share["template", "user_share"]
    assert (tmp_path / "figures.json").exists()


def test_conversations_are_what_they_say() -> None:
    data = build_conversations(300, 5)
    kinds = [r.extra["kind"] for r in data["train"]]
    assert (kinds.count("context"), kinds.count("chat"), kinds.count("aside")) == (150, 75, 75)
    assert (
        data.fingerprint == build_conversations(300, 5).fingerprint != build_conversations(300, 6).fingerprint
    )
    for record in method._dialogues(data, "train") + method._dialogues(data, "test"):
        asked, reply = record.messages[0].content, record.messages[1].content
        assert record.extra["answer"] in reply
        assert contains(asked, str(record.extra["answer"])) == (record.extra["kind"] == "context")
    said = {
        part: " ".join(m.content for r in method._dialogues(data, part) for m in r.messages) for part in data
    }
    countries = {fact.subject for fact in conversations._all_facts()}
    asked_in = {part: {c for c in countries if contains(text, c)} for part, text in said.items()}
    claims = [r.extra["kind"] for r in data["train"] if r.extra.get("prior")]
    assert claims.count("context") == claims.count("aside") == 75, "looks do not tell what to trust"
    assert asked_in["test"]
    assert not asked_in["train"] & asked_in["test"], "tested on countries that training never names"


# What must be refused.


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"alpha": 0.0}, r"\(0, 1\]"),
        ({"alpha": 1.2}, r"\(0, 1\]"),
        ({"alphas": (0.9, -1)}, r"\(0, 1\]"),
        ({"lengths": ()}, "grid is empty"),
        ({"depths": ()}, "grid is empty"),
        ({"num_needles": 0}, "grid is empty"),
        ({"depths": (1.5,)}, r"\[0, 1\]"),
        ({"lengths": (0,)}, "at least 1"),
        ({"beta": "mean"}, "beta"),
    ],
)
def test_wrong_settings_are_one_clear_error(change: dict[str, object], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        core_config.build(Config, [("recipe", change)])


def without_template(system: CausalLM) -> CausalLM:
    bare = load("tiny:llama").tokenizer
    bare.chat_template = None
    return system.with_(tokenizer=bare, chat=Chat(bare))


@pytest.mark.parametrize("verb", [method.fit, lambda *a: list(method.measure(*a))])
def test_a_base_without_template_is_refused(tiny: CausalLM, verb) -> None:
    with pytest.raises(ModelError, match="no chat template"):
        verb(without_template(tiny), NONE, Config(lengths=(40,), depths=(0,), reply_tokens=2), Run())


def test_a_system_without_attention_is_refused(tiny: CausalLM, monkeypatch) -> None:
    monkeypatch.setattr(CausalLM, "probe", lambda self: {"generate": True, "grads": True, "attention": False})
    with pytest.raises(NeedsError, match="attention"):
        verbs.fit(method.SLUG, tiny, config=Config())


def test_flash_attention_takes_no_mask(tiny: CausalLM, monkeypatch) -> None:
    monkeypatch.setattr(tiny.model.config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(NeedsError, match="additive mask"):
        method.fit(tiny, NONE, Config(), Run())


def test_sdpa_whose_mask_is_none_is_steered_as_eager_is() -> None:
    found = {}
    for kind in ("sdpa", "eager"):
        system = load("tiny:llama", attention=kind)
        ids = system.chat.prompt(TALKS[0]).ids
        with steered(system, 0.4):
            found[kind] = logits(system, ids)
    assert torch.allclose(found["sdpa"], found["eager"], atol=1e-5)


def test_a_conversation_without_user_is_refused(tiny: CausalLM) -> None:
    ids = tiny.chat.prompt([Message("system", "Be brief.")]).ids
    with steered(tiny, 0.5), pytest.raises(DataError, match="no user token"):
        logits(tiny, ids)


@pytest.mark.parametrize("change", [{"layers": (9,)}, {"heads": (9,)}])
def test_a_layer_or_head_that_is_not_there(tiny: CausalLM, change) -> None:
    with pytest.raises(ConfigError, match="no (layer|head) 9"):
        method.fit(tiny, NONE, Config(**change), Run())
    with pytest.raises(ConfigError, match="no layer 7"):
        method.make(tiny, NONE, Config(layer=7, num_conversations=2), Run())


def test_rows_without_answer_kind_or_tag_are_named(tiny: CausalLM) -> None:
    data = Data({"test": RECORDS, "train": RECORDS}, "mine")
    for probe, column in (("answers", "answer"), ("dependency", "kind")):
        with pytest.raises(DataError, match=f"row 1, column {column}"):
            list(method.measure(tiny, data, Config(probe=probe), Run()))  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"ends in \[IND\]"):
        method.fit(tiny, data, Config(mode="indicator"), Run())


def test_needles_longer_than_the_context_are_refused(tiny: CausalLM) -> None:
    with pytest.raises(DataError, match="no room"):
        list(method.measure(tiny, NONE, Config(lengths=(600,), depths=(0,), reply_tokens=2), Run()))


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """No test leaves the shared tiny system with a hook."""
    yield
    for module in load("tiny:llama").model.modules():
        assert not module._forward_pre_hooks
