"""A hardened model under its opponents: strings searched by gcg within a budget, and begun replies."""

from temper.report.against import attack_maps
from temper.report.page import render_report
from temper.run.execute import run_recipe

RECIPE = """
system: tiny:llama
steps:
  - {id: words, make: continuous-at, settings: {num_prompts: 9, num_requests: 10}}
  - id: harden
    fit: continuous-at
    data: words
    settings: {rank: 2, lr: 1e-2, attack_steps: 2, attack_lr: 1e-2, batch_rows: 3, utility_rows: 1, num_epochs: 1}
    against:
      - attack: gcg
        data: {goals: words}
        limit: 2
        settings: {suffix_tokens: 3, num_steps: 9, num_candidates: 4, topk: 8, reply_tokens: 2}
        budget: {queries: [20, 40]}
      - {id: prefill, fit: tampering, settings: {how: prefill, opening: "Sure:"}}
  - {id: test, measure: continuous-at, data: words, system: base+harden, settings: {attack_steps: 2, reply_tokens: 4}}
"""


def test_a_hardened_model_and_its_plain_twin_meet_the_same_search(tmp_path):
    path = tmp_path / "harden.yaml"
    path.write_text(RECIPE)
    result = run_recipe(str(path), out=str(tmp_path / "runs"))
    rows = list(result.folder.rows())
    maps = {found.metric: found for found in attack_maps(rows)}
    searched = maps["best_loss"]
    assert searched.arms == ["fitted", "plain"]
    assert searched.groups == ["gcg queries 20", "gcg queries 40"]
    assert all(cell is not None and cell.value is not None for line in searched.cells for cell in line)
    assert searched.cells[0] != searched.cells[1]
    begun = [found for found in maps.values() if found.groups == ["none", "prefill"]]
    assert begun
    done = {step.id: result.folder.step(step.name).done()["used"] for step in result.plan.steps}
    for end in ("", "-plain"):
        few, more = done[f"harden-gcg-20{end}"], done[f"harden-gcg-40{end}"]
        assert 0 < few["queries"] <= 20 < more["queries"] <= 40
        assert few["stopped_by"] == more["stopped_by"] == "queries"
    page = render_report(result.folder.path)
    assert "best_loss under gcg" in page
