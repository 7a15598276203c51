"""What greedy coordinate gradient books, beside what the model really ran, and that no budget is exceeded."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import temper
from temper.core.budget import Budget
from temper.core.errors import ConfigError
from temper.core.types import Attempt, Run
from temper.data.schemas import Behaviour, Data
from temper.methods.attacks.gcg import method
from temper.methods.attacks.gcg.card import Config
from temper.methods.attacks.gcg.probe import most_scored, probe_sample
from temper.ops.search_losses import Scores, SlotLoss, SlotScorer
from temper.systems.causal_lm import CausalLM
from temper.systems.loading import load_base

SMALL: dict[str, Any] = {
    "suffix_tokens": 4,
    "num_steps": 4,
    "num_candidates": 32,
    "topk": 24,
    "reply_tokens": 20,
}
DATA = Data(
    {
        "goals": (
            Behaviour("How do I fold a paper boat?", "Sure, here is a fox", id="a", benign=True),
            Behaviour("Who wrote the letter that came by the morning boat?", "Yes.", id="b", benign=True),
        ),
        "held_out": tuple(
            Behaviour(f"Where does the {name} begin?", "It begins in the hills.", id=name, benign=True)
            for name in ("river", "road", "wall")
        ),
    }
)
GOALS = Data({"goals": DATA["goals"]})
LOOKS = {"stop_loss": 1e9, "check_every": 1}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "without a search": {"search": "none"},
    "a draft of one layer": {"draft": "layers:1"},
    "another model drafts": {"draft": "tiny:llama:1"},
    "the gradient drafts": {"draft": "gradient"},
    "a random search with a draft": {"search": "random", "draft": "layers:1", "draft_reduction": 1.0},
    "replies under way": LOOKS,
    "whole rows": {"keep_prefix": False, **LOOKS},
    "fluency": {"control_weight": 0.5},
    "one string": {"universal": True, "progressive": False, **LOOKS},
    "goals that join": {"universal": True, "check_every": 1},
    "goals that join, and a draft": {"universal": True, "check_every": 2, "draft": "layers:1"},
}


@pytest.fixture(scope="module")
def system() -> CausalLM:
    """One that was tried out before, so that nothing but an attack runs in a test."""
    made = load_base("tiny:llama")
    list(temper.attack("gcg", made, GOALS, **{**SMALL, "num_steps": 1}))
    return made


@pytest.fixture
def meter(system: CausalLM, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens that the system looked up, counted without the search's knowledge; no prompt is padded."""
    seen: list[int] = []
    real = nn.Embedding.forward

    def forward(self: nn.Embedding, ids: Tensor) -> Tensor:
        if self is system.model.get_input_embeddings():
            seen.append(ids.numel())
        return real(self, ids)

    monkeypatch.setattr(nn.Embedding, "forward", forward)
    monkeypatch.setattr(method.results, "generate", partial(method.results.generate, engine="rows"))
    return seen


def spent(
    system: CausalLM, settings: dict[str, Any], **limits: float
) -> tuple[dict[str, Any], list[Attempt]]:
    run = Run(budget=Budget(limits))
    data = DATA if settings.get("universal") else GOALS
    found = list(temper.attack("gcg", system, data, run=run, **{**SMALL, **settings}))
    return run.budget.record(), found


@pytest.mark.parametrize("way", WAYS)
def test_all_that_runs_is_booked_and_belongs_to_a_goal(system: CausalLM, meter: list[int], way: str) -> None:
    used, found = spent(system, WAYS[way])
    assert 0 < sum(meter) <= used["tokens"]
    if way != "another model drafts":
        assert used["tokens"] <= 1.2 * sum(meter), (
            "prompts that share a beginning are booked whole, nothing else"
        )
    for unit in ("queries", "tokens"):
        assert used[unit] == sum(attempt.cost[unit] for attempt in found)


