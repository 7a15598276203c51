"""Fit a safeguard that outlasts fine-tuning, attack it and say what is left; losses in `losses.py`, the loop in `training.py`."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from temper.artefacts import Artefact, Tune, tuning
from temper.artefacts.fine_tuning import fine_tuned
from temper.core.errors import DataError
from temper.core.types import Json, Row, Run
from temper.data.schemas import Data, Dialogue, Preference, Record, Text
from temper.methods.hardening.tar.card import Config
from temper.methods.hardening.tar.facts import make_facts
from temper.methods.hardening.tar.losses import EntropyObjective
from temper.methods.hardening.tar.redteam import attacked, exams_of, report, suite
from temper.methods.hardening.tar.training import Resistance, Rows, map_randomly, resist
from temper.ops.batching import Example, encode
from temper.ops.preference import PreferenceObjective, dpo, encode_pair, with_reference
from temper.ops.train import TrainLog, TrainSettings
from temper.systems.causal_lm import CausalLM

__all__ = ["estimate", "fit", "make", "measure"]

SLUG = "tar"
CHARS_A_TOKEN = 4.0
NUM_COPIES = 10
"""Weights as they were, as they become, as they stood before an attack; the gathered gradient and a fresh one; two moments of
either AdamW; one more for activations."""
LIBRARY_BYTES = 0.6e9

R = TypeVar("R", bound=Record)


def fit(system: CausalLM, data: Data, config: Config, run: Run) -> Artefact:
    """New weights by the form; the system stays as it was. Raises DataError where a part that the form reads is missing."""
    return FORMS[config.form](system, data, config, run)


def measure(system: CausalLM, data: Data, config: Config, run: Run) -> Iterator[Row]:
    """The forget score before and after every attack of the suite, the retain score before."""
    exams = exams_of(system, data, config, run.seed)
    start = exams.forget.scores(system, run)
    kept = exams.retain.scores(system, run) if exams.retain else []
    found = {attack.name: attacked(system, exams, attack, config, run) for attack in suite(config)}
    lines = {name: _line({0: start, **looks}) for name, looks in found.items()}
    curve = {"x": "attack steps", "y": "forget score", "lines": lines}
    _write_figures(run, {"curves": {"Forget score under attack": curve}})
    yield from report(exams, kept, start, found, config)


def make(system: CausalLM | None, data: Data, config: Config, run: Run) -> Data:
    """The check's invented facts: to learn, to forget, to keep, to attack with, and questions."""
    return make_facts(config, run.seed)


def _safeguard(system: CausalLM, data: Data, config: Config, run: Run) -> Artefact:
    """Knowledge: random mapping, then entropy that outlasts attacks (max_entropy: without attacks)."""
    sources: dict[str, list[Example]] = {}
    held_out: list[Example] = []
    for part in ("forget", "second"):
        found = _encoded(system, data.records(part, Text), config)
        if found:
            # Where nobody attacks nothing is held out.
            attacks = config.form != "max_entropy"
            sources[part], left = _split(found, config, run.seed) if attacks else (found, found)
            held_out += left
    if "forget" not in sources:
        raise _lacking("forget", config, data)
    rows = Rows(sources, _retain_rows(system, data, config), held_out)
    resistance = Resistance(EntropyObjective(system.pad_id, system.device), lambda row: len(row.ids))
    with tuning(system, Tune(mode="full"), run) as tuned:
        if config.mapping_steps:
            map_randomly(tuned, rows, config, run)
        if config.num_steps:
            _report(resist(tuned, rows, resistance, config, run), run)
        return tuned.finish(SLUG)


def _refusal(system: CausalLM, data: Data, config: Config, run: Run) -> Artefact:
    """Refusal: the adversary learns harmful replies, DPO of the held-out pairs outlasts it; there is no stage 1."""
    records = data.records("pairs", Preference)
    if len(records) < 2:
        raise _lacking("pairs", config, data)
    pairs = [encode_pair(system, pair, max_tokens=config.max_tokens) for pair in records]
    attacked_pairs, held_out = _split(pairs, config, run.seed)
    harmful = [pair.rejected for pair in attacked_pairs]
    # Log-probabilities of the reference once, before anything is trained.
    rows = Rows(
        {"forget": harmful}, _retain_rows(system, data, config), with_reference(system, held_out, run)
    )

    def loss(*logp: Any) -> Any:
        return dpo(*logp, beta=config.beta)

    resistance = Resistance(PreferenceObjective(loss, system.pad_id), lambda pair: pair.num_tokens)
    with tuning(system, Tune(mode="full"), run) as tuned:
        _report(resist(tuned, rows, resistance, config, run), run)
        return tuned.finish(SLUG)


