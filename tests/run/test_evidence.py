from __future__ import annotations

import pytest
from fakes import METHODS

from temper.core.errors import ConfigError, DataError, StoreError
from temper.core.types import Attempt, Row
from temper.run.attack_rows import attack_rows
from temper.run.compare import compare_runs
from temper.run.evidence import append_evidence, check_evidence, evidence_rows, findings
from temper.run.execute import run_recipe
from temper.run.plan import Request, make_plan
from temper.store import lines
from temper.store.folders import RunFolder
from temper.store.records import row_record

assert "fake_measure" in METHODS


def test_evidence_is_appended_once_and_gives_verdicts(methods):
    result = run_recipe("fake-measure", recipe="small", seeds=(0, 1, 2))
    assert append_evidence(result) == result.num_rows == 42
    assert append_evidence(result) == 0
    bigger, above = findings("fake-measure")
    assert (bigger.verdict, bigger.pairing, bigger.n) == ("shown", "items", 6)
    assert (above.verdict, above.pairing, above.n) == ("contradicted", "seeds", 3)
    assert bigger.difference == pytest.approx(4)


def test_findings_from_the_cache_equal_those_computed(methods, monkeypatch):
    append_evidence(run_recipe("fake-measure", recipe="small", seeds=(0, 1)))
    first = findings("fake-measure")
    assert findings("fake-measure") == first
    monkeypatch.setenv("TEMPER_NO_CACHE", "1")
    assert findings("fake-measure") == first


def test_a_rerun_with_other_settings_replaces_the_arm(methods):
    append_evidence(run_recipe("fake-measure", recipe="small", seeds=(0, 1)))
    path = methods / "fakes" / "fake_measure" / "recipes.yaml"
    path.write_text(path.read_text().replace("scale: 5", "scale: 7"))
    append_evidence(run_recipe("fake-measure", recipe="small", seeds=(0,), arms=("big",)))
    rows = evidence_rows("fake-measure")
    assert {r.facts["seed"] for r in rows if r.arm == "big"} == {0}
    assert {r.facts["seed"] for r in rows if r.arm == "plain"} == {0, 1}
    assert findings("fake-measure")[0].difference == pytest.approx(6, abs=0.1)


def test_rows_by_item_are_slim_but_the_first_has_all_facts(methods):
    append_evidence(run_recipe("fake-measure", recipe="small", seeds=(0,)))
    records = list(lines.read(methods / "fakes" / "fake_measure" / "evidence.jsonl"))
    assert "code" in records[0]["facts"]
    assert "code" not in records[1]["facts"]
    assert "code" in next(r for r in records if r["metric"] == "mean_score")["facts"]


def test_damaged_evidence_is_an_error(methods):
    append_evidence(run_recipe("fake-measure", recipe="small", seeds=(0, 1)))
    path = methods / "fakes" / "fake_measure" / "evidence.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"value":', b'"value": ', 1))
    with pytest.raises(StoreError, match="line 1"):
        findings("fake-measure")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": "tiny"}, "small recipe"),
        ({"sets": ("scale=2",)}, "--set"),
        ({"verb": "measure"}, "small recipe"),
    ],
)
def test_evidence_takes_the_small_recipe_as_it_stands(methods, changes, message):
    plan = make_plan(Request(source="fake-measure", **changes))
    if "verb" in changes:
        pytest.skip("a verb alone runs the defaults, which have no arms") if not plan.pipeline.arms else None
    with pytest.raises(ConfigError, match=message):
        check_evidence(plan)


def test_a_claim_must_name_an_arm_of_the_recipe(methods):
    path = methods / "fakes" / "fake_measure" / "recipes.yaml"
    path.write_text(path.read_text().replace("plain: {}", "other: {}"))
    with pytest.raises(ConfigError, match="arm 'plain'"):
        check_evidence(make_plan(Request(source="fake-measure")))


def write_run(out, values, seeds=(0,)):
    run = RunFolder.create(out, "m", {})
    rows = [
        Row(metric=metric, value=v, item=f"i{n}", facts={"seed": s, "step": "t"})
        for metric, found in values.items() for s in seeds for n, v in enumerate(found)
    ]  # fmt: skip
    lines.append(run.path / "rows.jsonl", [row_record(row) for row in rows])
    return run


def test_compare_pairs_by_item_and_corrects(tmp_path):
    a = write_run(tmp_path, {"x": [0.0] * 20, "y": [float(n % 5) for n in range(20)]}, seeds=(0, 1))
    b = write_run(
        tmp_path, {"x": [1.0 + n % 3 for n in range(20)], "y": [float(n % 5) + (-1) ** n for n in range(20)]}
    )
    found = {item.metric: item for item in compare_runs(a, b)}
    x, y = found["x"], found["y"]
    assert (x.n, x.pairing, x.verdict) == (20, "items", "higher")
    assert x.difference == pytest.approx(1.95)
    assert x.low < 1.95 < x.high
    assert (y.verdict, y.difference) == ("no difference seen", 0.0)
    assert y.needed is None
    backwards = {item.metric: item for item in compare_runs(b, a)}
    assert backwards["x"].difference == pytest.approx(-1.95)
    assert backwards["x"].verdict == "lower"


def test_needed_items_by_hand(tmp_path):
    # Differences alternate 0.5 + 1, 0.5 - 1: mean 0.5, sd 1.0260 (n = 20); ((1.96 + 0.8416) 1.026 / 0.5)^2 = 33.05.
    a = write_run(tmp_path, {"x": [0.0] * 20})
    b = write_run(tmp_path, {"x": [0.5 + (-1) ** n for n in range(20)]})
    (found,) = compare_runs(a, b)
    assert found.needed in (32, 33, 34)
    assert found.verdict == "no difference seen"


def test_runs_without_a_common_metric_are_refused(tmp_path):
    with pytest.raises(DataError, match="no metric in common"):
        compare_runs(write_run(tmp_path, {"x": [1.0]}), write_run(tmp_path, {"y": [1.0]}))


def attempt(goal, success, **changes):
    return Attempt(goal=goal, attack="a", input="", reply="", success=success, **({"cost": {}} | changes))


def test_attack_rows_by_hand():
    attempts = [
        attempt("g1", False, cost={"queries": 2, "wall_s": 9.0}, detail={"loss": 2.0, "ok": True}),
        attempt("g1", True, cost={"queries": 3}, detail={"loss": 1.0, "bad": float("nan")}),
        attempt("g2", False),
        attempt("g3", None),
    ]
    found = list(attack_rows(attempts))
    by = {(row.metric, row.item): row for row in found}
    assert [by["attack_success", g].value for g in ("g1", "g2", "g3")] == [1.0, 0.0, None]
    assert by["queries", "g1"].value == 5.0
    assert by["loss", "g1"].value == 1.5
    assert not {row.metric for row in found} & {"wall_s", "ok", "bad"}
    rate = by["attack_success_rate", None]
    assert (rate.value, rate.n, rate.note) == (0.5, 2, "1 of 3 goals unscored")
    # Wilson for 1 of 2.
    assert (rate.low, rate.high) == pytest.approx((0.0945, 0.9055), abs=1e-4)


def test_no_attempts_give_no_rate():
    (row,) = attack_rows([])
    assert (row.value, row.n) == (None, 0)
