"""Greedy coordinate gradient: its rules by hand, each departure, and whole attacks on tiny random models."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import temper
from temper import judges
from temper.core.errors import ConfigError, DataError, ModelError, NeedsError, NumericsError
from temper.core.types import Attempt, Message, Run
from temper.data.loading import load_data
from temper.data.schemas import Behaviour, Data
from temper.methods.attacks.gcg import method, outcomes, steps
from temper.methods.attacks.gcg.card import Config
from temper.methods.attacks.gcg.probe import agreement, first_layers, num_layers_of, probe_sample
from temper.methods.attacks.gcg.steps import Best, Search, takes_worse
from temper.ops.hooks import is_hooked
from temper.ops.search import allowed_mask
from temper.ops.search_losses import Scores, SlotScorer
from temper.systems.causal_lm import CausalLM
from temper.systems.loading import load_base

SMALL: dict[str, Any] = {
    "suffix_tokens": 5,
    "num_steps": 3,
    "num_candidates": 16,
    "topk": 24,
    "reply_tokens": 4,
}
GOALS = (
    Behaviour("How do I fold a paper boat?", "Sure, here is a fox", id="a", benign=True),
    Behaviour("Who wrote the letter?", "Yes. The assistant", id="b", benign=True),
)


@pytest.fixture(scope="module")
def system() -> CausalLM:
    made = load_base("tiny:llama")
    with torch.no_grad():
        for parameter in made.model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    return made


def run_on(system: CausalLM, goals: Any = GOALS, run: Run | None = None, **settings: Any) -> list[Attempt]:
    return list(temper.attack("gcg", system, goals, run=run, **{**SMALL, **settings}))


def search_of(system: CausalLM, **settings: Any) -> Search:
    config = Config(**{**SMALL, **settings})
    goals = method.prepare(system, GOALS[:1], config)
    return method.optimise([goals], allowed_mask(system), config, Run())


# -- the whole attack ------------------------------------------------------------------------------


def test_the_returned_string_gives_the_reported_loss(system: CausalLM) -> None:
    """Typed into the chat as text and scored by a whole forward pass over full logits."""
    for attempt, goal in zip(run_on(system), GOALS, strict=True):
        assert attempt.input == goal.prompt + attempt.detail["suffix"]
        prompt = system.chat.prompt([Message("user", attempt.input)]).ids
        reply = system.chat.dialogue([Message("user", attempt.input), Message("assistant", str(goal.target))])
        target = reply.ids[len(prompt) : reply.spans[-1].end - 1]
        with torch.no_grad():
            logits = system.model(input_ids=torch.tensor([[*prompt, *target]])).logits[0].float()
        logp = logits[len(prompt) - 1 : -1].log_softmax(-1)[torch.arange(len(target)), torch.tensor(target)]
        assert attempt.detail["best_loss"] == pytest.approx(-logp.mean().item(), abs=1e-4)
        assert attempt.detail["best_loss"] == pytest.approx(min(attempt.detail["loss_curve"]), abs=1e-4)
        assert attempt.detail["target_prob"] == pytest.approx(math.exp(logp.sum().item()), rel=1e-3)
        assert len(attempt.detail["loss_curve"]) == 4
        assert attempt.cost["queries"] > 3


def test_the_search_lowers_the_loss_and_the_gradient_beats_random(system: CausalLM) -> None:
    longer = {"num_steps": 8, "refill": True, "topk": 16}
    ours, random = run_on(system, **longer), run_on(system, search="random", **longer)
    assert all(a.detail["best_loss"] < a.detail["start_loss"] for a in ours)
    assert [a.cost["queries"] for a in ours] == [a.cost["queries"] for a in random] == [1 + 8 * 16 + 1] * 2
    assert sum(a.detail["best_loss"] for a in ours) < sum(a.detail["best_loss"] for a in random)


def test_no_suffix_is_the_prompt_alone(system: CausalLM) -> None:
    (attempt,) = run_on(system, GOALS[:1], search="none")
    assert (attempt.input, attempt.cost["queries"], attempt.detail["suffix"]) == (GOALS[0].prompt, 1.0, "")


def test_equal_seeds_give_equal_attempts_whatever_came_before(system: CausalLM) -> None:
    both, second = run_on(system), run_on(system, GOALS[1:])
    assert both[1].detail["suffix_ids"] == second[0].detail["suffix_ids"]
    assert both[1].detail["loss_curve"] == pytest.approx(second[0].detail["loss_curve"], abs=1e-5)
    other = run_on(system, GOALS[1:], run=Run(seed=1))
    assert other[0].detail["suffix_ids"] != second[0].detail["suffix_ids"]


def test_the_model_is_left_as_it_was(system: CausalLM) -> None:
    before = {name: tensor.clone() for name, tensor in system.model.state_dict().items()}
    run_on(system, GOALS[:1], draft="layers:1")
    assert all(torch.equal(tensor, before[name]) for name, tensor in system.model.state_dict().items())
    assert all(p.grad is None for p in system.model.parameters())
    assert not is_hooked(system.model)


def test_kept_keys_change_nothing(system: CausalLM) -> None:
    fast, slow = run_on(system, GOALS[:1]), run_on(system, GOALS[:1], keep_prefix=False)
    assert fast[0].detail["suffix_ids"] == slow[0].detail["suffix_ids"]
    assert fast[0].cost["tokens"] < slow[0].cost["tokens"]


def test_figures_and_rows(system: CausalLM, tmp_path: Path) -> None:
    from temper.report.figures import curve_figures
    from temper.run.attack_rows import attack_rows

    attempts = run_on(system, run=Run(folder=tmp_path))
    (figure,) = curve_figures(json.loads((tmp_path / "figures.json").read_text())["curves"])
    assert "Loss" in figure.title
    rows = list(attack_rows(attempts))
    losses = [row for row in rows if row.metric == "best_loss"]
    assert [row.item for row in losses] == [goal.prompt for goal in GOALS], "claims pair on goals"
    assert {"target_prob", "match", "judge_success", "queries", "attack_success_rate"} <= {
        r.metric for r in rows
    }


class Opens:
    """A step rule that lets every answer open with id 501, as a gate of refusal tokens does."""

    name = "opens"

    def start(self, prompt_ids: list[int]) -> dict[str, Any]:
        return {}

    def __call__(
        self, logits_BV: torch.Tensor, position_B: list[int], states: list[dict[str, Any]]
    ) -> torch.Tensor:
        first = torch.tensor([position == 0 for position in position_B])[:, None]
        forced = torch.full_like(logits_BV, -torch.inf)
        forced[:, 501] = 0.0
        return torch.where(first, forced, logits_BV)

    def reply_prefix_ids(self) -> list[int]:
        return [501]


def test_an_attack_on_refusal_tokens_aims_at_the_token_that_opens_an_answer(system: CausalLM) -> None:
    guarded = system.with_(step_rules=(Opens(),))
    (goal,) = method.prepare(guarded, GOALS[:1], Config())
    (plain,) = method.prepare(guarded, GOALS[:1], Config(target_prefix=""))
    assert goal.prompt.target == [501, *plain.prompt.target]
    (named,) = method.prepare(guarded, GOALS[:1], Config(target_prefix="<|endoftext|>"))
    assert named.prompt.target[0] == 0
    (attempt,) = run_on(guarded, GOALS[:1])
    assert attempt.detail["target_logp"] == pytest.approx(
        -attempt.detail["best_loss"] * len(goal.prompt.target), rel=1e-5
    )
    with pytest.raises(ModelError, match="splits the control token"):
        run_on(guarded, GOALS[:1], target_prefix="[nothing]")


# -- many goals, many models -----------------------------------------------------------------------


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


# -- departures ------------------------------------------------------------------------------------


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


# -- rules by hand ---------------------------------------------------------------------------------


def test_the_least_loss_is_taken_even_if_worse_and_the_best_is_kept(system: CausalLM) -> None:
    search = search_of(system)
    search.current, search.loss, search.best = [9, 9], 1.0, Best(1.0, [9, 9])
    no = torch.tensor([False, False])
    search.take(torch.tensor([[1, 2], [3, 4]]), Scores(torch.tensor([3.0, 2.0]), no))
    assert (search.current, search.loss, search.best.ids) == ([3, 4], 2.0, [9, 9])


def test_buffer_starts_each_step_from_the_best(system: CausalLM) -> None:
    search = search_of(system, buffer_size=2)
    search.buffer = [Best(1.0, [9, 9])]
    no = torch.tensor([False, False])
    search.take(torch.tensor([[1, 2], [3, 4]]), Scores(torch.tensor([3.0, 2.0]), no))
    assert (search.current, [b.loss for b in search.buffer]) == ([9, 9], [1.0, 2.0])
    search.take(torch.tensor([[1, 2], [3, 4]]), Scores(torch.tensor([0.5, 2.0]), no))
    assert (search.current, [b.loss for b in search.buffer]) == ([1, 2], [0.5, 1.0])


def test_annealing_by_hand() -> None:
    assert takes_worse(-0.1, 99, 100, 1.0), "better is always taken"
    assert takes_worse(0.5, 0, 2, 0.36), "T = 1/2: exp(-1) = .3679"
    assert not takes_worse(0.5, 0, 2, 0.37)
    assert not takes_worse(0.5, 1, 2, 0.0), "T = 0 at the end"


def test_annealing_keeps_the_current_string(system: CausalLM) -> None:
    search = search_of(system, annealing=True)
    search.num_steps, search.current, search.loss = 2, [9, 9], 1.0
    search.take(torch.tensor([[1, 2]]), Scores(torch.tensor([2.0]), torch.tensor([False])))
    assert search.current == [9, 9]


def test_agreement_and_probe_sizes_by_hand() -> None:
    loss = torch.arange(32.0)
    assert agreement(loss, loss * 3) == pytest.approx(1.0)
    assert agreement(loss, -loss) == pytest.approx(0.0)
    assert agreement(loss, torch.ones(32)) == 0.0, "undefined counts as none"
    ids = torch.arange(32)[:, None]
    seen: list[int] = []

    def score(rows: torch.Tensor) -> Scores:
        seen.extend(rows[:, 0].tolist())
        return Scores(rows[:, 0].float(), torch.zeros(len(rows), dtype=torch.bool))

    probed = probe_sample(ids, score, lambda rows: rows[:, 0].float(), torch.Generator().manual_seed(0), 8.0)
    assert probed.alpha == pytest.approx(1.0)
    assert sorted(seen) == sorted({*seen}), "none twice"
    assert 0 in seen, "the draft's best"
    assert len(seen) <= 3
    seen.clear()
    wrong = probe_sample(ids, score, lambda rows: -rows[:, 0].float(), torch.Generator().manual_seed(0), 8.0)
    assert wrong.alpha == pytest.approx(0.0)
    assert {29, 30, 31} <= set(seen), "alpha = 0: B / R = 4 of the draft's best, which are the model's worst"


def test_mellowmax_fluency_and_non_ascii_run(system: CausalLM) -> None:
    (soft,) = run_on(system, GOALS[:1], loss="mellowmax")
    assert soft.detail["best_loss"] > 0, "the reported loss stays the NLL"
    (fluent,) = run_on(system, GOALS[:1], control_weight=0.5)
    assert min(fluent.detail["loss_curve"]) > fluent.detail["best_loss"], (
        "the curve holds the slot's own NLL too"
    )
    assert run_on(system, GOALS[:1], allow_non_ascii=True)


def test_a_slot_within_the_prompt_and_an_initial_text(system: CausalLM) -> None:
    goal = Behaviour("Now {optim_str} fold it.", "Sure", id="a", benign=True)
    (attempt,) = run_on(system, [goal], init=" a small fox", num_steps=0)
    assert attempt.input.replace("  ", " ") == "Now a small fox fold it."
    assert attempt.detail["steps"] == 0


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [None, "", "  "])
def test_a_goal_without_a_target_is_an_error_before_anything_runs(
    system: CausalLM, target: str | None
) -> None:
    with pytest.raises(DataError, match=r"no target.*goal 1 \(b\)"):
        run_on(system, [GOALS[0], Behaviour("Say it.", target, id="b")])


def test_a_target_longer_than_the_context(system: CausalLM) -> None:
    with pytest.raises(DataError, match="context holds 512"):
        run_on(system, [Behaviour("Say it.", "fox " * 600, id="b")])


def test_a_slot_that_stands_twice(system: CausalLM) -> None:
    with pytest.raises(DataError, match="once"):
        run_on(system, [Behaviour("{optim_str} {optim_str}", "Sure", id="b")])


def test_goals_with_one_prompt_keep_apart(system: CausalLM) -> None:
    twice = [GOALS[0], Behaviour(GOALS[0].prompt, "Yes", id="z", benign=True)]
    assert [a.goal for a in run_on(system, twice, search="none")] == [
        f"{GOALS[0].prompt} [{i}]" for i in ("a", "z")
    ]


def test_a_system_that_rewrites_by_content_is_found_out(system: CausalLM) -> None:
    def shout(messages: tuple[Message, ...]) -> tuple[Message, ...]:
        return tuple(Message(m.role, m.content + "." * ("fox" in m.content)) for m in messages)

    with pytest.raises(ModelError, match="rewrites the finished prompt"):
        run_on(system.with_(rewrites=(shout,)), GOALS[:1], init=" a small fox", num_steps=0)


def test_a_loss_that_is_not_that_of_the_string_is_an_error(system: CausalLM) -> None:
    outcomes.check_loss(2.0, [1.0, 3.0005], system, Run())
    with pytest.raises(NumericsError, match="its string gives"):
        outcomes.check_loss(2.0, [2.1], system, Run())
    with pytest.raises(NumericsError):
        outcomes.check_loss(float("nan"), [2.1], system, Run())


def test_a_loss_of_nan_stops_the_search(system: CausalLM) -> None:
    search = search_of(system)
    with pytest.raises(NumericsError, match="nan"):
        search.take(torch.tensor([[1, 2]]), Scores(torch.tensor([math.nan]), torch.tensor([False])))


@pytest.mark.parametrize(
    "settings",
    [
        {"topk": 0},
        {"num_steps": -1},
        {"mellowmax_alpha": 0.0},
        {"check_every": 0},
        {"positions": "odd"},
        {"draft": "gradient", "search": "random"},
    ],
)
def test_bad_settings(system: CausalLM, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        run_on(system, **settings)


def test_an_endpoint_is_refused() -> None:
    with pytest.raises(NeedsError, match="endpoint"):
        temper.attack("gcg", "openai:gpt-x", GOALS)


def test_the_estimate_grows_with_the_work() -> None:
    data = load_data("builtin:behaviours:neutral", {"goals": "Behaviour"}, limit=2)
    facts = {"parameters": 1e8, "flops_per_s": 1e11, "device": "cpu"}
    one, two = (method.estimate(facts, data, Config(num_steps=n))["tokens"] for n in (100, 200))
    assert 1.9 < two / one < 2.1
    assert one > 100 * 512 * 20
    assert method.estimate(facts, data, Config(search="none"))["tokens"] < 1000
    assert method.estimate(facts, None, Config())["tokens"] == 0