def _learn(system: CausalLM, data: Data, config: Config, run: Run) -> Artefact:
    """Plain training on the part learn: the model that knows what is to be forgotten."""
    rows = _encoded(system, data.records("learn", Text), config)
    if not rows:
        raise _lacking("learn", config, data)
    settings = TrainSettings(
        lr=config.lr, num_epochs=config.learn_epochs, batch_rows=config.batch_rows, schedule="cosine",
        warmup_ratio=0.05,
    )  # fmt: skip
    with fine_tuned(system, rows, Tune(mode="full"), settings, run) as done:
        return done.tuned.finish(SLUG)


FORMS: dict[str, Callable[[CausalLM, Data, Config, Run], Artefact]] = {
    "knowledge": _safeguard,
    "max_entropy": _safeguard,
    "refusal": _refusal,
    "learn": _learn,
}


def _encoded(system: CausalLM, records: Sequence[Text | Dialogue], config: Config) -> list[Example]:
    return [encode(system, record, max_tokens=config.max_tokens) for record in records]


def _retain_rows(system: CausalLM, data: Data, config: Config) -> list[Example]:
    rows = _encoded(system, [*data.records("retain", Text), *data.records("dialogues", Dialogue)], config)
    if not rows:
        raise _lacking("retain", config, data)
    return rows


def _split(rows: list[Any], config: Config, seed: int) -> tuple[list[Any], list[Any]]:
    """What adversaries train on, and the held-out share that they are judged by; each has at least one row."""
    if len(rows) < 2:
        raise DataError(
            "One forget row cannot be split",
            where=f"form={config.form}",
            cure="Give at least two: some are attacked with, others judge the attack.",
        )
    order = random.Random(f"{seed}/held-out").sample(range(len(rows)), len(rows))
    count = min(len(rows) - 1, math.ceil(config.held_out_share * len(rows)))
    return [rows[place] for place in sorted(order[count:])], [rows[place] for place in sorted(order[:count])]


def _lacking(part: str, config: Config, data: Data) -> DataError:
    extra = " of at least two" if part == "pairs" else ""
    return DataError(
        f"form={config.form} reads the part {part}{extra}, and there is none",
        where=data.source,
        cure=f"Give it: --data {part}=FILE.",
    )


def _line(looks: Mapping[int, list[float]]) -> dict[str, list[float]]:
    return {"x": [float(step) for step in looks], "y": [sum(v) / len(v) for v in looks.values()]}


def _report(log: TrainLog, run: Run) -> None:
    steps = [look["step"] for look in log.curve]
    lines = {
        "after the attack": {"x": steps, "y": [look["after_attack"] for look in log.curve]},
        "hidden states": {"x": steps, "y": log.terms["hidden"]},
    }
    curve = {"x": "outer step", "y": "loss", "lines": lines}
    _write_figures(run, {"curves": {"Tamper resistance while training": curve}})


def _write_figures(run: Run, figures: dict[str, Json]) -> None:
    if run.folder is not None:
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / "figures.json").write_text(json.dumps(figures))


def estimate(facts: Mapping[str, Any], data: Data | None, config: Config) -> dict[str, float]:
    """Tokens of all passes: of the fit by its two stages, of the measurement by its attacks; memory of the fit."""
    if data is None:
        return {}
    if config.form == "learn" and "learn" in data and "attack" not in data:
        return {}
    sizes = [
        min(config.max_tokens, len(record.text) / CHARS_A_TOKEN)
        for part in ("forget", "retain", "attack")
        for record in data.records(part, Text)
    ]
    if not sizes:
        return {}
    mean = sum(sizes) / len(sizes)
    if "attack" in data:
        # Reading is a third of a training pass.
        return {"tokens": 3 * len(suite(config)) * config.attack_steps * config.attack_rows * mean}
    attack = config.inner_steps * config.adversary_rows
    look = config.inner_steps // config.inner_every * config.batch_rows
    outer = config.num_adversaries * (attack + look) + config.batch_rows * (1 + 1 / 3)
    said = {"tokens": mean * (config.num_steps * outer + 2 * config.mapping_steps * config.batch_rows)}
    if facts.get("parameters"):
        said["memory_bytes"] = LIBRARY_BYTES + facts["parameters"] * 4.0 * NUM_COPIES
    return said
