"""Training that was stopped before its end: the fit says so in its folder, its rows and the ranking repeat it."""

import pytest

from temper.cli.run import _show_ranking
from temper.core.types import Row
from temper.ops.endings import ended_early, keep_ending
from temper.report.page import render_report
from temper.run.execute import run_recipe
from temper.run.ranking import Column, rank_arms, rank_lines, stops_note

RECIPE = """
system: tiny:llama
data: {forget: "builtin:people:forget"}
limit: 4
steps:
  - {id: forget, fit: npo, settings: {loss: ga, mode: full, lr: 0.01, min_steps: 0, watch_every: 0, num_epochs: 2}}
  - {id: score, measure: npo, system: base+forget, settings: {reply_tokens: 0}}
arms:
  broken: {forget: {settings: {num_epochs: 40, max_forget_nll: 8.0}}}
  whole: {}
rank:
  - {metric: forget_probability}
"""


def row(arm, value, seed=0, **facts):
    return Row(metric="kept", value=value, arm=arm, higher_is_better=True, facts={"seed": seed, **facts})


def test_what_diverged_is_marked_where_arms_are_ranked(tmp_path, capsys):
    path = tmp_path / "two.yaml"
    path.write_text(RECIPE)
    result = run_recipe(str(path), out=str(tmp_path / "runs"))
    rows = list(result.folder.rows())
    (ended,) = {str(row.facts["ended"]) for row in rows if row.arm == "broken"}
    assert not any("ended" in row.facts for row in rows if row.arm == "whole")
    (left,) = [step.id for step in result.plan.steps if ended_early({"": result.folder.step(step.name).path})]
    step = next(row for row in rows if row.arm == "broken").facts["ended"][left]["step"]
    assert 0 < step < 40
    assert "the loss diverged" in ended
    note = f"† Training was stopped before its end: broken (forget at step {step}: the loss diverged)."
    _show_ranking(rows, result.plan.pipeline.rank)
    said = capsys.readouterr().out
    assert "broken †" in said
    assert "whole †" not in said
    assert note in said.splitlines()
    page = render_report(result.folder.path)
    assert '<th scope="row">broken †</th>' in page
    assert '<th scope="row">whole</th>' in page
    assert f'<p class="quiet">{note}</p>' in page


def test_any_fit_may_say_so_and_each_seed_has_its_step():
    ended = [{"ended": {"defend": {"step": step, "why": "time was up"}}} for step in (7, 9)]
    rows = [
        row("a", 1.0, 0, **ended[0]),
        row("a", 1.0, 1, **ended[1]),
        row("a", 1.0, 2, **ended[0]),
        row("b", 2.0),
    ]
    found = rank_arms(rows, [Column(metric="kept", name="kept")])
    assert [line[1] for line in rank_lines(found)] == ["arm", "b", "a †"]
    assert stops_note(found).endswith("end: a (defend at step 7, 9: time was up).")
    assert stops_note(rank_arms([row("a", 1.0), row("b", 2.0)], found.columns)) == ""


@pytest.mark.parametrize("folder", [None, "step"])
def test_an_ending_is_kept_beside_what_was_left(folder, tmp_path):
    keep_ending(tmp_path / folder if folder else None, 3, "the loss diverged")
    kept = {"forget": {"step": 3, "why": "the loss diverged"}}
    assert ended_early({"forget": tmp_path / "step"}) == (kept if folder else {})
