"""Ray and MLflow without either: small stand-ins with the calls that we make."""

from __future__ import annotations

import sys
import types

import pytest

from temper.core.errors import ConfigError, NeedsError
from temper.run import launch
from temper.run.execute import execute, run_recipe
from temper.run.plan import Request, make_plan
from temper.store import lines
from temper.store.records import stable


class Ref:
    """What a task gives before it has run."""

    def __init__(self, function, args):
        self.function, self.args = function, args


class FakeRay(types.ModuleType):
    """Runs each task when it is asked for, last one first."""

    class Exceptions:
        class RayTaskError(Exception):
            cause = None

    exceptions = Exceptions

    def __init__(self):
        super().__init__("ray")
        self.started = self.stopped = 0
        self.options = {}

    def is_initialized(self):
        return bool(self.started) and not self.stopped

    def init(self, **options):
        self.started += 1
        self.options = options

    def shutdown(self):
        self.stopped += 1

    def remote(self, **needs):
        self.needs = needs
        return lambda function: types.SimpleNamespace(remote=lambda *args: Ref(function, args))

    def wait(self, refs, num_returns):
        return [refs[-1]], refs[:-1]

    def get(self, ref):
        return ref.function(*ref.args)


def test_ray_cells_give_the_rows_of_one_process(pipeline, monkeypatch):
    ray = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", ray)
    plan = make_plan(Request(source=pipeline, out="on-ray"))
    result = execute(plan, runner=launch.pick_runner(plan, on="ray:local"))
    assert ray.options["address"] == "local"
    assert ray.stopped == 1
    here = run_recipe(pipeline, out="here")
    rows = [[stable(r) for r in lines.read(x.folder.path / "rows.jsonl")] for x in (result, here)]
    assert rows[0] == rows[1]
    assert set(result.outcomes) == {step.name for step in plan.steps}


def test_runners_that_cannot_be_are_refused(pipeline, monkeypatch):
    plan = make_plan(Request(source=pipeline))
    assert launch.pick_runner(plan, on=None) is None
    with pytest.raises(ConfigError, match="--on ray"):
        launch.pick_runner(plan, on="slurm")
    two = make_plan(Request(source=pipeline, options={"num_procs": 2}))
    with pytest.raises(ConfigError, match="do not go together"):
        launch.pick_runner(two, on="ray")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(NeedsError, match=r"temper-ml\[ray\]"):
        launch.pick_runner(plan, on="ray")


def test_mlflow_gets_settings_and_whole_rows(pipeline, monkeypatch):
    logged = {"params": {}, "metrics": [], "runs": []}

    class Started:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

    fake = types.ModuleType("mlflow")
    fake.__spec__ = types.SimpleNamespace(name="mlflow")
    fake.set_experiment = lambda name: logged.update(experiment=name)
    fake.start_run = lambda run_name: logged["runs"].append(run_name) or Started()
    fake.set_tags = lambda tags: None
    fake.log_params = logged["params"].update
    fake.log_metrics = logged["metrics"].append
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    sink = launch.pick_sink("mlflow")
    result = run_recipe(pipeline, seeds=(0,))
    sink(result)
    assert len(logged["runs"]) == 2
    assert logged["params"]["rows.scale"] in ("1.0", "2.0")
    whole = {
        r.facts["step"] + "/" + r.metric: r.value
        for r in result.folder.rows()
        if r.item is None and r.arm == "one"
    }
    assert logged["metrics"][0] == whole
    assert set(whole) == {"score/mean_score", "red/attack_success_rate"}


def test_tracking_is_off_unless_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    assert launch.pick_sink(None) is not None
    with pytest.raises(NeedsError, match=r"temper-ml\[mlflow\]"):
        launch.pick_sink("mlflow")
    with pytest.raises(ConfigError, match="--track mlflow"):
        launch.pick_sink("wandb")
