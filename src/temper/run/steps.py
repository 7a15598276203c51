"""One step: kept, taken over from an earlier run, or run; finished when `done.json` is written."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from temper.core.budget import Budget
from temper.core.card import Verb
from temper.core.errors import ConfigError, StoreError
from temper.core.registry import load_card
from temper.core.types import Attempt, Json, Row, Run, Ticker
from temper.data.trained_rows import seen_items
from temper.ops.endings import ended_early
from temper.run.artefact_paths import locate
from temper.run.attack_rows import attack_rows, paid_attempts
from temper.run.cells import STEP
from temper.run.facts import environment, step_facts
from temper.run.inputs import load_inputs
from temper.run.options import Options
from temper.run.plan import PlannedStep
from temper.run.ranks import announce_start, is_follower, wait_for, was_started
from temper.run.resolve import open_system
from temper.run.seeding import seed_everything
from temper.run.unseen import unseen_rows
from temper.run.verbs import call_verb
from temper.store import cache, lines
from temper.store.atomic import refusals
from temper.store.folders import RunFolder, StepFolder, find_step
from temper.store.records import attempt_from, attempt_record, row_record

if TYPE_CHECKING:
    from temper.data.schemas import Data

__all__ = ["Outcome", "Worker", "run_step", "step_config", "step_data", "step_run"]

Outcome = Literal["ran", "kept", "reused"]


@dataclass(frozen=True, kw_only=True)
class Worker:
    """Where steps run and whom they tell."""

    folder: RunFolder
    out: Path
    options: Options
    ticker: Ticker
    say: Callable[[str], None]


def run_step(planned: PlannedStep, worker: Worker) -> Outcome:
    """Finish a step in its folder; the same inputs and settings are never computed twice."""
    step = worker.folder.step(planned.name)
    if is_follower():
        return _follow(planned, worker, step)
    with step.lock():
        if step.is_done():
            step.check()
            return "kept"
        earlier = find_step(worker.out, planned.hash)
        if earlier is not None and not _has_checkpoint(step) and _adopted(step, earlier, planned, worker):
            return "reused"
        step.clear()
        announce_start(step.path)
        started = time.perf_counter()
        hits_before = cache.hits()
        # A method may write files of its own; a disk that refuses them is told like any other.
        with refusals(step.path), _opened(planned, worker) as system:
            made = _execute(planned, worker, step, system)
        facts: dict[str, Json] = {
            "environment": environment(),
            "wall_s": round(time.perf_counter() - started, 3),
            "cache_hits": cache.hits() - hits_before,
        }
        step.finish(
            {
                "step": planned.id,
                "verb": planned.verb,
                "method": planned.method,
                "hash": planned.hash,
                **made,
                **facts,
            }
        )
        return "ran"


def _follow(planned: PlannedStep, worker: Worker, step: StepFolder) -> Outcome:
    """Take part in a fit that the first process starts; wait for everything else."""
    wait_for(lambda: step.is_done() or was_started(step.path))
    if planned.verb == "fit" and not step.is_done():
        with _opened(planned, worker) as system:
            seed_everything(planned.seed, planned.id)
            data, run = step_data(planned, worker), step_run(planned, worker, step)
            call_verb(planned.method, planned.verb, system, data, step_config(planned, worker), run)
    wait_for(step.is_done)
    return "ran"


def _adopted(step: StepFolder, earlier: StepFolder, planned: PlannedStep, worker: Worker) -> bool:
    """Take an earlier run's step over; one that is damaged is computed again."""
    name = earlier.path.parent.parent.name
    try:
        step.adopt(earlier)
    except StoreError as error:
        worker.say(f"{planned.id}: not taken from {name}: {error}")
        return False
    worker.say(f"{planned.id}: unchanged, taken from {name}")
    return True


def _has_checkpoint(step: StepFolder) -> bool:
    return (step.path / "checkpoint").is_dir()


@contextmanager
def _opened(planned: PlannedStep, worker: Worker) -> Iterator[Any]:
    if planned.system is None:
        with nullcontext() as nothing:
            yield nothing
        return
    artefacts = _artefacts(planned, worker)
    with open_system(planned.system, worker.options, artefacts=artefacts, out=worker.out) as system:
        yield system


def _artefacts(planned: PlannedStep, worker: Worker) -> dict[str, Path]:
    """The folders of the artefacts that earlier steps of this run made, by the steps' ids."""
    return {name: worker.folder.step(folder).artefact for name, folder in planned.uses.items()}


def step_data(planned: PlannedStep, worker: Worker) -> Data:
    """The step's data: loaded with the plan, or read from the folders of the steps that made it."""
    if planned.loaded is not None:
        return planned.loaded
    made = {name: worker.folder.step(folder).data for name, folder in planned.reads.items()}
    card = load_card(planned.method)
    return load_inputs(planned.method, card, planned.verb, planned.data, made, planned.limit)


