"""Systems from specs and the verbs from Python, on a tiny random model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from temper.artefacts.prompt import Prompt
from temper.cli.new import write_scratch
from temper.core.card import Card
from temper.core.errors import ConfigError, ModelError, NeedsError
from temper.core.registry import load_card
from temper.core.types import Message
from temper.data.schemas import Data, Dialogue
from temper.run import verbs
from temper.run.checks import check_extras, check_system
from temper.run.execute import run_recipe
from temper.run.resolve import load_system, open_system
from temper.store import lines
from temper.store.records import stable

BASE = "tiny:llama"


@pytest.fixture
def scratch(methods):
    write_scratch(methods, "tries", "wordy")
    return methods


def dialogues():
    talk = (Message("user", "Name a colour."), Message("assistant", "Blue."))
    return Data({"train": [Dialogue(talk, id="a")], "test": [Dialogue(talk[:1], id="b")]})


def state(system):
    return {name: value.clone() for name, value in system.model.state_dict().items()}


def test_the_base_is_loaded_once_and_stays_bit_identical(tmp_path):
    system = load_system(BASE)
    before = state(system)
    Prompt(base=system.fingerprint, method="m", system_prompt="Be brief.").save(tmp_path / "p")
    with open_system(f"{BASE}+{tmp_path / 'p'}") as opened:
        assert opened.rewritten([Message("user", "x")])[0] == Message("system", "Be brief.")
        assert opened.model is system.model
    assert load_system(BASE) is system
    assert all(torch.equal(value, before[name]) for name, value in system.model.state_dict().items())


def test_an_artefact_of_another_base_is_refused(tmp_path):
    Prompt(base="0" * 64, method="m").save(tmp_path / "p")
    with pytest.raises(ModelError, match="fitted on base"), open_system(f"{BASE}+{tmp_path / 'p'}"):
        pass


def test_a_missing_artefact_is_named_before_the_base_loads(tmp_path, monkeypatch):
    import temper.run.resolve as resolve

    monkeypatch.setattr(resolve, "load_system", lambda *a: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match="no artefact 'none'"), open_system(f"{BASE}+none", out=tmp_path):
        pass


def test_verbs_from_python(scratch):
    prompt = verbs.fit("wordy", BASE, dialogues(), num_demonstrations=1)
    assert [m.content for m in prompt.demonstrations] == ["Name a colour.", "Blue."]
    rows = list(verbs.measure("wordy", load_system(BASE), dialogues(), config={"max_new_tokens": 3}))
    assert [row.metric for row in rows] == ["reply_words", "mean_reply_words"]


def test_verbs_check_before_work(scratch):
    with pytest.raises(ConfigError, match="Did you mean num_demonstrations"):
        verbs.fit("wordy", BASE, dialogues(), num_demonstration=1)
    with pytest.raises(ConfigError, match="no verb 'attack'"):
        verbs.attack("wordy", BASE, dialogues())
    with pytest.raises(ConfigError, match="needs data"):
        verbs.measure("wordy", BASE)
    with pytest.raises(Exception, match="'test'"):
        verbs.measure("wordy", BASE, Data({"other": dialogues()["test"]}))
    with pytest.raises(ConfigError, match="both given"):
        verbs.fit("wordy", BASE, config={}, num_demonstrations=1)
    with pytest.raises(ConfigError, match="no base model"):
        verbs.fit("wordy", "nonsense", dialogues())


def test_needs_are_checked_against_the_kind_and_then_probed(scratch):
    card = scratch / "tries" / "wordy" / "card.py"
    text = card.read_text()
    card.write_text(text.replace('frozenset({"generate"})', 'frozenset({"generate", "grads"})'))
    with pytest.raises(NeedsError, match="is an endpoint"):
        verbs.fit("wordy", "openai:none", dialogues())
    changed = replace(load_card("wordy"), needs=frozenset({"draw"}))
    with pytest.raises(NeedsError, match="draw"):
        check_system("wordy", changed, load_system(BASE))


def test_a_missing_extra_gives_the_install_line():
    card = Card(
        title="", paper="", verbs=("fit",), config=object, needs=frozenset(), data={}, extras=("numpy",)
    )
    check_extras("x", card)
    with pytest.raises(NeedsError, match="pip install not-a-package-at-all"):
        check_extras("x", replace(card, extras=("numpy", "not-a-package-at-all")))


def test_a_recipe_with_an_artefact_and_the_run_as_a_system(scratch):
    result = run_recipe("wordy", recipe="tiny")
    again = run_recipe("wordy", recipe="tiny", out="elsewhere")
    one, two = ([stable(r) for r in lines.read(x.folder.path / "rows.jsonl")] for x in (result, again))
    assert one == two
    row = next(result.folder.rows())
    assert row.facts["system"] == f"{BASE}+prompt"
    assert len(row.facts["template_sha256"]) == 64
    for name in (str(result.folder.path), result.folder.id, f"{result.folder.id}/prompt"):
        with open_system(f"{BASE}+{name}") as system:
            assert system.rewrites
    own = run_recipe(
        "wordy", verb="measure", system=f"{BASE}+{result.folder.id}", data="builtin:noncompliance:test",
        sets=("max_new_tokens=1",), options={"batch_tokens": 2048},
    )  # fmt: skip
    assert own.num_rows > 3
