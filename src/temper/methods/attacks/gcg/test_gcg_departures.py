"""Each departure from the paper."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from temper import judges
from temper.core.errors import ConfigError, DataError
from temper.data.schemas import Behaviour
from temper.methods.attacks.gcg import method, outcomes, steps
from temper.methods.attacks.gcg.card import Config
from temper.methods.attacks.gcg.conftest import GOALS, SMALL, run_on, search_of
from temper.methods.attacks.gcg.probe import first_layers, num_layers_of
from temper.methods.attacks.gcg.steps import Best
from temper.ops.search import allowed_mask
from temper.ops.search_losses import Scores, SlotScorer
from temper.systems.causal_lm import CausalLM


def test_departure_1_only_strings_that_give_their_ids_back_are_scored(
    system: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[torch.Tensor] = []
    real = SlotScorer.losses

    def losses(self: SlotScorer, ids_KN: torch.Tensor, current: Any) -> Scores:
        scored.append(ids_KN)
        return real(self, ids_KN, current)

    monkeypatch.setattr(SlotScorer, "losses", losses)
    search = search_of(system, search="random", num_candidates=64)
    prompt = search.members[0].scorer.prompt
    ids = torch.cat(scored).tolist()
    assert all(prompt.is_exact(row, text) for row, text in zip(ids, prompt.texts(ids), strict=True))
    scored.clear()
    search_of(system, search="random", num_candidates=64, filter="off")
    ids = torch.cat(scored).tolist()
    assert not all(prompt.is_exact(row, text) for row, text in zip(ids, prompt.texts(ids), strict=True))


def test_departure_2_added_and_special_tokens_never_enter_a_string(system: CausalLM) -> None:
    allowed = allowed_mask(system)
    search = search_of(system, search="random", num_candidates=128)
    assert set(search.best.ids) <= set(allowed.nonzero()[:, 0].tolist())
    assert not allowed[list(system.tokenizer.added_tokens_decoder)].any()


def test_departure_3_positions_are_even_or_drawn(system: CausalLM) -> None:
    even, drawn = search_of(system), search_of(system, positions="uniform", num_replace=2)
    for search, most in ((even, 1), (drawn, 2)):
        changed = search.candidates() != torch.tensor(search.current)
        assert int(changed.sum(1).max()) == most
    with pytest.raises(ConfigError, match="positions: uniform"):
        run_on(system, num_replace=2)


def test_departure_4_equal_candidates_are_scored_once(system: CausalLM) -> None:
    search = search_of(system, topk=2, num_candidates=64)
    rows = search.candidates().tolist()
    assert len({tuple(row) for row in rows}) == len(rows) <= 2 * 5
    assert search.current not in rows
    loose = search_of(system, topk=2, num_candidates=64, deduplicate=False).candidates().tolist()
    assert len({tuple(row) for row in loose}) < len(loose)


def test_departure_5_no_survivor_is_an_error_with_advice_and_refill_fills_up(
    system: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(search_of(system, search="random", refill=True).candidates()) == SMALL["num_candidates"]
    monkeypatch.setattr(steps, "exact_rows", lambda prompts, rows: [])
    with pytest.raises(DataError, match=r"keeps its tokens.*another init"):
        run_on(system)


def test_departure_6_candidates_are_scored_on_their_changed_end(system: CausalLM) -> None:
    fast, slow = search_of(system), search_of(system, keep_prefix=False)
    assert fast.curve == pytest.approx(slow.curve, abs=1e-4)
    assert fast.members[0].scorer.reuses_prefix
    assert fast.members[0].scorer.tokens < slow.members[0].scorer.tokens


def test_departure_7_replies_are_asked_every_so_often(
    system: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(method, "_says", lambda *_: asked.append(1) or True)
    search = search_of(system, num_steps=7, stop_loss=1e9, check_every=3)
    assert (search.num_steps, len(asked)) == (3, 1)
    asked.clear()
    assert search_of(system, num_steps=7, check_every=3).num_steps == 7
    assert not asked, "nothing to decide, nothing asked"


def test_departure_8_early_stop_returns_a_string_that_hits(system: CausalLM) -> None:
    search = search_of(system, early_stop=True)
    search.best = Best(5.0, [1, 1])
    rows = torch.tensor([[1, 2], [3, 4], [5, 6]])
    search.take(rows, Scores(torch.tensor([0.1, 0.4, 0.3]), torch.tensor([False, True, True])))
    assert search.best == Best(pytest.approx(0.3), [5, 6], True)
    search.take(rows, Scores(torch.tensor([0.05, 0.4, 0.3]), torch.tensor([False, True, True])))
    assert search.best.ids == [5, 6], "a lower loss that does not hit is not returned"


def test_early_stop_stops(system: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        SlotScorer,
        "losses",
        lambda self, ids, current: Scores(torch.ones(len(ids)), torch.arange(len(ids)) > 0),
    )
    assert search_of(system, early_stop=True).num_steps == 1
    assert search_of(system).num_steps == 3


def test_departure_9_drafts(system: CausalLM) -> None:
    ids = torch.tensor([[4, 5, 6]])
    whole = system.model(input_ids=ids).logits
    with first_layers(system.model, 1):
        assert len(system.model.model.layers) == 1
        assert not torch.allclose(system.model(input_ids=ids).logits, whole)
    assert torch.equal(system.model(input_ids=ids).logits, whole)
    assert num_layers_of("tiny:gpt2", system) is None
    for bad in ("layers:2", "layers:0", "layers:x"):
        with pytest.raises(ConfigError, match="no shorter model"):
            num_layers_of(bad, system)
    for draft in ("gradient", "layers:1", "tiny:gpt2"):
        full, probed = (run_on(system, GOALS[:1], draft=name, num_candidates=48)[0] for name in ("", draft))
        assert probed.cost["queries"] < full.cost["queries"] / 2
        assert probed.detail["best_loss"] <= probed.detail["start_loss"]


def test_the_gradient_drafts_without_a_pass_of_its_own(system: CausalLM) -> None:
    """Every token run is the gradient's, the probe set's or the filtered set's."""
    plain, probed = (search_of(system, draft=draft, num_candidates=48) for draft in ("", "gradient"))
    assert probed.members[0].scorer.tokens < plain.members[0].scorer.tokens / 2
    assert probed.draft == probed.foreseen
    probed.choices()
    assert probed.grad_NV is not None
    torch.testing.assert_close(probed.grad_NV, probed.members[0].scorer.gradient(probed.current))


def test_departure_10_success_is_the_match_for_benign_goals_and_the_judge_for_others(
    system: CausalLM,
) -> None:
    goals = method.prepare(system, [GOALS[0], Behaviour("Open it.", "Sure", id="x")], Config())
    found = [
        outcomes.Outcome("", 1.0, -1.0, "I'm sorry, but I can't."),
        outcomes.Outcome("", 1.0, -1.0, "Sure, so."),
    ]
    verdicts = outcomes.judge_replies(goals, found, judges.load("refusal-rules"))
    assert verdicts == [(False, False, False), (True, True, True)]
    assert [outcomes.succeeded(g, v, Config()) for g, v in zip(goals, verdicts, strict=True)] == [False, True]
    odd = outcomes.Verdicts(judged=False, rule=True, match=True)
    assert [outcomes.succeeded(g, odd, Config()) for g in goals] == [True, False]
    assert outcomes.succeeded(goals[1], odd, Config(success="match")) is True
    assert outcomes.succeeded(goals[1], odd._replace(judged=None), Config()) is None