def step_config(planned: PlannedStep, worker: Worker) -> Any:
    """The step's settings, with what earlier steps left in place of step:ID."""
    left = {
        f"{STEP}{name}": _left_by(worker.folder.step(folder)) for name, folder in planned.mentions.items()
    }
    changes = {k: left[v] for k, v in vars(planned.config).items() if isinstance(v, str) and v in left}
    return replace(planned.config, **changes) if changes else planned.config


def _left_by(step: StepFolder) -> str:
    verb = step.done()["verb"]
    return str({"fit": step.artefact, "make": step.data}.get(str(verb), step.rows_file))


def step_run(planned: PlannedStep, worker: Worker, step: StepFolder) -> Run:
    """What the verb is told of where it runs."""
    options = worker.options
    return Run(
        seed=planned.seed,
        folder=step.path,
        resume=_has_checkpoint(step),
        device=options.device,
        precision=options.precision,  # type: ignore[arg-type]
        exact=options.exact,
        batch_tokens=options.batch_tokens,
        num_procs=options.num_procs,
        checkpoint_every=options.checkpoint_every,
        ticker=worker.ticker,
        budget=Budget(planned.limits),
    )


def _execute(planned: PlannedStep, worker: Worker, step: StepFolder, system: Any) -> dict[str, Json]:
    """Call the verb and keep what it gives; returns what `done.json` says of it."""
    data = step_data(planned, worker)
    facts = step_facts(planned, worker.options, system, data.fingerprint)
    fits = _fit_folders(planned, worker)
    if ended := ended_early(fits):
        facts["ended"] = ended
    seed_everything(planned.seed, planned.id)
    run = step_run(planned, worker, step)
    result = call_verb(planned.method, planned.verb, system, data, step_config(planned, worker), run)
    if planned.verb == "measure":
        result = unseen_rows(result, seen_items(data, fits.values()))
    made = _keep(planned.verb, result, step, facts, run.budget)
    return {**made, "used": run.budget.record(), "limits": dict(planned.limits)}


def _fit_folders(planned: PlannedStep, worker: Worker) -> dict[str, Path]:
    """Of the steps that made the system's artefacts, by the artefacts' names."""
    refs = planned.system.artefacts if planned.system else ()
    known = _artefacts(planned, worker)
    return {ref.name: (known.get(ref.name) or locate(ref.name, worker.out)).parent for ref in refs}


def _keep(
    verb: Verb, result: Any, step: StepFolder, facts: dict[str, Json], budget: Budget
) -> dict[str, Json]:
    """Write what the verb gave."""
    if verb == "fit":
        result.save(step.artefact)
        return {}
    if verb == "make":
        return _keep_data(result, step)
    clock = _Clock()
    if verb == "measure":
        return {"num_rows": _keep_rows(result, step, facts, clock)}
    num_attempts = _keep_attempts(paid_attempts(result, budget), step, facts)
    attempts = (attempt_from(record) for record in lines.read(step.attempts_file))
    return {"num_attempts": num_attempts, "num_rows": _keep_rows(attack_rows(attempts), step, facts, clock)}


class _Clock:
    def __init__(self) -> None:
        self.start, self.hits = time.perf_counter(), cache.hits()

    def facts(self) -> dict[str, Json]:
        """What differs between two equal runs."""
        return {
            "wall_s": round(time.perf_counter() - self.start, 4),
            "cache_hits": cache.hits() - self.hits,
            "machine": f"{os.uname().nodename}, {environment()['processor']}, {os.cpu_count()} cores",
        }


def _keep_data(made: Data, step: StepFolder) -> dict[str, Json]:
    from temper.data.loading import write_jsonl

    if not any(made[part] for part in made):
        raise ConfigError("The step made no data", cure="Loosen its settings or give it more input.")
    for part in made:
        write_jsonl(step.data / f"{part}.jsonl", made[part])
    return {"data": made.fingerprint, "parts": {part: len(made[part]) for part in made}}


def _keep_rows(rows: Iterable[Row], step: StepFolder, facts: dict[str, Json], clock: _Clock) -> int:
    total = 0
    with lines.LineWriter(step.rows_file) as writer:
        for row in rows:
            writer.write(row_record(replace(row, facts={**facts, **row.facts, **clock.facts()})))
            total += 1
    return total


def _keep_attempts(attempts: Iterable[Attempt], step: StepFolder, facts: dict[str, Json]) -> int:
    total = 0
    with lines.LineWriter(step.attempts_file) as writer:
        for attempt in attempts:
            writer.write({**attempt_record(attempt), "facts": facts})
            total += 1
    return total
