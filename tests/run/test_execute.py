from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from fakes import write_methods

from temper.core.errors import ConfigError, DataError, NeedsError, StoreError
from temper.run.execute import run_recipe
from temper.run.plan import Request, make_plan
from temper.store import lines
from temper.store.folders import run_folders
from temper.store.records import stable


def rows(result):
    return [stable(record) for record in lines.read(result.folder.path / "rows.jsonl")]


def test_a_pipeline_runs_and_every_row_has_its_facts(pipeline):
    result = run_recipe(pipeline)
    found = list(result.folder.rows())
    assert result.num_rows == len(found) == 136
    assert {(row.arm, row.facts["seed"]) for row in found} == {(a, s) for a in ("one", "two") for s in (0, 1)}
    for row in found:
        needed = {
            "method",
            "settings",
            "step_hash",
            "data",
            "seed",
            "device",
            "precision",
            "wall_s",
            "version",
            "code",
            "exact",
        }
        assert needed <= set(row.facts)
    record = result.folder.record()
    assert record["status"] == "done"
    settings = next(
        s for s in record["steps"].values() if s["id"] == "rows" and s["settings"]["scale"]["value"] == 2.0
    )
    assert settings["settings"]["scale"]["origin"] == "arm two"
    assert settings["settings"]["num_items"]["origin"] == "default"


def test_attempts_are_kept_and_judged_into_rows(pipeline):
    result = run_recipe(pipeline, seeds=(0,), arms=("one",))
    attempts = list(result.folder.attempts())
    assert [a.success for a in attempts] == [n % 2 == 0 for n in range(8)]
    rate = next(r for r in result.folder.rows() if r.metric == "attack_success_rate")
    assert (rate.value, rate.n) == (0.5, 8)
    queries = [r.value for r in result.folder.rows() if r.metric == "queries"]
    assert queries == [float(n + 1) for n in range(8)]


def test_the_same_command_again_runs_nothing(pipeline):
    said = []
    first = run_recipe(pipeline)
    again = run_recipe(pipeline, say=said.append)
    assert again.folder.path == first.folder.path
    assert "unchanged; nothing was run" in said[0]
    assert set(again.outcomes.values()) == {"kept"}


def test_unchanged_steps_are_taken_over_and_changed_ones_run(pipeline):
    first = run_recipe(pipeline)
    said = []
    second = run_recipe(pipeline, sets=("score.scale=3",), say=said.append)
    assert second.folder.path != first.folder.path
    by_id = {name.rpartition("-")[0]: outcome for name, outcome in second.outcomes.items()}
    assert by_id == {"rows": "reused", "sums": "reused", "score": "ran", "red": "reused"}
    assert any("sums: unchanged, taken from" in line for line in said)
    assert rows(first) != rows(second)


def test_a_changed_upstream_step_changes_every_step_below(pipeline):
    one = make_plan(Request(source=pipeline))
    two = make_plan(Request(source=pipeline, sets=("rows.num_items=4",)))
    same = {s.name for s in one.steps} & {s.name for s in two.steps}
    assert {name.rpartition("-")[0] for name in same} == {"red"}


def test_changed_code_is_run_again(pipeline, methods):
    before = {s.name for s in make_plan(Request(source=pipeline)).steps}
    (methods / "fakes" / "fake_attack" / "extra.py").write_text("X = 1\n")
    after = {s.name for s in make_plan(Request(source=pipeline)).steps}
    assert {name.rpartition("-")[0] for name in before - after} == {"red"}


def test_arms_that_do_not_differ_in_a_step_share_it(pipeline):
    plan = make_plan(Request(source=pipeline))
    assert [s.name for s in plan.cells[0].steps][-1] == [s.name for s in plan.cells[2].steps][-1]
    assert len(plan.steps) == 14


def test_a_different_seed_gives_other_numbers_and_the_same_seed_the_same(pipeline, tmp_path):
    result = run_recipe(pipeline)
    scores = {(r.facts["seed"], r.item): r.value for r in result.folder.rows() if r.metric == "score"}
    assert scores[0, "i0"] != scores[1, "i0"]
    again = run_recipe(pipeline, out="elsewhere")
    assert rows(again) == rows(result)


class StopError(Exception):
    """Raised in place of a kill."""


@pytest.mark.parametrize("stop_at", [1, 3, 6, 9])
def test_a_failed_run_says_so_and_resumes(pipeline, stop_at, monkeypatch):
    import temper.run.execute as execute

    whole = run_recipe(pipeline, out="whole")
    calls = []
    real = execute.run_step

    def failing(step, worker):
        calls.append(step.name)
        if len(calls) == stop_at:
            raise StopError("stopped")
        return real(step, worker)

    monkeypatch.setattr(execute, "run_step", failing)
    with pytest.raises(StopError):
        run_recipe(pipeline)
    (folder,) = run_folders(Path("runs"))
    assert folder.record()["status"] == "failed"
    assert "stopped" in folder.record()["error"]
    monkeypatch.setattr(execute, "run_step", real)
    resumed = run_recipe(pipeline, resume=True)
    assert resumed.folder.path == folder.path
    assert rows(resumed) == rows(whole)
    assert folder.record()["status"] == "done"
    assert folder.record()["error"] is None


