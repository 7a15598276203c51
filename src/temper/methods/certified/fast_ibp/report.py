"""What can be proven of a classifier on labelled images, what an attack finds, and the checks of the one by the other.

Shape letters: P points drawn in a box.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from temper.core.types import Row, Run
from temper.methods.certified.fast_ibp.card import Config
from temper.methods.certified.fast_ibp.first_weights import draw_weights
from temper.methods.certified.fast_ibp.objective import system_box
from temper.ops.bounds import Box, verified_mask
from temper.ops.intervals import Interval, recomputed_margins
from temper.ops.network_bounds import BoundedNetwork
from temper.ops.perturb import pgd, untargeted
from temper.ops.precision import eval_mode
from temper.ops.stats import wilson
from temper.systems.image_classifier import Examples, ImageClassifier

__all__ = ["Findings", "Layer", "layers_of", "look", "rows", "start_rows"]

IMAGES_PER_TOKENS = 32
"""An image counts as so many tokens of the run's budget for one pass."""
CURVE_ATTACKS = 100
"""Images on which PGD is tried at every radius of the curve."""
POINTS = 8
"""Corners of an image's box at which the bounds are tried."""
SLACK = 1e-4
"""Rounding of float32 in a comparison of margins, relative to the largest one."""


class Layer(NamedTuple):
    """What enters one activation layer: sums over all neurons of all images."""

    radius: float
    active: float
    inactive: float
    num: float

    def plus(self, other: Layer) -> Layer:
        return Layer(*(one + two for one, two in zip(self, other, strict=True)))


@dataclass
class Findings:
    """Results image by image, in order, and sums over layers."""

    right: list[bool] = field(default_factory=list)
    verified: list[bool] = field(default_factory=list)
    """At `eps`."""
    margins: list[float] = field(default_factory=list)
    """The least lower bound of z_y - z_j, j != y, at `eps`."""
    further: dict[float, list[bool]] = field(default_factory=dict)
    """At each of `more_eps`."""
    curve: dict[float, list[bool]] = field(default_factory=dict)
    withstood: dict[float, list[bool]] = field(default_factory=dict)
    """Of the first CURVE_ATTACKS images, at each radius of the curve: right, and PGD found nothing there or nearer."""
    fell: list[bool] = field(default_factory=list)
    """Where PGD made a wrong answer or found one; empty without an attack."""
    layers: list[Layer] = field(default_factory=list)
    """The input first."""
    confirmed: list[bool] = field(default_factory=list)
    """Of the checked images that are verified: whether the second computation agrees."""
    margin_gap: float = 0.0
    """Largest difference between the two computations of a margin, relative to the largest margin."""
    num_outside: int = 0
    """Points of a box whose margin lies below its bound."""
    num_points: int = 0
    bounds_s: float = 0.0


