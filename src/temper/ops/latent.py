"""Attacks on what flows inside a language model: a perturbation at embeddings, MLP outputs or the residual stream.

A site has one delta for each attacked row and position, (N, P, D), added to what flows there; every token's part stays
in an L2 ball. Column t of a delta belongs to column t of the rows, which are padded on the right: rows that begin with one
prompt share a delta there. N counts attacked rows, P their positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from temper.core.errors import ConfigError, DataError, ModelError, NumericsError
from temper.ops.batching import Batch, Example
from temper.ops.hooks import capture, edit, resolve_site
from temper.ops.perturb import project
from temper.systems import anchors

__all__ = [
    "EMBEDDINGS",
    "Ball",
    "Found",
    "Perturbation",
    "Scale",
    "attack",
    "embedding_scale",
    "frozen",
    "shared_prompt",
    "site_scales",
    "spread_sites",
]

EMBEDDINGS = "embeddings.output"
"""The token embeddings as the embedding module gives them: what `inputs_embeds` takes, before any factor of the model."""

NO_LIMITS = (-math.inf, math.inf)
ON_BOUNDARY = 0.999
"""A token counts as on the boundary from this share of the radius."""


class Scale(NamedTuple):
    """How long a token's vector is at a site, and how many numbers it has."""

    norm: float
    width: int
    factor: float = 1.0
    """What an embedding module multiplies its rows by; then steps given for rows are multiplied by it too."""


class Ball(NamedTuple):
    """What a token's perturbation at a site may be, and the step of its search."""

    radius: float
    """Largest L2 norm."""
    width: int
    lr: float
    """Step of a number of the delta: what the sign is multiplied by, or AdamW's learning rate."""