def test_ctrl_c_is_noted(pipeline, monkeypatch):
    import temper.run.execute as execute

    def interrupted(step, worker):
        raise KeyboardInterrupt

    monkeypatch.setattr(execute, "run_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(pipeline)
    assert run_folders(Path("runs"))[0].record()["status"] == "interrupted"


def test_resume_without_anything_to_resume_is_refused(pipeline):
    with pytest.raises(ConfigError, match="no run to resume"):
        run_recipe(pipeline, resume=True)


def test_resuming_a_run_that_another_process_holds_is_refused(pipeline):
    result = run_recipe(pipeline)
    result.folder.update(status="running")
    with result.folder.lock():
        with pytest.raises(StoreError, match="In use by process"):
            run_recipe(pipeline, resume=True)
        other = run_recipe(pipeline)  # without --resume it gets a folder of its own
    assert other.folder.path != result.folder.path
    assert set(other.outcomes.values()) == {"reused"}


def test_a_damaged_finished_step_stops_a_resume(pipeline):
    result = run_recipe(pipeline)
    result.folder.update(status="running")
    step = next(s for s in result.folder.steps() if s.rows_file.exists())
    step.rows_file.write_bytes(step.rows_file.read_bytes()[:-5])
    with pytest.raises(StoreError, match="missing or changed"):
        run_recipe(pipeline)


def test_a_damaged_earlier_step_is_computed_again(pipeline):
    result = run_recipe(pipeline)
    for step in result.folder.steps():
        if (step.artefact / "artefact.json").exists():
            (step.artefact / "artefact.json").unlink()
    said = []
    other = run_recipe(pipeline, sets=("score.scale=3",), say=said.append)
    by_id = {name.rpartition("-")[0]: outcome for name, outcome in other.outcomes.items()}
    assert by_id["sums"] == "ran"
    assert any("not taken from" in line for line in said)


def test_rows_edited_by_hand_are_noticed(pipeline):
    result = run_recipe(pipeline)
    path = result.folder.path / "rows.jsonl"
    records = list(lines.read(path))
    path.unlink()
    lines.append(path, [records[0] | {"value": 9.0}, *records[1:]])
    result.folder.update(status="running")
    with pytest.raises(StoreError, match="line 1"):
        run_recipe(pipeline)


def test_own_data_without_a_recipe_uses_the_defaults(methods, tmp_path):
    (tmp_path / "my.jsonl").write_text('{"text": "1.5"}\n{"text": "2"}\n')
    result = run_recipe("fake-fit", data="my.jsonl", sets=("scale=2",))
    (step,) = result.folder.steps()
    assert json.loads((step.artefact / "artefact.json").read_text()) == [3.0, 4.0]
    by_part = run_recipe("fake-fit", data={"train": "my.jsonl"}, sets=("scale=2",))
    assert set(by_part.outcomes.values()) == {"reused"} or by_part.folder.path == result.folder.path


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "empty|no rows"), ('{"txt": "1"}\n', "text"), ('{"text": \n', "Not valid JSON")],
)
def test_bad_data_stops_before_a_folder_is_made(methods, tmp_path, content, message):
    (tmp_path / "my.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        run_recipe("fake-fit", data="my.jsonl")
    assert not Path("runs").exists()


def test_missing_data_and_parts_are_refused(methods, tmp_path):
    (tmp_path / "my.jsonl").write_text('{"text": "1.5"}\n')
    with pytest.raises(ConfigError, match="needs data"):
        run_recipe("fake-fit", verb="fit")
    with pytest.raises(ConfigError, match="No part 'other' .*train"):
        run_recipe("fake-fit", data={"other": "my.jsonl"})


def test_a_full_disk_is_refused_before_the_run(methods, monkeypatch):
    from temper.run import estimate

    plan = make_plan(Request(source="fake-measure"))
    costs = estimate.estimate(plan)
    monkeypatch.setattr(estimate.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 1000))
    with pytest.raises(NeedsError, match="of disk"):
        estimate.check_cost(plan, costs)
    monkeypatch.undo()
    monkeypatch.setattr(estimate, "free_memory", lambda: 10)
    with pytest.raises(NeedsError, match="of memory"):
        estimate.check_cost(plan, [costs[0]._replace(memory_bytes=11)])
    estimate.check_cost(plan, [costs[0]._replace(memory_bytes=10)])


@pytest.mark.parametrize(
    ("base", "count"),
    [("smollm2-135m", 134_515_008), ("Qwen/Qwen3-0.6B", 600_000_000), ("org/model-7b-chat", 7_000_000_000),
     ("org/name", None), ("openai:gpt-x", 0), ("org/SmolLM2-360M", 360_000_000)],
)  # fmt: skip
def test_parameters_are_counted_from_the_name(base, count):
    from temper.run.estimate import count_parameters

    assert count_parameters(base) == count


def test_two_roots_with_one_name_do_not_mix(tmp_path, monkeypatch):
    from temper.core.registry import load_card

    for name, title in (("a", "First"), ("b", "Second")):
        root = write_methods(tmp_path / name)
        card = root / "fakes" / "fake_fit" / "card.py"
        card.write_text(card.read_text().replace("Fake fit", title))
        monkeypatch.setenv("TEMPER_METHODS", str(root))
        assert load_card("fake-fit").title == title


def test_environment_is_left_alone(pipeline):
    before = dict(os.environ)
    run_recipe(pipeline, arms=("one",), seeds=(0,))
    assert dict(os.environ) == before
