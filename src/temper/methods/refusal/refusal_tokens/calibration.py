"""Reading control probabilities and choosing thresholds from them; the calibration file is made here."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from temper.core.errors import ConfigError, NeedsError, nearest
from temper.core.types import Json, Run
from temper.data.schemas import Dialogue
from temper.methods.refusal.refusal_tokens.card import Config
from temper.methods.refusal.refusal_tokens.gate import COMPARE, Controls, ReadOut, RefusalGate, decide_columns
from temper.ops import stats, thresholds
from temper.ops.generate import prompt_ids
from temper.ops.logprobs import next_token_logits
from temper.systems.causal_lm import CausalLM

__all__ = ["choose_thresholds", "read_out", "settings_for"]

logger = logging.getLogger(__name__)

MAX_LEAK = 0.5
"""Above this mean mass outside the control tokens the model was not trained with them."""


def read_out(system: CausalLM, records: Sequence[Dialogue], gate: RefusalGate, run: Run) -> ReadOut:
    """One prefill a prompt: control probabilities at the gate's temperature, and the model's own first choice."""
    ids = [prompt_ids(system, record.prompt) for record in records]
    for row in ids:
        gate.start(row)
    found = next_token_logits(system, ids, run, columns=gate.controls.ids, temperature=gate.temperature)
    p_NK = (found.logits_NK.double() - found.logsumexp_N.double()[:, None]).exp()
    return ReadOut(p_NK.numpy(), gate.columns(found.top_N))


def choose_thresholds(read: ReadOut, gold_N: Sequence[int], controls: Controls, config: Config) -> dict[str, float]:
    """Thresholds by name; `gold_N` holds columns. Raises DataError for an empty class.

    One refusal token: any of the four modes. Categories: coordinate ascent over T_c on macro-F1 (f1), else one
    threshold for all from the leading category's probability, which is what the gate tests.
    """
    gold = np.asarray(gold_N)
    respond = len(controls.names)
    if config.choose == "f1" and respond > 1 and config.rule in ("gate", "bias"):
        ascent = thresholds.choose_by_category(read.p_NK, gold, names=controls.names)
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
        _require_trained(read)
        gold_N = [controls.column(record.extra.get("refusal_category")) for record in held_out]
        selected = list(config.selected or controls.names)
        chosen = choose_thresholds(read, gold_N, controls, config)
        settings["thresholds"] = {name: by_hand.get(name, chosen[name]) for name in selected}
        settings["selected"] = selected
        settings["calibration"] = summary(read, gold_N, RefusalGate(settings))
    elif len(controls.names) == 1 and not by_hand:
        settings |= {"thresholds": {controls.names[0]: COMPARE}, "selected": [controls.names[0]]}
    return settings


def _by_hand(controls: Controls, config: Config) -> dict[str, float]:
    for name in (*config.thresholds, *config.selected):
        if name not in controls.names:
            raise ConfigError(f"There is no refusal category {name!r}", cure=nearest(name, controls.names))
    return dict(config.thresholds)


def _require_trained(read: ReadOut) -> None:
    leak = float(1 - read.p_NK.sum(axis=1).mean())
    if leak > MAX_LEAK:
        raise NeedsError(
            f"{leak:.0%} of the first token's probability lies outside the control tokens",
            where="calibration part",
            cure="The model was not trained with refusal tokens, or too briefly: train first (more epochs, higher lr).",
        )
    if leak > 0.01:
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
