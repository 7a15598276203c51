"""Opponents of a fit: the steps they become, equal budgets for the plain twin, and what rows say of them."""

import json

import pytest

from temper.core.errors import ConfigError
from temper.report.against import attack_curves, attack_maps, bills
from temper.report.page import render_report
from temper.run.against import with_opponents
from temper.run.execute import run_recipe
from temper.run.recipe import load_recipe, parse_recipe
from temper.store import lines

RECIPE = """
system: tiny:llama
limit: 3
options: {batch_tokens: 512}
steps:
  - id: forget
    fit: npo
    data: builtin:people:forget
    settings: {loss: ga, mode: lora, rank: 2, batch_rows: 3, num_epochs: 1, min_steps: 0, watch_every: 0, lr: 0.01}
    against:
      - {id: relearn, fit: tampering, data: builtin:people:forget, settings: {batch_rows: 2, rank: 2}, budget: {num_steps: [1, 2]}}
      - {id: 4-bit, fit: tampering, settings: {how: quantise}}
      - {id: prefill, fit: tampering, data: builtin:people:forget, settings: {how: prefill, known_tokens: 3}}
      - {attack: gcg, data: builtin:behaviours:neutral, limit: 1,
         settings: {suffix_tokens: 3, num_steps: 1, num_candidates: 4, topk: 4, reply_tokens: 2}}
  - {id: other, measure: npo, data: builtin:people, settings: {reply_tokens: 0, max_rows: 3}}
  - {id: score, measure: npo, system: base+forget, data: builtin:people, settings: {reply_tokens: 0, max_rows: 3}}
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "hold.yaml"
    path.write_text(RECIPE)
    return path


def test_every_attack_has_a_plain_twin_with_the_same_budget(recipe):
    steps = {step.id: step for step in with_opponents(load_recipe(str(recipe)).steps, "here")}
    assert list(steps)[:3] == ["forget", "other", "score"]
    assert steps["score-plain"].system == "base"
    for name, system in (("forget-relearn-2", "base+forget"), ("forget-relearn-2-plain", "base")):
        assert steps[name].system == system
        assert steps[name].settings["num_steps"] == 2
        assert steps[name].data == "builtin:people:forget"
        assert steps[f"score-{name}"].system == f"{system}+{name}"
    assert steps["score-forget-4-bit-plain"].label == {
        "against": {"opponent": "4-bit", "budget": {}, "defended": False, "look": "score"}
    }
    assert [steps[f"forget-gcg{end}"].system for end in ("", "-plain")] == ["base+forget", "base"]
    assert len(steps) == 3 + 1 + 4 * 4 + 2


def test_the_run_attacks_both_and_says_so_in_its_rows(recipe, tmp_path):
    result = run_recipe(str(recipe), out=str(tmp_path / "runs"))
    rows = list(lines.read(result.folder.path / "rows.jsonl"))
    seen = {json.dumps(row["facts"].get("against"), sort_keys=True) for row in rows}
    assert len(seen) == 1 + 1 + 4 * 2 + 2

    def forget(opponent, defended, **budget):
        wanted = {"opponent": opponent, "budget": budget, "defended": defended, "look": "score", "arm": ""}
        found = [r for r in rows if r["metric"] == "forget_probability" and not r.get("item")]
        found = [r for r in found if r["facts"].get("against") == wanted]
        return [row["value"] for row in found]

    assert forget("relearn", True, num_steps=2)
    assert forget("relearn", True, num_steps=2) != forget("relearn", False, num_steps=2)
    maps = {found.metric: found for found in attack_maps(list(result.folder.rows()))}
    assert maps["attack_success_rate"].groups == ["gcg"]
    chosen = maps["forget_probability"]
    assert chosen.arms == ["fitted", "plain"]
    assert chosen.groups == ["none", "relearn num_steps 1", "relearn num_steps 2", "4-bit", "prefill"]
    assert all(cell is not None and cell.low is not None for line in chosen.cells for cell in line)
    assert chosen.cells[0][4] != chosen.cells[0][0]
    curve = attack_curves(list(result.folder.rows()))["forget_probability under relearn"]
    assert curve["x"] == "num_steps"
    assert [line["x"] for line in curve["lines"].values()] == [[0.0, 1.0, 2.0]] * 2
    page = render_report(result.folder.path)
    assert "Under attack" in page
    assert "forget_probability under relearn" in page
    again = run_recipe(str(recipe), out=str(tmp_path / "runs"))
    assert set(again.outcomes.values()) == {"kept"}


def test_relearning_is_told_by_rows_that_it_was_not_trained_on(recipe, tmp_path):
    """A third of three rows is trained on: a mean over all would mostly say that training trains."""
    recipe.write_text(RECIPE.replace("{batch_rows: 2, rank: 2}", "{batch_rows: 2, rank: 2, share: 0.3}"))
    result = run_recipe(str(recipe), out=str(tmp_path / "runs"))
    rows = [row for row in result.folder.rows() if row.metric == "forget_probability"]

    def under(opponent):
        return [
            row
            for row in rows
            if row.facts.get("against", {}).get("opponent") == opponent
            and row.facts["against"]["defended"]
            and row.facts["against"]["budget"] in ({}, {"num_steps": 2})
        ]

    items = {row.item: row for row in under("relearn") if row.item}
    seen = [name for name, row in items.items() if row.group]
    (whole,) = [row for row in under("relearn") if not row.item and not row.group]
    assert (len(items), len(seen), whole.n) == (3, 1, 2)
    left = [row.value for name, row in items.items() if name not in seen]
    assert whole.value == pytest.approx(sum(left) / 2)
    assert "without the 1 rows that the attack was trained on" in whole.note
    assert all(not row.group for row in under("4-bit"))
    chosen = next(m for m in attack_maps(list(result.folder.rows())) if m.metric == "forget_probability")
    assert chosen.cells[0][chosen.groups.index("relearn num_steps 2")].value == pytest.approx(whole.value)


def test_a_step_of_the_users_may_not_take_a_name_that_against_makes(recipe):
    recipe.write_text(RECIPE.replace("id: other,", "id: score-plain,"))
    with pytest.raises(ConfigError, match="'score-plain' stands twice"):
        run_recipe(str(recipe))


def test_opponents_at_the_top_go_to_the_last_fit():
    steps = [{"id": "a", "fit": "npo"}, {"id": "b", "fit": "npo"}, {"measure": "npo", "system": "base+a+b"}]
    document = {"steps": steps, "against": [{"fit": "tampering"}]}
    parsed = parse_recipe(document, name="n", where="here").steps
    assert [len(step.against) for step in parsed] == [0, 1, 0]
    added = {step.id: step.system for step in with_opponents(parsed, "here")}
    assert added["npo-plain"] == "base+a"


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([{"fit": "npo", "against": [{"fit": "tampering"}]}], "nobody would see"),
        (
            [
                {"id": "a", "fit": "npo", "against": [{"fit": "tampering"}]},
                {"measure": "npo", "system": "base+a@0.5"},
            ],
            "nobody would see",
        ),
        ([{"measure": "npo", "against": [{"fit": "tampering"}]}], "stands at a fit"),
        ([{"fit": "npo", "against": {"fit": "tampering"}}], "not a list"),
        ([{"fit": "npo", "against": [{"data": "x.jsonl"}]}], "one verb"),
        ([{"fit": "npo", "against": [{"fit": "tampering"}, {"fit": "tampering"}]}], "stands twice"),
        (
            [{"fit": "npo", "against": [{"fit": "tampering", "budget": {"bits": [4], "lr": [1]}}]}],
            "one setting",
        ),
        ([{"fit": "npo", "against": [{"fit": "tampering", "steps": 3}]}], "Unknown key"),
    ],
)
def test_what_cannot_be_meant_is_refused(steps, message):
    with pytest.raises(ConfigError, match=message):
        with_opponents(parse_recipe({"steps": steps}, name="n", where="here").steps, "here")


DEFENCES = """
system: tiny:llama
limit: 3
options: {batch_tokens: 512}
steps:
  - id: forget
    fit: npo
    data: builtin:people:forget
    settings: {loss: ga, mode: lora, rank: 2, batch_rows: 3, num_epochs: 1, min_steps: 0, watch_every: 0, lr: 0.01}
    against:
      - {id: 4-bit, fit: tampering, settings: {how: quantise}}
  - {id: score, measure: npo, system: base+forget, data: "builtin:people:forget", settings: {reply_tokens: 0}}
