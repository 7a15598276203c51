"""The rules of a step by hand: what is kept, annealed and probed, and the losses beside the target's."""

from __future__ import annotations

import pytest
import torch

from temper.data.schemas import Behaviour
from temper.methods.attacks.gcg.conftest import GOALS, run_on, search_of
from temper.methods.attacks.gcg.probe import agreement, probe_sample
from temper.methods.attacks.gcg.steps import Best, takes_worse
from temper.ops.search_losses import Scores
from temper.systems.causal_lm import CausalLM


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
