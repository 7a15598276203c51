"""Settings that name an earlier step get what it left."""

import pytest

from temper.core.errors import ConfigError
from temper.run.execute import run_recipe
from temper.run.plan import Request, make_plan

RECIPE = """
system: tiny:llama
data: builtin:people
limit: 3
steps:
  - {id: kept, measure: npo, settings: {reply_tokens: 0}}
  - {id: score, measure: npo, settings: {reply_tokens: 0, reference: "step:kept"}}
"""


def test_a_measure_reads_the_rows_of_an_earlier_one(tmp_path):
    path = tmp_path / "two.yaml"
    path.write_text(RECIPE)
    result = run_recipe(str(path), out=str(tmp_path / "runs"))
    rows = [row for row in result.folder.rows() if row.metric == "forget_quality"]
    assert [row.value for row in rows] == [None, 1.0]
    path.write_text(
        RECIPE.replace("settings: {reply_tokens: 0}}", "settings: {reply_tokens: 0, max_rows: 2}}")
    )
    before, after = result.plan.steps[1], make_plan(Request(source=str(path), out=str(tmp_path))).steps[1]
    assert before.config == after.config
    assert before.hash != after.hash
    path.write_text(RECIPE.replace("step:kept", "step:kep"))
    with pytest.raises(ConfigError, match="no earlier step"):
        make_plan(Request(source=str(path)))
