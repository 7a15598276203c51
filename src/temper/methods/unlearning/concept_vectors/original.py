"""The original that a system is compared with: its vectors and answers, taken here or kept by an earlier measure."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from temper.artefacts.opening import opened
from temper.core.errors import ConfigError, DataError
from temper.core.types import Json, Run
from temper.methods.unlearning.concept_vectors.behaviour import (
    SCORED,
    Answer,
    Ask,
    answers_of,
    asks_of,
    ids_of,
)
from temper.methods.unlearning.concept_vectors.card import ORIGINAL, Config
from temper.methods.unlearning.concept_vectors.items import Item
from temper.methods.unlearning.concept_vectors.mining import lexicon_mask, vocabulary_words
from temper.ops.batching import Example
from temper.ops.logprobs import response_logprobs
from temper.ops.value_vectors import Place, output_embedding, top_tokens, vectors_at
from temper.systems.causal_lm import CausalLM

__all__ = ["State", "load_original", "places_of", "read_state", "take_state", "unlike_mined", "write_state"]

logger = logging.getLogger(__name__)

TENSORS, ANSWERS = "original.safetensors", "original.json"
SETTINGS = ("top_k", "reply_tokens", "plain", "drift_rows")
"""Settings that two states must share to be compared."""


class State(NamedTuple):
    """A model as far as it is compared: R rows of its output embedding, an answer for each user turn."""

    places: tuple[Place, ...]
    vectors_PD: Tensor
    top_ids_PK: Tensor
    lexicons: tuple[tuple[int, ...], ...]
    """Ids of each concept's words."""
    embedding_RD: Tensor
    answers: Mapping[str, Answer]
    settings: Mapping[str, Json]
    """Those by which it was taken, and the shape of its output embedding; none where an earlier version recorded it."""
    fingerprint: str = ""
    """The system's; "" where an earlier version recorded the state."""


def places_of(items: Sequence[Item], *, control: bool = False) -> list[Place]:
    """The items' vectors, or their random columns; raises DataError for an item without one."""
    found = [item.control if control else item.place for item in items]
    for item, place in zip(items, found, strict=True):
        if place is None:
            column = "Control" if control else "Layer and Dim"
            raise DataError(
                f"The row names no vector: {column} is missing",
                where=f"concept {item.concept!r}",
                cure="Find one: make concept-vectors on the original model, and give what it makes.",
            )
    return [place for place in found if place is not None]


def take_state(
    system: CausalLM,
    items: Sequence[Item],
    config: Config,
    run: Run,
    told: Mapping[str, Answer] | None = None,
) -> State:
    """The system's vectors, what they say, and its answers; `told` are the answers whose log-probability is read
    (the original's; its own where it is the original).
    """
    places = places_of(items)
    vectors_PD = vectors_at(system.model, places).cpu()
    embedding_VD = output_embedding(system.model)
    top = top_tokens(vectors_PD.to(embedding_VD.device), embedding_VD, config.top_k)
    words = vocabulary_words(system)
    masks = [lexicon_mask(system, words, item.text) for item in items]
    asks = [ask for item in items for ask in asks_of(item, config)]
    answers = answers_of(system, asks, config, run)
    scored = {ask.user: ask for ask in asks if ask.kind in SCORED}
    logp = _logp(system, scored, told or answers, config, run)
    return State(
        places=tuple(places),
        vectors_PD=vectors_PD,
        top_ids_PK=top.ids_PK.cpu(),
        lexicons=tuple(tuple(mask_V.nonzero()[:, 0].tolist()) for mask_V in masks),
        embedding_RD=embedding_VD[_drift_rows(len(embedding_VD), config.drift_rows)].float().cpu(),
        answers={user: answer._replace(logp=logp.get(user)) for user, answer in answers.items()},
        settings=_settings(system, config),
        fingerprint=system.fingerprint,
    )


def _settings(system: CausalLM, config: Config) -> dict[str, Json]:
    """What two states must share to be compared, beside what is asked."""
    shape = list(output_embedding(system.model).shape)
    return {**{name: getattr(config, name) for name in SETTINGS}, "output_embedding": shape}


def _drift_rows(num_ids: int, most: int) -> Tensor:
    """Evenly spread rows, the same for every model."""
    return torch.linspace(0, num_ids - 1, min(num_ids, most)).long()


