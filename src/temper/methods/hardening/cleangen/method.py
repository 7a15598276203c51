"""Fit the check (or the backdoor it is tried on) and build its step rule; measuring is in `measuring.py`."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from temper.artefacts import Artefact, Decoder
from temper.core.errors import DataError, ModelError
from temper.core.types import Row, Run
from temper.data.schemas import Data, Dialogue
from temper.methods.hardening.cleangen import measuring
from temper.methods.hardening.cleangen.card import Config
from temper.methods.hardening.cleangen.reference import (
    SLUG,
    load_reference,
    reference_rows,
    restored,
    settings_of,
    tuned_on,
)
from temper.methods.hardening.cleangen.rows import clean_rows, poisoned_rows
from temper.ops.draft_verify import ReferenceCheck
from temper.ops.generate import Sampling, generate
from temper.systems.causal_lm import CausalLM

__all__ = ["KeptCheck", "build_decoder", "fit", "measure", "suggested_alpha"]

logger = logging.getLogger(__name__)

LEAST_ALPHA = 1.01
MANY_REPLACED = 0.1
"""A larger share of benign tokens that would be replaced is warned about."""


@dataclass(eq=False)
class KeptCheck(ReferenceCheck):
    """A check that keeps its reference's artefacts in force for as long as it lives."""

    stack: ExitStack = field(default_factory=ExitStack)


def suggested_alpha(suspicion_nats: Sequence[float], benign_rate: float) -> float:
    """The alpha that replaces a share `benign_rate` of the given tokens: their (1 - rate) quantile of p / q, above 1."""
    if not suspicion_nats:
        raise DataError("No token was written to calibrate on", cure="Give calibration prompts.")
    quantile = float(np.quantile(suspicion_nats, 1 - benign_rate, method="higher"))
    # Just above it, for a token that reaches alpha is replaced.
    return max(LEAST_ALPHA, math.exp(min(quantile, 700.0)) * 1.001)


def fit(system: CausalLM, data: Data, config: Config, run: Run) -> Artefact:
    """The check as a Decoder; with mode=implant an Adapter (or Weights) that carries the backdoor. The system stays as it was."""
    if config.mode == "implant":
        rows = clean_rows(data, "train", "implant", config)
        return tuned_on(system, poisoned_rows(rows, config, run.seed), config, run)
    with ExitStack() as stack:
        reference = load_reference(system, config.reference, stack)
        base = reference.fingerprint
        tuned = None
        if config.tune_reference:
            rows = clean_rows(data, "train", "reference", config)
            tuned = tuned_on(reference, reference_rows(rows, config, run.seed), config, run)
        kept, tensors = settings_of(tuned)
        reference = restored(reference, kept, tensors, stack)
        prompts = clean_rows(data, "calibration", "calibration", config)
        scores = _benign_suspicion(system, reference, prompts, config, run)
    suggested = suggested_alpha(scores, config.benign_rate)
    alpha = suggested if config.alpha == "calibrated" else config.alpha
    replaced = _report_benign(scores, alpha, suggested, config)
    settings = {
        "reference": config.reference,
        "reference_fingerprint": base,
        "tuned": kept,
        "alpha": alpha,
        "suggested_alpha": suggested,
        "benign_replaced": replaced,
        "block": config.block,
    }
    return Decoder(system.fingerprint, SLUG, settings, tensors)


def _benign_suspicion(
    system: CausalLM, reference: CausalLM, prompts: Sequence[Dialogue], config: Config, run: Run
) -> list[float]:
    """The suspicion of every token of the system's own replies to benign prompts, in nats."""
    watch = ReferenceCheck(SLUG, reference, math.inf, config.block)
    replies = generate(
        system,
        [record.prompt for record in prompts],
        Sampling(max_new_tokens=config.reply_tokens),
        run,
        rules=(watch,),
    )
    return [score for reply in replies for score in reply.info[SLUG]["suspicion_nats"]]


def _report_benign(scores: Sequence[float], alpha: float, suggested: float, config: Config) -> float:
    """The share of benign tokens that alpha would replace; warns where it is large."""
    share = sum(score >= math.log(alpha) for score in scores) / len(scores)
    logger.info(
        "alpha %.3g would replace %.3g of %d benign tokens, alpha %.3g a share of %g",
        alpha,
        share,
        len(scores),
        suggested,
        config.benign_rate,
    )
    if share > MANY_REPLACED:
        logger.warning(
            "alpha=%.3g would replace %.0f %% of benign tokens: the reference is much weaker or used to another format. "
            "Fine-tune it on clean rows (tune_reference), or take alpha=%.3g",
            alpha,
            100 * share,
            suggested,
        )
    return share


def build_decoder(system: CausalLM, artefact: Decoder) -> ReferenceCheck:
    """The check of a saved artefact, with its reference loaded; raises ModelError for another reference or vocabulary."""
    settings: dict[str, Any] = dict(artefact.settings)
    stack = ExitStack()
    reference = load_reference(system, settings["reference"], stack)
    if reference.fingerprint != settings["reference_fingerprint"]:
        raise ModelError(
            "The reference model is not the one that the check was fitted with",
            where=f"reference {settings['reference']!r}: {reference.fingerprint[:12]}, fitted with "
            f"{settings['reference_fingerprint'][:12]}",
            cure="Name the same weights, or fit again.",
        )
    reference = restored(reference, settings["tuned"], artefact.tensors, stack)
    return KeptCheck(SLUG, reference, settings["alpha"], settings["block"], stack)


def measure(system: CausalLM, data: Data, config: Config, run: Run) -> Iterator[Row]:
    """Attack success, replacements, cost and plain replies, with the check in force and without it."""
    yield from measuring.measure(system, data, config, run)
