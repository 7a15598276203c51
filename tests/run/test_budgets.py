"""Budgets of opponents: how they are written, that each of the four stops an attack, and what is recorded."""

import pytest

from temper.core.budget import Budget
from temper.core.errors import ConfigError
from temper.core.types import Attempt, Run
from temper.run.attack_rows import paid_attempts
from temper.run.budgets import parse_budget
from temper.run.execute import run_recipe
from temper.run.verbs import attack, fit

ROWS = "builtin:people:forget"
FAST = {"mode": "lora", "rank": 2, "batch_rows": 2, "num_steps": 6}
SEARCH = {"suffix_tokens": 3, "num_steps": 4, "num_candidates": 5, "topk": 8, "reply_tokens": 2}


def test_a_list_is_gone_through_and_single_limits_hold_for_all():
    assert parse_budget({"num_steps": [5, 20], "seconds": 60}, "here") == (
        ({"num_steps": 5}, {"num_steps": 20}),
        {"seconds": 60},
    )
    assert parse_budget({"tokens": [100]}, "here") == (({"tokens": 100},), {})
    assert parse_budget(None, "here") == ((), {})


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([5], "not a mapping"),
        ({"num_steps": [5], "bits": [4]}, "one setting"),
        ({"num_steps": 5}, "no unit"),
        ({"seconds": 0}, "above 0"),
        ({"queries": "many"}, "above 0"),
        ({"tokens": [0]}, "above 0"),
        ({"num_steps": []}, "empty"),
    ],
)
def test_what_is_no_budget_is_refused(raw, message):
    with pytest.raises(ConfigError, match=message):
        parse_budget(raw, "here")


def test_a_step_that_would_cost_too_much_is_not_begun():
    budget = Budget({"queries": 10})
    assert budget.allows(queries=10, steps=99)
    budget.spend(queries=6)
    assert not budget.allows(queries=5)
    assert budget.stopped_by == "queries"
    assert budget.allows(queries=4)
    assert budget.record()["queries"] == 6


def test_what_one_job_leaves_goes_to_the_others():
    budget = Budget({"queries": 12})
    budget.share(3)
    assert not budget.allows(queries=5)
    budget.spend(queries=2)
    budget.share(2)
    assert budget.allows(queries=5)
    assert not budget.allows(queries=6)


@pytest.mark.parametrize(("unit", "most", "steps"), [("steps", 3, 3), ("queries", 5, 2), ("seconds", 1e9, 6)])
def test_fine_tuning_stops_with_what_it_has(unit, most, steps):
    run = Run(budget=Budget({unit: most}))
    fit("tampering", "tiny:llama", ROWS, run=run, **FAST)
    used = run.budget.record()
    assert used["steps"] == steps
    assert used["queries"] == 2 * steps
    assert used["stopped_by"] == (unit if steps < 6 else "")


def test_tokens_end_fine_tuning_too():
    whole = Run()
    fit("tampering", "tiny:llama", ROWS, run=whole, **FAST)
    most = whole.budget.record()["tokens"] // 2
    run = Run(budget=Budget({"tokens": most}))
    fit("tampering", "tiny:llama", ROWS, run=run, **FAST)
    used = run.budget.record()
    assert 0 < used["tokens"] <= most
    assert 0 < used["steps"] < 6
    assert used["stopped_by"] == "tokens"


@pytest.mark.parametrize("limits", [{"tokens": 1}, {"seconds": 1e-9}, {"queries": 1}])
def test_fine_tuning_that_cannot_afford_one_step_says_so(limits):
    with pytest.raises(ConfigError, match="does not pay for one step"):
        fit("tampering", "tiny:llama", ROWS, run=Run(budget=Budget(limits)), **FAST)