def _logp(
    system: CausalLM, scored: Mapping[str, Ask], told: Mapping[str, Answer], config: Config, run: Run
) -> dict[str, float]:
    """Mean log-probability a token of each told answer after its question, under this system."""
    rows = []
    for user, ask in scored.items():
        prompt, reply = ids_of(system, ask, config), told[user].ids
        rows.append(Example([*prompt, *reply], [False] * len(prompt) + [True] * len(reply)))
    found = response_logprobs(system, rows, reduce="mean", run=run).tolist()
    return dict(zip(scored, found, strict=True))


def write_state(state: State, folder: Path) -> None:
    """Keep a state in a folder, for later measures."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"vectors": state.vectors_PD, "top_ids": state.top_ids_PK, "embedding": state.embedding_RD}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / TENSORS)
    told = {
        "places": [list(place) for place in state.places],
        "lexicons": [list(ids) for ids in state.lexicons],
        "answers": {user: list(answer) for user, answer in state.answers.items()},
        "settings": dict(state.settings),
        "fingerprint": state.fingerprint,
    }
    (folder / ANSWERS).write_text(json.dumps(told, ensure_ascii=False), encoding="utf-8")


def read_state(folder: Path) -> State:
    """The state that `write_state` kept."""
    tensors = load_file(folder / TENSORS)
    told = json.loads((folder / ANSWERS).read_text(encoding="utf-8"))
    return State(
        places=tuple(Place(*place) for place in told["places"]),
        vectors_PD=tensors["vectors"],
        top_ids_PK=tensors["top_ids"],
        lexicons=tuple(map(tuple, told["lexicons"])),
        embedding_RD=tensors["embedding"],
        answers={user: Answer(*answer) for user, answer in told["answers"].items()},
        settings=told.get("settings", {}),
        fingerprint=told.get("fingerprint", ""),
    )


def load_original(system: CausalLM, items: Sequence[Item], config: Config, run: Run) -> State:
    """The original that the config names, with all that is asked of it here.

    Raises ConfigError for a folder that holds no original, or one of other items or settings, and for an original of
    another width or vocabulary.
    """
    path, settings = Path(config.reference), _settings(system, config)
    folder = path.parent if path.suffix == ".jsonl" else path
    kept = [folder, *sorted(folder.glob("steps/*"))] if folder.is_dir() else []
    found = next((place for place in kept if (place / ANSWERS).is_file()), None)
    if found is not None:
        state = read_state(found)
        _check_settings(state.settings, settings, str(found))
        return _checked(state, items, config, str(found))
    is_artefact = (path / "artefact.json").is_file()
    is_file = path.suffix == ".jsonl"
    if (kept or is_file) and not is_artefact and not (path / "config.json").is_file():
        raise ConfigError(
            "There is no recorded original",
            where=config.reference,
            cure="Name a run of measure concept-vectors without reference, an artefact, or a system.",
        )
    spec = system.spec if config.reference == ORIGINAL else config.reference
    spec = f"{system.spec}+{spec}" if is_artefact else spec
    with opened(spec, device=run.device, system_prompt=system.chat.system_prompt) as base:
        _check_settings(_settings(base, config), settings, spec)
        return take_state(base, items, config, run)


def unlike_mined(original: State, items: Sequence[Item]) -> str:
    """A warning, logged and returned, where vectors were found in another system than the original; else ""."""
    known = [item for item in items if item.mined_on and original.fingerprint]
    others = [item.concept for item in known if item.mined_on != original.fingerprint]
    if not others:
        return ""
    said = (
        f"the original is not the system whose vectors these are: it may never have known {', '.join(others)}"
    )
    logger.warning("%s; name the one that make read (step:ID of its fit, or of a measure on it)", said)
    return said


def _checked(state: State, items: Sequence[Item], config: Config, where: str) -> State:
    users = {ask.user for item in items for ask in asks_of(item, config)}
    if list(state.places) != places_of(items) or not users <= set(state.answers):
        raise ConfigError(
            "The recorded original was asked other questions or has other vectors",
            where=where,
            cure="Record it with the same data and settings.",
        )
    return state


def _check_settings(theirs: Mapping[str, Json], ours: Mapping[str, Json], where: str) -> None:
    """Raise ConfigError where an original's `_settings` are others than this measure's."""
    others = [name for name in ours if theirs.get(name) != ours[name]]
    if others:
        told = "; ".join(f"{name} {theirs.get(name, 'not recorded')}, here {ours[name]}" for name in others)
        raise ConfigError(
            f"The original cannot be compared: {told}",
            where=where,
            cure="Name the model that this one was made from, measured again with these settings.",
        )
