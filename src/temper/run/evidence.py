"""A method's evidence: rows of its `small` recipe, appended by the runner, and the verdicts they give."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from temper.core import config as core_config
from temper.core.errors import ConfigError
from temper.core.registry import find, load_card
from temper.core.types import Json, Row
from temper.run.execute import RunResult
from temper.run.plan import Cell, Plan
from temper.run.verdicts import Finding, judge_claim, select
from temper.store import lines
from temper.store.atomic import canonical, write_json
from temper.store.cache import cache_root, is_off
from temper.store.records import row_from

__all__ = ["append_evidence", "check_evidence", "condition", "evidence_rows", "findings"]

RECIPE = "small"
KEPT_FACTS = ("method", "step", "settings", "step_hash", "seed", "run", "condition", "cell_arm", "matrix")
"""What each row by item keeps; the first row of its step in its cell holds all facts."""


def check_evidence(plan: Plan) -> None:
    """Raise ConfigError unless the plan is a method's `small` recipe as it stands."""
    request = plan.request
    if not plan.pipeline.method or (request.recipe or RECIPE) != RECIPE:
        raise ConfigError(
            "--evidence goes with a method's small recipe", cure="temper run SLUG --recipe small --evidence"
        )
    changed = [
        name
        for name, value in (("--set", request.sets), ("--system", request.system), ("--data", request.data))
        if value
    ]
    if changed:
        raise ConfigError(
            f"--evidence and {changed[0]} do not go together", cure="Change the recipe instead."
        )
    claims = load_card(plan.pipeline.method).claims
    arms = {cell.arm for cell in plan.cells} if not request.arms else set(plan.pipeline.arms)
    for claim in claims:
        for arm in (claim.arm, claim.baseline):
            # An arm that a measure names itself stands after the cell's.
            if isinstance(arm, str) and arms != {""} and not _cell_arm(arm, arms):
                raise ConfigError(
                    f"Claim {claim.id!r} names the arm {arm!r}, which the recipe lacks",
                    where=plan.pipeline.where,
                    cure=f"Its arms are {', '.join(sorted(arms))}.",
                )


def append_evidence(result: RunResult) -> int:
    """Append a run's rows to its method's `evidence.jsonl`; returns how many. A run is appended once."""
    slug = result.plan.pipeline.method
    path = find(slug).file("evidence.jsonl")
    lines.repair(path)
    if any(record.get("facts", {}).get("run") == result.folder.id for record in lines.read(path)):
        return 0
    return lines.append(path, _records(result, {claim.metric for claim in load_card(slug).claims}))


def _records(result: RunResult, claimed: set[str]) -> Iterator[dict[str, Json]]:
    """Whole rows, and those by item that a claim is paired on."""
    cells = {(cell.arm, cell.seed, canonical(dict(cell.matrix))): cell for cell in result.plan.cells}
    arms = {cell.arm for cell in result.plan.cells}
    explained: set[tuple[str, int, str]] = set()
    for record in lines.read(result.folder.path / "rows.jsonl"):
        facts = dict(record.get("facts", {}))
        arm = _cell_arm(record.get("arm", ""), arms)
        cell = cells[arm, facts["seed"], canonical(facts.get("matrix", {}))]
        facts |= {"run": result.folder.id, "condition": condition(cell), "cell_arm": arm}
        key = (arm, facts["seed"], facts["step"])
        if record.get("item") is not None:
            if record["metric"] not in claimed:
                continue
            if key in explained:
                facts = {name: facts[name] for name in KEPT_FACTS if name in facts}
        explained.add(key)
        yield {"arm": "", **record, "facts": facts}


def _cell_arm(arm: str, arms: set[str]) -> str:
    parts = arm.split("/")
    heads = ("/".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((head for head in heads if head in arms), "")


def condition(cell: Cell) -> str:
    """Hash of everything a cell does but its seed and the code: rows of equal conditions may be pooled."""
    steps = [
        [
            step.id,
            step.verb,
            step.method,
            core_config.to_dict(step.config),
            str(step.system),
            step.loaded.fingerprint if step.loaded is not None else canonical(step.data),
            step.limit,
        ]
        for step in cell.steps
    ]
    return hashlib.sha256(canonical([steps, dict(cell.matrix)]).encode()).hexdigest()[:12]


def evidence_rows(slug: str) -> list[Row]:
    """The rows of a method's evidence that count."""
    return select([row_from(record) for record in lines.read(find(slug).file("evidence.jsonl"))])


def findings(slug: str) -> list[Finding]:
    """The verdict of each claim, in the card's order; kept in the cache until rows or claims change."""
    claims = load_card(slug).claims
    path = find(slug).file("evidence.jsonl")
    if not claims or not path.exists():
        return [judge_claim(claim, []) for claim in claims]
    known = _cached(path, str(claims))
    if known is not None:
        return known
    rows = evidence_rows(slug)
    found = [judge_claim(claim, rows) for claim in claims]
    if not is_off():
        write_json(_cache_file(path, str(claims)), [finding._asdict() for finding in found])
    return found


def _cache_file(path: Path, claims: str) -> Path:
    from temper.run import verdicts

    digest = hashlib.sha256(path.read_bytes())
    digest.update(claims.encode() + Path(verdicts.__file__).read_bytes())
    return cache_root() / "verdicts" / f"{digest.hexdigest()[:32]}.json"


def _cached(path: Path, claims: str) -> list[Finding] | None:
    """Findings computed before from the same rows and claims; reading them needs no NumPy."""
    if is_off():
        return None
    try:
        records = json.loads(_cache_file(path, claims).read_text(encoding="utf-8"))
        return [_finding(record) for record in records]
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _finding(record: dict[str, Json]) -> Finding:
    from temper.run.verdicts import ArmMean

    return Finding(
        **{**record, "arms": tuple(ArmMean(*arm) for arm in record["arms"]), "seeds": tuple(record["seeds"])}
    )
