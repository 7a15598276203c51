"""What training minimises: the schedule of eps, the two regularisers, and the robust loss of a batch of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from temper.methods.certified.fast_ibp.card import Config
from temper.ops.bounds import Box, Inputs, input_box, robust_losses
from temper.ops.linear_bounds import linear_margins, mixed_margins
from temper.ops.network_bounds import BoundedNetwork
from temper.ops.objectives import SumCount
from temper.systems.image_classifier import Examples, ImageClassifier

__all__ = ["BoxObjective", "relu_loss", "scheduled_eps", "system_box", "tightness_loss"]

SMALL_EPS = 1e-6
"""Radius of the boxes that the regularisers look at while eps is 0."""
TINY = 1e-12


def scheduled_eps(step: int, steps_per_epoch: int, clean_epochs: int, ramp_epochs: int, eps: float) -> float:
    """eps_t of step 0, 1, ...: 0, then a quartic up to a quarter of the ramp, then linear, then `eps`."""
    s, length = step - clean_epochs * steps_per_epoch, ramp_epochs * steps_per_epoch
    if s >= length:
        return eps
    mid = length // 4
    alpha = eps / ((length - mid) * 4 * mid**3 + mid**4) if mid else 0.0
    if s < mid:
        return alpha * float(max(s, 0)) ** 4
    start = alpha * float(mid) ** 4
    return start + (eps - start) * (s - mid) / (length - mid) if s > 0 else 0.0


def tightness_loss(radius0: Tensor, boxes: Sequence[Box], tau: float) -> Tensor:
    """L_tight: boxes may not grow beyond 1 / tau of the input's; `radius0` is the mean radius of the input."""
    ratios_I = torch.stack([radius0 / box.radius.mean().clamp(min=TINY) for box in boxes])
    return F.relu(tau - ratios_I).mean() / tau


def relu_loss(boxes: Sequence[Box], tau: float) -> Tensor:
    """L_relu: active and inactive neurons share the centres' mass and variance."""
    return torch.stack([_imbalance(box, tau) for box in boxes]).mean() / tau


def _imbalance(box: Box, tau: float) -> Tensor:
    mean = box.centre.mean()
    shifted = box.centre - mean
    sides = []
    for mask in (box.lower > 0, box.upper < 0):
        part, count = shifted * mask.to(shifted.dtype), mask.sum()
        # sum c and sum (c - mean c)^2 over the side.
        sides.append((part.sum() + mean * count, torch.linalg.vector_norm(part).square(), count))
    (mass_A, spread_A, num_A), (mass_N, spread_N, num_N) = sides
    mass, spread = _balance(mass_A, -mass_N), _balance(spread_A, spread_N)
    # Departure 2: a ratio without one of its sides says nothing.
    return (F.relu(tau - mass) + F.relu(tau - spread)) * ((num_A > 0) & (num_N > 0))


def _balance(one: Tensor, other: Tensor) -> Tensor:
    """min(a, 1/a) of a = one / other."""
    return torch.minimum(one, other) / torch.maximum(one, other).clamp(min=TINY)


def system_box(system: ImageClassifier, pixels: Tensor, eps: float) -> Inputs:
    """The pixels and the box around them as the system's model takes them."""
    return input_box(pixels, eps, mean=system.mean or None, std=system.std or None)


class BoxObjective:
    """The loss of a batch of images, given by their places in `examples`; `at_step` sets the step's eps."""

    unsplittable: ClassVar[bool] = True

    def __init__(
        self, system: ImageClassifier, bounded: BoundedNetwork, examples: Examples, config: Config
    ) -> None:
        self.system, self.bounded, self.examples, self.config = system, bounded, examples, config
        self.eps, self.is_warm_up = 0.0, False

    def at_step(self, step: int, steps_per_epoch: int) -> None:
        """Set eps and whether the regularisers act."""
        given = self.config
        self.eps = scheduled_eps(step, steps_per_epoch, given.clean_epochs, given.ramp_epochs, given.eps)
        self.is_warm_up = step < (given.clean_epochs + given.ramp_epochs) * steps_per_epoch

    @property
    def weights(self) -> Mapping[str, float]:
        """1 for the loss; the regularisers' falls to 0 as eps grows."""
        share = 1 - self.eps / self.config.eps if self.config.eps else 0.0
        return {"clean": 1.0, "robust": 1.0} | {name: self.config.reg_weight * share for name in self._names}

    @property
    def _names(self) -> tuple[str, ...]:
        acts = self.is_warm_up and self.config.reg_weight and self.config.eps
        return self.config.regularisers if acts else ()

    def counts(self, items: Sequence[int]) -> dict[str, float]:
        """Images for the loss; a regulariser is one number of the whole batch."""
        return {"robust" if self.eps else "clean": float(len(items))} | dict.fromkeys(self._names, 1.0)

    def __call__(self, model: nn.Module, items: Sequence[int]) -> dict[str, SumCount]:
        """Robust loss, or cross-entropy while eps is 0, and the regularisers that act."""
        pixels, labels_B = self._batch(list(items))
        names = self._names
        inputs = system_box(self.system, pixels, self.eps or (SMALL_EPS if names else 0.0))
        if not self.eps and not names:
            return {"clean": SumCount(_clean_loss(model(inputs.clean), labels_B), len(items))}
        share = 1 - self.eps / self.config.eps if self.eps and self.config.crown else 0.0
        found = self.bounded.bounds(inputs, labels_B, hidden=bool(names or share), clean=not self.eps)
        terms: dict[str, Any] = {}
        if self.eps:
            margins: Any = found.margins
            if share:
                margins = mixed_margins(linear_margins(self.bounded, inputs, found, labels_B), margins, share)
            terms["robust"] = SumCount(robust_losses(margins).sum(), len(items))
        else:
            terms["clean"] = SumCount(_clean_loss(found.clean, labels_B), len(items))
        for name in names:
            loss = (
                tightness_loss(inputs.box.radius.mean(), found.hidden, self.config.tau)
                if name == "tight"
                else relu_loss(found.hidden, self.config.tau)
            )
            terms[name] = SumCount(loss, 1)
        return terms

    def _batch(self, items: list[int]) -> tuple[Tensor, Tensor]:
        pixels_BCHW, labels_B = self.examples.pixels_BCHW[items], self.examples.class_B[items]
        if self.config.crop_padding:
            pixels_BCHW = _cropped(pixels_BCHW, self.config.crop_padding)
        if self.config.flip:
            mirrored_B = torch.rand(len(items), device=pixels_BCHW.device) < 0.5
            pixels_BCHW = torch.where(mirrored_B[:, None, None, None], pixels_BCHW.flip(3), pixels_BCHW)
        return pixels_BCHW.contiguous(memory_format=torch.channels_last), labels_B


def _clean_loss(logits_BC: Any, labels_B: Tensor) -> Tensor:
    logits_BC = logits_BC if isinstance(logits_BC, Tensor) else logits_BC["logits"]
    return F.cross_entropy(logits_BC.float(), labels_B, reduction="sum")


def _cropped(pixels_BCHW: Tensor, padding: int) -> Tensor:
    """Each image padded with black and cut at a place of its own, by torch's generator."""
    height, width = pixels_BCHW.shape[2:]
    padded_BCHW = F.pad(pixels_BCHW, (padding,) * 4)
    corners_B2 = torch.randint(2 * padding + 1, (len(pixels_BCHW), 2)).tolist()
    return torch.stack(
        [
            image[:, top : top + height, left : left + width]
            for image, (top, left) in zip(padded_BCHW, corners_B2, strict=True)
        ]
    )
