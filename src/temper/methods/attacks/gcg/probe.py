"""Probe sampling: a cheap draft model looks at all candidates, the attacked one at those that may matter."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from temper.core.errors import ConfigError
from temper.core.types import Run
from temper.ops.search import require_same_vocabulary
from temper.ops.search_losses import Scores
from temper.systems import anchors
from temper.systems.causal_lm import CausalLM

__all__ = [
    "Probed",
    "agreement",
    "first_layers",
    "most_scored",
    "num_layers_of",
    "open_draft",
    "probe_sample",
]

PROBE_SHARE = 16


class Probed(NamedTuple):
    """The candidates that the attacked model scored, by row, their scores, and how well the draft agreed."""

    rows: Tensor
    scores: Scores
    alpha: float


def agreement(draft_K: Tensor, target_K: Tensor) -> float:
    """Alpha = (1 + Spearman's correlation) / 2; 0 where it is undefined."""
    from scipy.stats import rankdata

    draft, target = (torch.from_numpy(rankdata(loss.numpy())) for loss in (draft_K, target_K))
    draft, target = draft - draft.mean(), target - target.mean()
    length = float(draft.norm() * target.norm())
    return (1 + float(draft @ target) / length) / 2 if length else 0.0


def most_scored(num: int, reduction: float) -> int:
    """Candidates of `num` that the attacked model scores at most: the probe set, and the draft's best where alpha is 0."""
    return min(num, max(1, num // PROBE_SHARE) + max(1, int(num / reduction)))


def probe_sample(
    ids_KN: Tensor,
    score: Callable[[Tensor], Scores],
    draft: Callable[[Tensor], Tensor],
    generator: torch.Generator,
    reduction: float,
) -> Probed:
    """Scores of a random probe set and of the draft's best; no candidate is scored twice."""
    num = len(ids_KN)
    draft_K = draft(ids_KN)
    probe = torch.randperm(num, generator=generator)[: max(1, num // PROBE_SHARE)]
    probed = score(ids_KN[probe])
    alpha = agreement(draft_K[probe], probed.loss_K)
    best = draft_K.argsort(stable=True)[: max(1, int((1 - alpha) * num / reduction))]
    rest = best[~torch.isin(best, probe)]
    if not len(rest):
        return Probed(probe, probed, alpha)
    more = score(ids_KN[rest])
    both = Scores(torch.cat([probed.loss_K, more.loss_K]), torch.cat([probed.hit_K, more.hit_K]))
    return Probed(torch.cat([probe, rest]), both, alpha)


@contextmanager
def first_layers(model: Any, num: int) -> Iterator[None]:
    """The model with its first `num` layers alone, sharing its weights; whole again afterwards."""
    whole = anchors.unwrap(model)
    parent, _, name = anchors.anchors_of(model).layers.rpartition(".")
    owner = whole.get_submodule(parent)
    layers = getattr(owner, name)
    setattr(owner, name, nn.ModuleList(list(layers)[:num]))
    try:
        yield
    finally:
        setattr(owner, name, layers)


def num_layers_of(draft: str, system: CausalLM) -> int | None:
    """K of `layers:K`, None for the name of a model; raises ConfigError for a K that the model has not."""
    if not draft.startswith("layers:"):
        return None
    have = len(anchors.layers(system.model))
    match = re.fullmatch(r"layers:(\d+)", draft)
    if match is None or not 1 <= int(match[1]) < have:
        raise ConfigError(
            f"draft {draft!r} names no shorter model", cure=f"Write layers:1 to layers:{have - 1}."
        )
    return int(match[1])


def open_draft(draft: str, system: CausalLM, run: Run) -> CausalLM:
    """The draft model of a name; raises ConfigError where its vocabulary is another."""
    from temper.systems.loading import load_base

    opened = load_base(draft, device=run.device)
    if not isinstance(opened, CausalLM):
        raise ConfigError(f"draft {draft!r} is no local model", cure="Name a base model, or layers:K.")
    require_same_vocabulary([system, opened])
    return opened
