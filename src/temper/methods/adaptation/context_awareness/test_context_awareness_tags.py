"""Tags on the rows that lean on the user, and training with them."""

from __future__ import annotations

import pytest
import torch

from temper.core.errors import ConfigError, DataError
from temper.core.types import Message, Run
from temper.data.schemas import Data, Dialogue
from temper.methods.adaptation.context_awareness import method, shares, tagging
from temper.methods.adaptation.context_awareness.card import INDICATOR, Config
from temper.methods.adaptation.context_awareness.conftest import NONE, RECORDS
from temper.ops.batching import encode
from temper.ops.generate import Sampling, generate
from temper.systems.causal_lm import CausalLM


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