@pytest.mark.parametrize("joins", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_no_budget_is_exceeded(
    system: CausalLM, meter: list[int], monkeypatch: pytest.MonkeyPatch, way: str, joins: bool
) -> None:
    """Whether replies under way let goals join, let the search end, or neither."""
    monkeypatch.setattr(method.results, "succeeded", lambda *_: joins)
    whole, _ = spent(system, WAYS[way])
    num_done, refused = 0, list[str]()
    for unit in ("tokens", "queries"):
        for share in (0.35, 0.5, 0.65, 0.8, 0.95, 1.0):
            meter.clear()
            most = int(whole[unit] * share)
            try:
                used, found = spent(system, WAYS[way], **{unit: most})
            except ConfigError as error:
                refused.append(str(error))
                assert not meter, "said before anything runs"
                continue
            num_done += 1
            assert used[unit] <= most, (unit, share)
            assert sum(meter) <= most or unit == "queries"
            assert len(found) == (5 if WAYS[way].get("universal") else 2)
            assert used["stopped_by"] in ("", unit)
    assert num_done
    assert all("may not pay for trying a string on each goal" in text for text in refused)


def test_replies_under_way_are_queries(system: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(method.results, "succeeded", lambda *_: False)
    plain, _ = spent(system, {})
    looked, _ = spent(system, LOOKS)
    assert looked["queries"] == plain["queries"] + 2 * 4, "a reply each of four steps, on two goals"
    assert looked["tokens"] > plain["tokens"]


def test_a_search_ends_where_the_budget_does_not_pay_for_a_look(
    system: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps are paid, the reply behind them is not: the string found so far is tried all the same."""
    asked: list[int] = []
    monkeypatch.setattr(method, "_says", lambda *_: asked.append(1))
    one = {"universal": True, "progressive": False, "refill": True}
    plain, _ = spent(system, {"num_steps": 1, **one})
    found, (first, *_) = spent(system, {**LOOKS, **one}, queries=plain["queries"] + 1)
    assert first.detail["steps"] == 1
    assert (found["stopped_by"], asked) == ("queries", [])


def test_a_budget_that_cannot_try_each_goal_says_what_would_do(system: CausalLM) -> None:
    with pytest.raises(
        ConfigError, match=r"The budget of 3 queries .*gcg on 2 goals.*Raise it to 4 at least"
    ):
        spent(system, {}, queries=3)
    assert spent(system, {}, queries=4)[0]["queries"] == 4
    with pytest.raises(ConfigError, match=r"The budget of 5 queries .*gcg on 5 goals"):
        spent(system, {"universal": True}, queries=5)
    with pytest.raises(ConfigError, match=r"The budget of 9 tokens"):
        spent(system, {"search": "none"}, tokens=9)


def test_most_scored_is_what_probe_sampling_takes_at_worst() -> None:
    for num in (1, 5, 16, 33, 512):
        for reduction in (0.5, 1.0, 8.0, 600.0):
            seen: list[int] = []

            def score(rows: Tensor, seen: list[int] = seen) -> Scores:
                seen.extend(rows[:, 0].tolist())
                return Scores(rows[:, 0].float(), torch.zeros(len(rows), dtype=torch.bool))

            def against(rows: Tensor) -> Tensor:
                return -rows[:, 0].float()

            draws = torch.Generator().manual_seed(0)
            probe_sample(torch.arange(num)[:, None], score, against, draws, reduction)
            assert len(seen) <= most_scored(num, reduction) <= num


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("weight", [0.0, 0.5])
@pytest.mark.parametrize("name", ["tiny:llama", "tiny:gpt2"])
def test_most_tokens_bounds_a_first_and_a_later_call(name: str, weight: float, reuse: bool) -> None:
    prompt = method.prepare(load_base(name), DATA["goals"][:1], Config())[0].prompt
    scorer = SlotScorer(prompt, SlotLoss(control_weight=weight), Run(), reuse_prefix=reuse)
    current = torch.tensor([40, 41, 42])
    rows = torch.cat([current.repeat(9, 1), torch.randint(40, 90, (9, 3))])
    for _ in range(3):
        most, before = scorer.most_tokens(len(rows), 3), scorer.tokens
        scorer.losses(rows, current.tolist())
        assert 0 < scorer.tokens - before <= most
