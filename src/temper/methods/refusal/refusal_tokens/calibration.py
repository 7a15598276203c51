"""Reading control probabilities and choosing thresholds from them; the calibration file is made here."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from temper.core.errors import ConfigError, DataError, nearest
from temper.core.types import Json, Run
from temper.data.schemas import Dialogue
from temper.methods.refusal.refusal_tokens.card import Config
from temper.methods.refusal.refusal_tokens.gate import COMPARE, Controls, ReadOut, RefusalGate, decide_columns
from temper.ops import stats, thresholds
from temper.ops.generate import prompt_ids
from temper.ops.logprobs import next_token_logits
from temper.systems.causal_lm import CausalLM

__all__ = ["check_held_out", "choose_thresholds", "read_out", "settings_for", "summary", "warn_of_leak"]

logger = logging.getLogger(__name__)

MAX_LEAK = 0.5
"""Above this mean mass outside the control tokens the model hardly knows them."""
SMALL_LEAK = 0.01
"""Below this mean mass thresholds on p and on q are the same."""


def read_out(system: CausalLM, records: Sequence[Dialogue], gate: RefusalGate, run: Run) -> ReadOut:
    """One prefill a prompt: control probabilities at the gate's temperature, and the model's own first choice."""
    ids = [prompt_ids(system, record.prompt) for record in records]
    for row in ids:
        gate.start(row)
    found = next_token_logits(system, ids, run, columns=gate.controls.ids, temperature=gate.temperature)
    p_NK = (found.logits_NK.double() - found.logsumexp_N.double()[:, None]).exp()
    return ReadOut(p_NK.numpy(), gate.columns(found.top_N))


def choose_thresholds(
    read: ReadOut, gold_N: Sequence[int], controls: Controls, config: Config
) -> dict[str, float]:
    """Thresholds by name; `gold_N` holds columns. Raises DataError for an empty class.

    One refusal token: any of the four modes. Categories: coordinate ascent over T_c on `config.average` F1, else one
    threshold for all from the leading category's probability, which is what the gate tests.
    """
    gold = np.asarray(gold_N)
    respond = len(controls.names)
    if config.choose == "f1" and respond > 1 and config.rule in ("gate", "bias"):
        tuned = [controls.names.index(name) for name in config.selected] or None
        ascent = thresholds.choose_by_category(
            read.p_NK, gold, average=config.average, names=controls.names, selected=tuned
        )
        return dict(zip(controls.names, ascent.thresholds.tolist(), strict=True))
    score_N = read.refuse_N if config.rule == "sum" else read.p_NK[:, :-1].max(axis=1)
    chosen = thresholds.choose(
        score_N,
        gold < respond,
        config.choose,
        alpha=config.fpr_max,
        rate=config.refusal_rate,
        cost_fp=config.false_refusal_cost,
    )
    return dict.fromkeys(controls.names, chosen.threshold)


def settings_for(
    system: CausalLM, held_out: Sequence[Dialogue], controls: Controls, config: Config, run: Run
) -> dict[str, Json]:
    """The calibration file. Without held-out rows nothing is tuned but what the config sets by hand."""
    by_hand = _by_hand(controls, config)
    settings: dict[str, Any] = {
        "model": system.spec,
        "template_sha256": system.chat.sha256,
        "token_ids": controls.to_json(),
        "mode": config.rule,
        "temperature": config.temperature,
        "thresholds": by_hand,
        "selected": list(by_hand),
        "calibration": None,
    }
    if held_out:
        read = read_out(system, held_out, RefusalGate(settings), run)
        gold_N = [controls.column(record.extra.get("refusal_category")) for record in held_out]
        selected = list(config.selected or controls.names)
        chosen = choose_thresholds(read, gold_N, controls, config)
        settings["thresholds"] = {name: by_hand.get(name, chosen[name]) for name in selected}
        settings["selected"] = selected
        settings["calibration"] = summary(read, gold_N, RefusalGate(settings))
        warn_of_leak(settings["calibration"]["leak"])
    elif len(controls.names) == 1 and not by_hand:
        settings |= {"thresholds": {controls.names[0]: COMPARE}, "selected": [controls.names[0]]}
    return settings


def _by_hand(controls: Controls, config: Config) -> dict[str, float]:
    for name in (*config.thresholds, *config.selected):
        if name not in controls.names:
            raise ConfigError(f"There is no refusal category {name!r}", cure=nearest(name, controls.names))
    return dict(config.thresholds)


def check_held_out(held_out: Sequence[Dialogue], names: Sequence[str], config: Config) -> None:
    """Before any training: raises DataError for calibration rows that could not give a threshold afterwards."""
    if not held_out:
        return
    found = [record.extra.get("refusal_category") for record in held_out]
    by_category = config.choose == "f1" and len(names) > 1 and config.rule in ("gate", "bias")
    wanted = {name: name in found for name in names} if by_category else {"refusals": any(found)}
    missing = [name for name, there in {**wanted, "answered requests": None in found}.items() if not there]
    if missing:
        raise DataError(
            f"Cannot calibrate: no row of {', '.join(missing)}",
            where="part calibration, column refusal_category",
            cure="Add such rows, or leave the part out and set thresholds by hand.",
        )
    for name in (set(found) - {None}) - set(names) if len(names) > 1 else ():
        raise DataError(
            f"Category {name!r} was not trained", where="part calibration", cure=nearest(str(name), names)
        )


def warn_of_leak(leak: float) -> None:
    """Say when thresholds rest on little: most mass outside the control tokens means the training was too short."""
    if leak > MAX_LEAK:
        logger.warning(
            "%.0f%% of the first token lies outside the control tokens: train longer or faster", 100 * leak
        )
    elif leak > SMALL_LEAK:
        logger.warning("leak %.3f: thresholds on p and on q differ by up to that much", leak)


def summary(read: ReadOut, gold_N: Sequence[int], gate: RefusalGate) -> dict[str, Json]:
    """What the thresholds do on the rows they were chosen on."""
    due_N = np.asarray(gold_N) < len(gate.controls.names)
    rule = "gate" if gate.rule == "bias" else gate.rule
    column_N = decide_columns(read, gate.threshold_C, gate.selected_C, rule)
    refused_N = (column_N >= 0) & (column_N < len(gate.controls.names))
    hits, false = int((refused_N & due_N).sum()), int((refused_N & ~due_N).sum())
    return {
        "n_pos": int(due_N.sum()),
        "n_neg": int((~due_N).sum()),
        "F1": float(thresholds.f1_score(hits, false, due_N.sum())),
        "TPR": hits / max(int(due_N.sum()), 1),
        "FPR": false / max(int((~due_N).sum()), 1),
        "AUROC": stats.auroc(read.refuse_N, due_N),
        "leak": float(1 - read.p_NK.sum(axis=1).mean()),
    }
