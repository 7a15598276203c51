"""One string for many goals and many models."""

from __future__ import annotations

from typing import Any

import pytest

from temper.core.errors import ConfigError
from temper.core.types import Run
from temper.data.schemas import Behaviour, Data
from temper.methods.attacks.gcg import method, outcomes
from temper.methods.attacks.gcg.card import Config
from temper.methods.attacks.gcg.conftest import GOALS, SMALL, run_on, search_of
from temper.methods.attacks.gcg.steps import Best, Search
from temper.ops.search import allowed_mask
from temper.systems.causal_lm import CausalLM
from temper.systems.loading import load_base


def test_universal_is_one_string_for_all_and_held_out_goals_are_only_tried(system: CausalLM) -> None:
    held_out = Behaviour("Where does the river begin?", "Yes.", id="c", benign=True)
    data = Data({"goals": GOALS, "held_out": (held_out,)})
    found = run_on(system, data, universal=True, progressive=False)
    assert [a.goal for a in found] == [*(g.prompt for g in GOALS), held_out.prompt]
    assert len({a.detail["suffix"] for a in found}) == 1
    assert [a.detail["held_out"] for a in found] == [0.0, 0.0, 1.0]
    mean = sum(a.detail["best_loss"] for a in found[:2]) / 2
    assert mean == pytest.approx(min(found[0].detail["loss_curve"]), abs=1e-4), (
        "the score is the mean over goals"
    )
    assert found[2].cost["queries"] == 1


def test_goals_join_when_those_so_far_succeed_then_models(
    system: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = load_base("tiny:gpt2")
    config = Config(**{**SMALL, "num_steps": 8}, universal=True, check_every=2)
    counted: list[set[tuple[int, int]]] = []
    real = Search.begin

    def begin(self: Search, members: Any) -> None:
        counted.append({(m.model, m.goal) for m in members})
        real(self, members)

    monkeypatch.setattr(Search, "begin", begin)
    monkeypatch.setattr(method, "_says", lambda *_: True)
    goals = method.prepare(system, GOALS, config)
    attempts = list(method.universal([system, other], goals, config, Run()))
    assert counted == [{(0, 0)}, {(0, 0), (0, 1)}, {(0, 0), (0, 1), (1, 0), (1, 1)}]
    assert len(attempts) == 2
    counted.clear()
    monkeypatch.setattr(method, "_says", lambda *_: False)
    list(method.universal([system, other], goals, config, Run()))
    assert counted == [{(0, 0)}], "nobody joins before the first succeeds"


def test_a_loss_record_starts_anew_when_a_goal_joins(system: CausalLM) -> None:
    search = search_of(system)
    search.best = Best(-1.0, list(search.current))
    search.begin(search.all_members)
    assert search.best.loss == pytest.approx(search.curve[-1])


def test_several_models_share_one_score(system: CausalLM) -> None:
    other = load_base("tiny:gpt2")
    config = Config(**SMALL, universal=True, progressive=False)
    by_model = [method.prepare(s, GOALS[:1], config) for s in (system, other)]
    search = method.optimise(by_model, allowed_mask(system), config, Run())
    alone = []
    for goals in by_model:
        (found,) = outcomes.outcomes(
            goals[0].prompt.system, goals, outcomes.text_of(by_model[0][0], search.best.ids), config, Run()
        )
        alone.append(found.loss)
    assert search.best.loss == pytest.approx(sum(alone) / 2, abs=1e-4)


def test_models_with_other_vocabularies_are_refused(system: CausalLM) -> None:
    other = load_base("tiny:gpt2")
    other.tokenizer.add_tokens(["blorp"])
    goals = method.prepare(system, GOALS, Config())
    with pytest.raises(ConfigError, match="different vocabularies"):
        method.universal([system, other], goals, Config(), Run())