arms:
  ga: {}
"""


RANK = """
rank:
  - {metric: forget_probability, as: forgotten, step: score}
  - {metric: forget_probability, as: stored, step: score, under: 4-bit}
"""


def test_arms_are_the_columns_of_one_map_and_missing_cells_run_on_re_run(tmp_path):
    path, out = tmp_path / "hold.yaml", str(tmp_path / "runs")
    path.write_text(DEFENCES)
    assert set(run_recipe(str(path), out=out).outcomes.values()) == {"ran"}
    opponent = "      - {id: 4-bit, fit: tampering, settings: {how: quantise}}\n"
    prune = opponent.replace("4-bit", "prune").replace("quantise", "prune")
    path.write_text(
        DEFENCES.replace(opponent, opponent + prune) + "  npo: {forget: {settings: {loss: npo}}}\n"
    )
    path.write_text(path.read_text() + RANK)
    result = run_recipe(str(path), out=out)
    names = {step.name: step.id for step in result.plan.steps}
    known = {"forget", "forget-4-bit", "forget-4-bit-plain", "score", "score-plain"}
    known |= {"score-forget-4-bit", "score-forget-4-bit-plain"}
    reused = [names[name] for name, outcome in result.outcomes.items() if outcome == "reused"]
    assert sorted(reused) == sorted(known)
    ran = [names[name] for name, outcome in result.outcomes.items() if outcome == "ran"]
    assert ran.count("forget") == ran.count("forget-4-bit") == 1
    assert ran.count("forget-prune") == 2
    assert ran.count("forget-prune-plain") == 1
    rows = list(result.folder.rows())
    chosen = next(found for found in attack_maps(rows) if found.metric == "forget_probability")
    assert chosen.arms == ["ga", "npo", "plain"]
    assert chosen.groups == ["none", "4-bit", "prune"]
    assert all(cell is not None and cell.low is not None for line in chosen.cells for cell in line)
    page = render_report(result.folder.path)
    assert '<th scope="col">npo</th><th scope="col">plain</th>' in page
    assert "Budgets of the attacks" in page
    assert '<th scope="col">forgotten</th><th scope="col">stored</th>' in page
    assert "Holm-corrected over 2 tests" in page
    path.write_text(path.read_text().replace("as: stored", "as: rounded"))
    assert set(run_recipe(str(path), out=out).outcomes.values()) == {"kept"}
    assert "rounded" in render_report(result.folder.path)
    (found,) = [bill for bill in bills_of(result) if bill.attack == "4-bit"]
    assert found.limits == "none"
    assert "seconds" in found.fitted


def bills_of(result):
    return bills((step.label, result.folder.step(step.name).done()) for step in result.plan.steps)


def test_choices_of_a_matrix_are_columns_too(tmp_path):
    path = tmp_path / "hold.yaml"
    path.write_text(DEFENCES + "matrix: {seed: [0, 1], forget.beta: [0.1, 0.5], forget.loss: [npo]}\n")
    result = run_recipe(str(path), out=str(tmp_path / "runs"))
    chosen = next(m for m in attack_maps(list(result.folder.rows())) if m.metric == "forget_probability")
    assert chosen.arms == [f"ga, forget.beta {beta}, forget.loss npo" for beta in (0.1, 0.5)] + ["plain"]
    assert [cell.num_seeds for line in chosen.cells for cell in line] == [2] * 6


def test_a_plain_system_of_each_arms_own_stays_with_its_arm(tmp_path):
    path = tmp_path / "hold.yaml"
    text = DEFENCES.replace("steps:\n", "steps:\n  - {id: first, fit: tampering, settings: {how: prune}}\n")
    text = text.replace(
        "data: builtin:people:forget\n    settings: {loss",
        "system: base+first\n    data: builtin:people:forget\n    settings: {loss",
    )
    text = text.replace("system: base+forget", "system: base+first+forget")
    path.write_text(text + "  more: {first: {settings: {sparsity: 0.5}}}\n")
    result = run_recipe(str(path), out=str(tmp_path / "runs"))
    chosen = next(m for m in attack_maps(list(result.folder.rows())) if m.metric == "forget_probability")
    assert sorted(chosen.arms) == ["ga", "ga, plain", "more", "more, plain"]


def test_bills_say_what_ended_an_attack():
    def step(seconds, stopped, defended):
        used = {"queries": 4, "steps": 2, "tokens": 1200, "seconds": seconds, "stopped_by": stopped}
        label = {"opponent": "a", "budget": {"steps": 2}, "defended": defended, "look": ""}
        return {"against": label}, {"used": used, "limits": {"steps": 2}}

    steps = [
        step(1.0, "steps", True),
        step(2.5, "", True),
        step(3.0, "", False),
        ({}, {}),
        ({"against": {}}, {}),
    ]
    (found,) = bills(steps)
    assert found.attack == "a steps 2"
    assert found.limits == "2 steps"
    assert found.fitted == "4 queries, 2 steps, 1,200 tokens, 1.0 to 2.5 seconds; stopped by its steps"
    assert found.plain == "4 queries, 2 steps, 1,200 tokens, 3.0 seconds"