def look(system: ImageClassifier, examples: Examples, config: Config, run: Run) -> Findings:
    """Everything that is measured, with the system as it is."""
    found, bounded = Findings(), BoundedNetwork(system.model, system.shape)
    size = max(1, run.batch_tokens // IMAGES_PER_TOKENS)
    starts = range(0, len(examples.class_B), size)
    with eval_mode(system.model):
        for start in run.ticker(starts, total=len(starts), label="certify"):
            part = Examples(*(tensor[start : start + size] for tensor in examples))
            margins_BC = _prove(system, bounded, part, config, found)
            if config.attack_steps:
                _attack(
                    system,
                    part,
                    config,
                    found,
                    [(run.seed << 32) + start + i for i in range(len(part.class_B))],
                )
                _attack_at_radii(system, part, config, found, start, run.seed)
            left = config.checked_rows - start
            if left > 0:
                checked = Examples(part.pixels_BCHW[:left], part.class_B[:left])
                _check(system, checked, margins_BC[:left], config, found, run.seed + start)
    return found


@torch.no_grad()
def _prove(
    system: ImageClassifier, bounded: BoundedNetwork, part: Examples, config: Config, found: Findings
) -> Tensor:
    """Add what the bounds say; gives the margins at `eps`, (B, C)."""
    pixels, labels_B = part
    found.right += (system.logits(pixels).argmax(1) == labels_B).tolist()
    began = time.monotonic()
    inputs = system_box(system, pixels, config.eps)
    bounds = bounded.bounds(inputs, labels_B, hidden=True)
    assert bounds.margins is not None
    found.verified += verified_mask(bounds.margins, labels_B).tolist()
    found.margins += bounds.margins.scatter(1, labels_B[:, None], float("inf")).amin(1).tolist()
    found.bounds_s += time.monotonic() - began
    sums = layers_of([inputs.box, *bounds.hidden])
    found.layers = [
        one.plus(two) for one, two in zip(found.layers or [Layer(0, 0, 0, 0)] * len(sums), sums, strict=True)
    ]
    for eps, kept in [(e, found.further) for e in config.more_eps] + [
        (e, found.curve) for e in _radii(config)
    ]:
        margins = bounded.bounds(system_box(system, pixels, eps), labels_B).margins
        assert margins is not None
        kept.setdefault(eps, []).extend(verified_mask(margins, labels_B).tolist())
    return bounds.margins


def _radii(config: Config) -> list[float]:
    points, top = config.curve_points, min(1.0, 2 * config.eps)
    return list(dict.fromkeys(top * i / max(1, points - 1) for i in range(points)))


def layers_of(boxes: Sequence[Box]) -> list[Layer]:
    """Sums over each box's entries."""
    return [
        Layer(
            float(box.radius.double().sum()),
            float((box.lower > 0).sum()),
            float((box.upper < 0).sum()),
            float(box.centre.numel()),
        )
        for box in boxes
    ]


def _attack(
    system: ImageClassifier, part: Examples, config: Config, found: Findings, seeds: list[int]
) -> None:
    attacked = pgd(
        untargeted(system.logits, part.class_B),
        part.pixels_BCHW,
        config.eps,
        num_steps=config.attack_steps,
        num_restarts=config.attack_restarts,
        seeds=seeds,
    )
    found.fell += attacked.reached_B.tolist()


def _attack_at_radii(
    system: ImageClassifier, part: Examples, config: Config, found: Findings, start: int, seed: int
) -> None:
    """PGD at the curve's radii, smallest first; an image that fell needs no further attack."""
    num = max(0, min(len(part.class_B), CURVE_ATTACKS - start))
    stands_B = torch.ones(num, dtype=torch.bool, device=part.class_B.device)
    for eps in _radii(config) if num else ():
        left_B = stands_B.nonzero().squeeze(1)
        attacked = pgd(
            untargeted(system.logits, part.class_B[left_B]),
            part.pixels_BCHW[left_B],
            eps,
            num_steps=config.attack_steps,
            num_restarts=config.attack_restarts,
            seeds=[(seed << 32) + start + i for i in left_B.tolist()],
        )
        stands_B[left_B] = ~attacked.reached_B
        found.withstood.setdefault(eps, []).extend(stands_B.tolist())


@torch.no_grad()
def _check(
    system: ImageClassifier, part: Examples, margins_BC: Tensor, config: Config, found: Findings, seed: int
) -> None:
    """Departure 4: the margins again, another way and in float64; and corners of each box, which must keep to them."""
    pixels, labels_B = part
    again_BC = recomputed_margins(system.model, system.head, _ends(system, pixels, config.eps), labels_B)
    scale = max(float(again_BC.abs().max()), 1e-30)
    found.margin_gap = max(found.margin_gap, float((again_BC - margins_BC).abs().max()) / scale)
    was, now = verified_mask(margins_BC, labels_B), verified_mask(again_BC, labels_B)
    found.confirmed += now[was].tolist()
    for place in range(len(labels_B)):
        draw = torch.Generator().manual_seed(seed + place)
        signs_PCHW = torch.randint(0, 2, (POINTS, *pixels.shape[1:]), generator=draw).to(pixels) * 2 - 1
        points_PCHW = (pixels[place] + config.eps * signs_PCHW).clamp(0, 1)
        logits_PC = system.logits(points_PCHW)
        gaps_PC = logits_PC[:, labels_B[place], None] - logits_PC
        low_C = margins_BC[place] - SLACK * margins_BC.abs().max()
        found.num_outside += int((gaps_PC < low_C).any(dim=1).sum())
        found.num_points += POINTS


def _ends(system: ImageClassifier, pixels: Tensor, eps: float) -> Interval:
    """The ends of the box as the model takes them, in float64, from the pixels alone."""
    wide = pixels.double()
    shift = wide.new_tensor(system.mean or (0.0,))[:, None, None]
    scale = wide.new_tensor(system.std or (1.0,))[:, None, None]
    return Interval(*(((wide + side * eps).clamp(0, 1) - shift) / scale for side in (-1, 1)))


def rows(found: Findings, ids: Sequence[str], config: Config) -> Iterator[Row]:
    """The findings as rows; a certificate for each image: `certified`, 1 or 0, and the margin that is proven."""
    n = len(ids)
    yield _rate("standard_error", [not right for right in found.right])
    yield _rate("verified_error", [not verified for verified in found.verified])
    for eps, verified in found.further.items():
        yield _rate("verified_error", [not one for one in verified], group=f"eps {eps:g}")
    if found.fell:
        yield _rate("pgd_error", found.fell)
        broken = sum(a and b for a, b in zip(found.fell, found.verified, strict=True))
        yield Row(
            metric="broken_certificates", value=float(broken), n=n, split="test", higher_is_better=False
        )
    yield from _layer_rows(found.layers, "")
    yield from _check_rows(found)
    yield Row(metric="certify_s", value=found.bounds_s / n, n=n, split="test", higher_is_better=False)
    for name, is_verified, margin in zip(ids, found.verified, found.margins, strict=True):
        yield Row(metric="proven_margin", value=margin, item=name, split="test", higher_is_better=True)
        yield Row(
            metric="certified", value=float(is_verified), item=name, split="test", higher_is_better=True
        )


def _check_rows(found: Findings) -> Iterator[Row]:
    if not found.num_points:
        return
    count = len(found.confirmed)
    yield Row(
        metric="certificates_confirmed", value=sum(found.confirmed) / count if count else None, n=count, split="test",
        note="" if count else "none of the checked images is verified", higher_is_better=True,
    )  # fmt: skip
    yield Row(metric="margin_gap", value=found.margin_gap, n=found.num_points // POINTS, split="test")
    yield Row(metric="points_outside", value=float(found.num_outside), n=found.num_points, split="test")


def _rate(metric: str, hits: Sequence[bool], group: str = "") -> Row:
    """A share of images with Wilson's interval."""
    rate = wilson(sum(hits), len(hits))
    return Row(
        metric=metric, value=rate.value, n=rate.n, stderr=rate.stderr, low=rate.low, high=rate.high, group=group,
        split="test", higher_is_better=False,
    )  # fmt: skip


def _layer_rows(layers: Sequence[Layer], prefix: str) -> Iterator[Row]:
    """Growth of boxes and states of neurons: of the last hidden layer and over all, then layer by layer."""
    source, *hidden = layers
    if not hidden:
        return
    start = source.radius / source.num
    named = [(f"layer {i}", layer) for i, layer in enumerate(hidden, 1)]
    for group, layer in [("", hidden[-1]), *named]:
        growth = layer.radius / layer.num / start if start else None
        yield Row(
            metric=f"{prefix}growth", value=growth, n=int(layer.num), group=group, split="test",
            note="" if start else "the box has no radius",
        )  # fmt: skip
    total = hidden[0]
    for layer in hidden[1:]:
        total = total.plus(layer)
    for group, layer in [("", total), *named]:
        shares: Mapping[str, float] = {
            "active_share": layer.active / layer.num,
            "inactive_share": layer.inactive / layer.num,
            "unstable_share": 1 - (layer.active + layer.inactive) / layer.num,
        }
        for name, share in shares.items():
            yield Row(metric=prefix + name, value=share, n=int(layer.num), group=group, split="test")


@torch.no_grad()
def start_rows(system: ImageClassifier, examples: Examples, config: Config, run: Run) -> Iterator[Row]:
    """The same of a copy with the first weights of `init`, on one batch, whose statistics batch norm takes."""
    bounded = BoundedNetwork(copy.deepcopy(system.model), system.shape)
    draw_weights(bounded, config.init, run.seed)
    bounded.network.train()
    pixels, labels_B = (tensor[: config.batch_rows] for tensor in examples)
    inputs = system_box(system, pixels, config.eps)
    found = bounded.bounds(inputs, labels_B, hidden=True)
    yield from _layer_rows(layers_of([inputs.box, *found.hidden]), "start_")
