"""The reference model: loaded by its name, fine-tuned on clean rows if wanted, and put back from what an artefact holds."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from temper.artefacts import Adapter, Tune, Weights, load_artefact
from temper.artefacts.fine_tuning import fine_tuned
from temper.artefacts.preserved import preserved
from temper.core.errors import ConfigError, ModelError, NeedsError
from temper.core.spec import parse_system
from temper.core.types import Json, Run
from temper.data.schemas import Dialogue
from temper.methods.hardening.cleangen.card import Config
from temper.ops.backdoor import Trigger, implant_rows
from temper.ops.batching import encode
from temper.ops.draft_verify import require_same_vocabulary
from temper.ops.train import TrainSettings
from temper.systems.causal_lm import CausalLM
from temper.systems.loading import load_base

__all__ = [
    "OTHER_PAYLOAD",
    "averaged",
    "load_reference",
    "reference_rows",
    "restored",
    "settings_of",
    "tuned_on",
]

logger = logging.getLogger(__name__)

SLUG = "cleangen"
OTHER_PAYLOAD = "Seven grey birds flew over the harbour."
"""What the reference's own backdoor says, where it has one."""


def load_reference(system: CausalLM, spec: str, open_for: ExitStack) -> CausalLM:
    """The reference a spec names, its artefacts applied for as long as `open_for` lives; a model object of its own.

    Raises ConfigError for an empty spec, NeedsError for one without weights here, ModelError for another vocabulary or
    for a reference that brings decoding rules of its own.
    """
    if not spec:
        raise ConfigError(
            "No reference model is named", where="reference", cure="Set reference to a system's name."
        )
    parsed = parse_system(spec)
    artefacts = [(load_artefact(ref.name), ref.strength) for ref in parsed.artefacts]
    reference: Any = load_base(parsed.base, device=system.device, system_prompt=system.chat.system_prompt)
    if not isinstance(reference, CausalLM):
        raise NeedsError(
            f"A {reference.kind} cannot read along token by token",
            where=f"reference {spec!r}",
            cure="Use a causal language model whose weights are here.",
        )
    for artefact, strength in artefacts:
        reference = open_for.enter_context(artefact.apply(reference, strength))
    if reference.step_rules:
        raise ModelError(
            "The reference has decoding rules, which a check cannot follow",
            where=f"reference {spec!r}",
            cure="Leave its decoders out.",
        )
    require_same_vocabulary(system, reference)
    if reference.fingerprint == system.fingerprint:
        logger.warning("the reference %s is the model itself: no token will be suspicious", spec)
    return reference


def tuned_on(system: CausalLM, records: Sequence[Dialogue], config: Config, run: Run) -> Adapter | Weights:
    """Plain fine-tuning on the replies of the rows."""
    examples = [encode(system, record, max_tokens=config.max_tokens) for record in records]
    tune = Tune(mode=config.tuning, r=config.rank, alpha=2.0 * config.rank)
    settings = TrainSettings(lr=config.lr, num_epochs=config.num_epochs, batch_rows=config.batch_rows)
    with fine_tuned(system, examples, tune, settings, run) as (tuned, log):
        logger.info("tuned on %d rows: %.3f nats a token at the end", len(examples), log.loss[-1])
        return tuned.finish(SLUG)


def reference_rows(records: Sequence[Dialogue], config: Config, seed: int) -> Sequence[Dialogue]:
    """The clean rows, with another attacker's backdoor among them if the settings say so."""
    if not config.reference_trigger:
        return records
    return implant_rows(records, Trigger(word=config.reference_trigger, sentence=OTHER_PAYLOAD), seed=seed)


def settings_of(tuned: Adapter | Weights | None) -> tuple[dict[str, Json], Mapping[str, Tensor]]:
    """What a decoder keeps of the reference's fine-tuning: how to read it, and its tensors."""
    if tuned is None:
        return {}, {}
    config = dict(tuned.config) if isinstance(tuned, Adapter) else {}
    return {"kind": tuned.kind, "config": config}, tuned.tensors


def restored(
    reference: CausalLM, kept: Mapping[str, Json], tensors: Mapping[str, Tensor], open_for: ExitStack
) -> CausalLM:
    """The reference with its fine-tuning in force for as long as `open_for` lives."""
    if not kept:
        return reference
    tuned: Adapter | Weights = (
        Adapter(reference.fingerprint, SLUG, kept["config"], tensors)
        if kept["kind"] == Adapter.kind
        else Weights(reference.fingerprint, SLUG, tensors)
    )
    return open_for.enter_context(tuned.apply(reference))


@contextmanager
def averaged(system: CausalLM, reference: CausalLM) -> Iterator[CausalLM]:
    """The mean of both models' weights; raises ModelError where their parameters differ in name or shape."""
    theirs = dict(reference.model.named_parameters())
    for name, parameter in system.model.named_parameters():
        if name not in theirs or theirs[name].shape != parameter.shape:
            raise ModelError(
                f"The weights cannot be averaged: {name!r} differs",
                where=f"{system.spec} and {reference.spec}",
                cure="Leave the baseline averaged out, or use a reference of the same size.",
            )
    with preserved(system.model), torch.no_grad():
        for name, parameter in system.model.named_parameters():
            parameter.data = (parameter.data + theirs[name].data) / 2
        yield system.with_(fingerprint=f"{system.fingerprint}:averaged:{reference.fingerprint}")
