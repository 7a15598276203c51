"""Four ways to tamper with a model that one holds; the arithmetic of two of them is in `ops/tamper.py`."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator, Mapping
from functools import partial

from torch import Tensor, nn

from temper.artefacts import Artefact, Steer, Tune
from temper.artefacts.base import only_full_strength
from temper.artefacts.fine_tuning import fine_tuned
from temper.artefacts.preserved import replace_tensor
from temper.artefacts.targets import ALL_LINEAR, target_modules
from temper.core.errors import DataError
from temper.core.types import Json, Run
from temper.data.schemas import Data, Dialogue
from temper.data.trained_rows import keep_trained
from temper.methods.attacks.tampering.card import Config
from temper.ops.batching import encode
from temper.ops.tamper import pruned, rounded
from temper.ops.train import TrainSettings
from temper.systems.causal_lm import CausalLM
from temper.systems.opening import Opening

__all__ = ["build_steer", "change_of", "first_tokens", "fit"]

SLUG = "tampering"


def fit(system: CausalLM, data: Data, config: Config, run: Run) -> Artefact:
    """The change that the attack makes to the system, as an artefact that stands on it."""
    return ATTACKS[config.how](system, data, config, run)


def _finetune(system: CausalLM, data: Data, config: Config, run: Run) -> Artefact:
    records = _needed(data, "Fine-tuning", "take how=quantise or prune")
    held = random.Random(f"{run.seed}/held").sample(records, max(1, math.ceil(config.share * len(records))))
    keep_trained(run.folder, held)
    examples = [encode(system, record, max_tokens=config.max_tokens) for record in held]
    settings = TrainSettings(lr=config.lr, max_steps=config.num_steps, batch_rows=config.batch_rows)
    tune = Tune(mode=config.mode, r=config.rank, alpha=2.0 * config.rank)
    with fine_tuned(system, examples, tune, settings, run) as done:
        return done.tuned.finish(SLUG)


def _needed(data: Data, what: str, other: str) -> tuple[Dialogue, ...]:
    """The given rows; raises DataError where there are none."""
    records = data.records("train", Dialogue)
    if not records:
        raise DataError(
            f"{what} needs rows", where=data.source, cure=f"Give them (--data train=FILE), or {other}."
        )
    return records


def _prefill(system: CausalLM, data: Data, config: Config, run: Run) -> Artefact:
    """How replies are begun: one text for all, or the first tokens of each known answer."""
    known: dict[str, Json] = {}
    if config.known_tokens:
        for record in _needed(data, "Prefilling known answers", "set known_tokens=0"):
            asked = system.rewritten(record.prompt)[-1].content
            if not record.reply:
                raise DataError("A row has no answer to begin", where=f"row {record.id}", cure="Give it one.")
            known[asked] = first_tokens(system, record.reply, config.known_tokens)
    settings = {"how": config.how, "opening": "" if known else config.opening, "known": known}
    return Steer(system.fingerprint, SLUG, settings)


def first_tokens(system: CausalLM, reply: str, num_tokens: int) -> str:
    """The reply's first tokens as text, never its last one; more where a token ends within a character."""
    ids = system.chat.continuation_ids(reply)
    for end in range(max(1, min(num_tokens, len(ids) - 1)), len(ids)):
        text = str(system.tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False))
        if reply.startswith(text):
            return text
    return reply


def _rule(system: CausalLM, data: Data, config: Config, run: Run) -> Artefact:
    """What is done to each matrix, as a rule: it is carried out anew whenever the artefact is applied."""
    settings = {
        "how": config.how,
        "bits": config.bits,
        "group_size": config.group_size,
        "dynamic": config.dynamic,
        "sparsity": config.sparsity,
    }
    change_of(settings)(
        next(iter(_matrices(system).values())).data[:1]
    )  # a setting that cannot be stops here
    return Steer(system.fingerprint, SLUG, settings)


@contextlib.contextmanager
def build_steer(system: CausalLM, artefact: Steer, strength: float) -> Iterator[CausalLM | None]:
    """Every linear layer's weights but the vocabulary's, changed by the rule (Departure 2); or replies begun."""
    only_full_strength(artefact, strength)
    if artefact.settings["how"] == "prefill":
        opening = Opening(artefact.settings["opening"], artefact.settings["known"])
        yield system.with_(chat=system.chat.with_(opening=opening))
        return
    change = change_of(artefact.settings)
    for name, parameter in _matrices(system).items():
        replace_tensor(system.model, name, change(parameter.data))
    modules = _linear(system) if artefact.settings.get("dynamic") else ()
    handles = [module.register_forward_pre_hook(_round_input) for module in modules]
    try:
        yield None
    finally:
        for handle in handles:
            handle.remove()


def _round_input(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Each token's inputs on a grid of 8 bits; gradients pass as if they were not rounded."""
    inputs = args[0]
    on_grid = rounded(inputs.detach().flatten(0, -2), 8).view_as(inputs)
    return (inputs + (on_grid - inputs).detach(), *args[1:])


def change_of(settings: Mapping[str, Json]) -> Callable[[Tensor], Tensor]:
    """The change of one matrix."""
    if settings["how"] == "prune":
        return partial(pruned, share=settings["sparsity"])
    return partial(rounded, bits=settings["bits"], group=settings["group_size"])


def _linear(system: CausalLM) -> list[nn.Module]:
    return [system.model.get_submodule(name) for name in target_modules(system.model, ALL_LINEAR)]


def _matrices(system: CausalLM) -> dict[str, nn.Parameter]:
    names = [f"{name}.weight" for name in target_modules(system.model, ALL_LINEAR)]
    return {name: system.model.get_parameter(name) for name in names}


ATTACKS: dict[str, Callable[[CausalLM, Data, Config, Run], Artefact]] = {
    "finetune": _finetune,
    "quantise": _rule,
    "prune": _rule,
    "prefill": _prefill,
}