def spread_sites(model: nn.Module) -> tuple[str, ...]:
    """The embeddings and the MLP outputs of four layers spread over the depth: 8, 16, 24 and 30 of 32."""
    count = len(anchors.layers(model))
    numbers = {min(count - 1, place) for place in (count // 4, count // 2, 3 * count // 4, max(0, count - 2))}
    return (EMBEDDINGS, *(f"layers.{number}.mlp.output" for number in sorted(numbers)))


@torch.no_grad()
def embedding_scale(model: nn.Module, chunk: int = 8192) -> Scale:
    """The mean norm over the rows of the embedding as its module gives them, scaled by some (Gemma) and not by others."""
    module = anchors.embeddings(model)
    weight_VD: Tensor = module.weight  # type: ignore[assignment]
    given, own, width = 0.0, 0.0, 0
    for ids_C in torch.arange(len(weight_VD), device=weight_VD.device).split(chunk):
        rows_CD = module(ids_C).float()
        given, width = given + float(rows_CD.norm(dim=-1).sum()), rows_CD.shape[-1]
        own += float(weight_VD[ids_C].float().norm(dim=-1).sum())
    return Scale(given / len(weight_VD), width, given / own)


@torch.no_grad()
def site_scales(model: nn.Module, batches: Iterable[Batch], sites: Sequence[str]) -> dict[str, Scale]:
    """The median norm over real tokens at each site, by its full name; `layers.*` gives one a layer.

    Raises ConfigError for a name that is no site, DataError without batches.
    """
    names = [site.name for name in sites for site in resolve_site(model, name)]
    norms: dict[str, list[Tensor]] = {name: [] for name in names}
    widths: dict[str, int] = {}
    for batch in batches:
        with capture(model, names) as seen:
            model(input_ids=batch.ids_BT, attention_mask=batch.mask_BT.long(), use_cache=False)
        for name in names:
            hidden_SD = seen[name][batch.mask_BT].float()
            norms[name].append(hidden_SD.norm(dim=-1))
            widths[name] = hidden_SD.shape[-1]
    if not widths:
        raise DataError("There are no rows to measure a site on", cure="Give at least one.")
    return {name: Scale(float(torch.cat(norms[name]).median()), widths[name]) for name in names}


def shared_prompt(rows: Sequence[Example], where: str = "") -> int:
    """How many tokens the rows' common prompt has: all before the first scored one.

    Raises DataError for a row whose reply begins at once, and for rows with different prompts: a delta would
    stand beside other tokens in each.
    """
    starts = [row.scored.index(True) for row in rows]
    if len({tuple(row.ids[:start]) for row, start in zip(rows, starts, strict=True)}) > 1:
        raise DataError(
            "The good and the bad reply follow different prompt tokens, so one perturbation cannot stand on both",
            where=where,
            cure="Give both replies the same prompt, and a template that ends the prompt in whole tokens.",
        )
    if not starts[0]:
        raise DataError("A row has no prompt to perturb", where=where, cure="Give it a prompt.")
    return starts[0]


@dataclass(frozen=True, eq=False)
class Perturbation:
    """A delta a site, (N, P, D) float32, and where it counts, (N, P) bool."""

    deltas: Mapping[str, Tensor]
    mask_NP: Tensor

    @contextmanager
    def applied(self, model: nn.Module, rows: Sequence[int | None]) -> Iterator[None]:
        """Forward passes in the block, of `len(rows)` rows, add to row b the delta of attacked row `rows[b]`; None adds nothing.

        Nothing is kept between passes, so recomputed activations get the same: stay in the block for the backward
        pass where activations are computed again. A pass over one token (a step of decoding) is left alone.
        Raises ModelError for a pass with another number of rows.
        """
        device = self.mask_NP.device
        row_B = torch.tensor([0 if row is None else row for row in rows], device=device)
        counts_B = torch.tensor([row is not None for row in rows], device=device)
        mask_BP1 = (self.mask_NP[row_B] & counts_B[:, None])[..., None]
        edits = {site: partial(_shifted, delta, row_B, mask_BP1) for site, delta in self.deltas.items()}
        with edit(model, edits):
            yield

    def norms(self) -> dict[str, Tensor]:
        """The L2 norm of each perturbed token at each site, (S,)."""
        return {site: delta.detach().norm(dim=-1)[self.mask_NP] for site, delta in self.deltas.items()}

    def boundary_share(self, balls: Mapping[str, Ball]) -> float:
        """The share of tokens, over all sites, whose delta is as long as it may be."""
        on = [norm_S >= ON_BOUNDARY * balls[site].radius for site, norm_S in self.norms().items()]
        return float(torch.cat(on).float().mean())


def _shifted(delta_NPD: Tensor, row_B: Tensor, mask_BP1: Tensor, hidden_BTD: Tensor) -> Tensor | None:
    """The hidden states with their rows' deltas added, in a new tensor."""
    num_rows, num_columns = hidden_BTD.shape[:2]
    if num_columns == 1:
        return None
    if num_rows != len(row_B):
        raise ModelError(
            f"A forward pass has {num_rows} rows and the perturbation is laid out for {len(row_B)}",
            cure="Pass one entry of `rows` for each row of the batch, without packing.",
        )
    shift_BPD = (delta_NPD[row_B] * mask_BP1)[:, :num_columns]
    missing = num_columns - shift_BPD.shape[1]
    return hidden_BTD + nn.functional.pad(shift_BPD, (0, 0, 0, missing)).to(hidden_BTD)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter takes a gradient and no dropout acts; afterwards flags and modes are as they were, also after an error."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(part, part.training) for part in model.modules()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for part, _ in modes:
            # Layers look at their own mode to decide whether activations are computed again.
            part.training &= getattr(part, "gradient_checkpointing", False)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for part, training in modes:
            part.training = training


@dataclass(frozen=True, eq=False)
class Found:
    """What a search came to: the last perturbation, each row's loss before and after, and what it cost."""

    perturbation: Perturbation
    before_N: Tensor
    after_N: Tensor
    boundary_share: float
    num_forward: int = 0
    """Forward passes."""
    num_backward: int = 0
    way: tuple[float, ...] = ()
    """The mean loss after every step, the first at delta = 0."""


def attack(
    model: nn.Module,
    losses: Callable[[], Tensor],
    mask_NP: Tensor,
    rows: Sequence[int | None],
    balls: Mapping[str, Ball],
    *,
    num_steps: int,
    step: Literal["sign", "adamw"] = "adamw",
) -> Found:
    """Lower `losses()`, the (N,) losses of the attacked rows in a forward pass of `len(rows)` rows, from delta = 0 on.

    Every row's delta follows its own loss alone, so who shares its batch changes nothing. The model's parameters are
    frozen meanwhile and no gradient is left on them. Raises ConfigError without positions to perturb, NumericsError
    when a delta is not finite.
    """
    if not bool(mask_NP.any(1).all()):
        raise ConfigError("A row has no position to perturb", cure="Mark at least one in its mask.")
    shape = mask_NP.shape
    deltas = {site: torch.zeros(*shape, ball.width, device=mask_NP.device) for site, ball in balls.items()}
    perturbation = Perturbation(deltas, mask_NP)
    optimizer = _optimizer(deltas, balls) if step == "adamw" else None
    seen: list[Tensor] = []
    with frozen(model), torch.enable_grad():
        for _ in range(num_steps):
            for delta in deltas.values():
                delta.requires_grad_()
            with perturbation.applied(model, rows):
                loss_N = losses()
                grads = torch.autograd.grad(loss_N.sum(), list(deltas.values()))
            seen.append(loss_N.detach())
            _move(deltas, grads, balls, optimizer)
        for delta in deltas.values():
            delta.requires_grad_(False)
        with torch.no_grad(), perturbation.applied(model, rows):
            seen.append(losses())
    return Found(
        perturbation,
        seen[0],
        seen[-1],
        perturbation.boundary_share(balls),
        num_forward=len(seen),
        num_backward=num_steps,
        way=tuple(float(loss_N.mean()) for loss_N in seen),
    )


def _optimizer(deltas: Mapping[str, Tensor], balls: Mapping[str, Ball]) -> torch.optim.Optimizer:
    groups = [{"params": [delta], "lr": balls[site].lr} for site, delta in deltas.items()]
    return torch.optim.AdamW(groups, weight_decay=0.0)


@torch.no_grad()
def _move(
    deltas: Mapping[str, Tensor],
    grads: Sequence[Tensor],
    balls: Mapping[str, Ball],
    optimizer: torch.optim.Optimizer | None,
) -> None:
    """One step down, then back into the ball, in place."""
    for (site, delta), grad in zip(deltas.items(), grads, strict=True):
        if optimizer is None:
            delta.sub_(balls[site].lr * grad.sign())
        else:
            delta.grad = grad
    if optimizer is not None:
        optimizer.step()
    for site, delta in deltas.items():
        delta.grad = None
        flat_SD = delta.view(-1, delta.shape[-1])
        flat_SD.copy_(project(flat_SD, torch.zeros_like(flat_SD), balls[site].radius, "l2", NO_LIMITS))
        if not bool(torch.isfinite(delta).all()):
            raise NumericsError(
                "A perturbation is not finite",
                where=site,
                cure="Attack in float32, or lower the radius: the model's outputs overflow near these rows.",
            )