@pytest.mark.parametrize(
    ("limits", "steps"),
    [({}, [4, 4]), ({"steps": 3}, [1, 2]), ({"queries": 24}, [2, 2]), ({"seconds": 1e-9}, [0, 0])],
)
def test_a_search_stops_in_time_and_its_string_is_tried_all_the_same(limits, steps):
    run = Run(budget=Budget(limits))
    found = list(attack("gcg", "tiny:llama", goals(), run=run, **SEARCH))
    assert [attempt.detail["steps"] for attempt in found] == steps
    used = run.budget.record()
    assert used["steps"] == sum(steps)
    assert used["queries"] == sum(attempt.cost["queries"] for attempt in found)
    assert used["tokens"] == sum(attempt.cost["tokens"] for attempt in found)
    assert used["queries"] <= limits.get("queries", 1e9)
    assert used["stopped_by"] == next(iter(limits), "")


def test_tokens_end_a_search_before_they_run_out():
    whole = Run()
    list(attack("gcg", "tiny:llama", goals(), run=whole, **SEARCH))
    most = whole.budget.record()["tokens"] * 0.7
    run = Run(budget=Budget({"tokens": most}))
    found = list(attack("gcg", "tiny:llama", goals(), run=run, **SEARCH))
    assert len(found) == 2
    assert 0 < run.budget.record()["tokens"] <= most
    assert run.budget.record()["steps"] < 8


def goals():
    from temper.data.loading import load_data

    return load_data("builtin:behaviours:neutral", {"goals": "Behaviour"}, limit=2)


def test_an_attack_that_books_nothing_is_stopped_behind_the_attempt_that_went_too_far():
    def attempts():
        for n in range(9):
            cost = {"queries": 3, "wall_s": 1.0}
            yield Attempt(goal=str(n), attack="a", input="", reply="", success=False, cost=cost)

    budget = Budget({"queries": 7})
    assert len(list(paid_attempts(attempts(), budget))) == 3
    assert budget.record()["queries"] == 9
    assert budget.record()["stopped_by"] == "queries"


def test_what_a_method_that_books_has_found_is_kept_whole():
    """One search for all goals: everything is paid when the first attempt comes."""
    budget = Budget({"queries": 7})

    def attempts():
        budget.spend(queries=7)
        for n in range(3):
            yield Attempt(goal=str(n), attack="a", input="", reply="", success=False, cost={"queries": 7})

    assert len(list(paid_attempts(attempts(), budget))) == 3
    assert budget.record()["queries"] == 7


RECIPE = f"""
system: tiny:llama
limit: 3
options: {{batch_tokens: 512}}
steps:
  - id: forget
    fit: npo
    data: {ROWS}
    settings: {{loss: ga, mode: lora, rank: 2, batch_rows: 3, num_epochs: 1, min_steps: 0, watch_every: 0, lr: 0.01}}
    against:
      - {{id: relearn, fit: tampering, data: "{ROWS}", settings: {{batch_rows: 1, rank: 2}}, budget: {{steps: [1, 2], seconds: 600}}}}
      - {{attack: gcg, data: "builtin:behaviours:neutral", limit: 1, budget: {{queries: 12}},
         settings: {{suffix_tokens: 3, num_steps: 5, num_candidates: 4, topk: 4, reply_tokens: 2}}}}
  - {{id: score, measure: npo, system: base+forget, data: builtin:people, settings: {{reply_tokens: 0, max_rows: 2}}}}
"""


def test_both_twins_get_the_same_and_what_they_used_is_kept(tmp_path):
    path = tmp_path / "hold.yaml"
    path.write_text(RECIPE)
    result = run_recipe(str(path), out=str(tmp_path / "runs"))
    done = {step.id: result.folder.step(step.name).done() for step in result.plan.steps}
    for end in ("", "-plain"):
        for steps in (1, 2):
            attacked = done[f"forget-relearn-{steps}{end}"]
            assert attacked["limits"] == {"steps": steps, "seconds": 600}
            assert attacked["used"]["steps"] == attacked["used"]["queries"] == steps
            assert attacked["used"]["stopped_by"] == "steps"
            assert attacked["used"]["tokens"] > 0
        searched = done[f"forget-gcg{end}"]
        assert searched["limits"] == {"queries": 12}
        assert searched["used"]["queries"] <= 12
        assert 0 < searched["used"]["steps"] < 5
    assert done["score"]["limits"] == {}
