"""What must be refused: settings, models, rows and texts."""

from __future__ import annotations

import pytest

from temper.core import config as core_config
from temper.core.errors import ConfigError, DataError, ModelError, NeedsError
from temper.core.types import Message, Run
from temper.data.schemas import Data
from temper.methods.adaptation.context_awareness import method
from temper.methods.adaptation.context_awareness.card import Config
from temper.methods.adaptation.context_awareness.conftest import NONE, RECORDS, load, logits
from temper.methods.adaptation.context_awareness.steering import steered
from temper.run import verbs
from temper.systems.causal_lm import CausalLM
from temper.systems.chat import Chat


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
