"""Interval bounds: boxes around inputs, carried through one layer at a time, and what is read from them at the end.

A box is a centre and a radius, so an affine layer costs two products: W with the centre, |W| with the radius. Bounds
hold in real arithmetic; float rounding is not accounted for. How a whole network is walked is `network_bounds.py`.
Tensors without shape letters have any shape that begins with B; C counts classes, or channels where that is said.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from temper.core.errors import ConfigError, DataError

__all__ = [
    "Box",
    "Inputs",
    "Statistics",
    "add_boxes",
    "affine_box",
    "box_between",
    "clean_statistics",
    "input_box",
    "margin_bounds",
    "monotone_box",
    "rectify_box",
    "robust_losses",
    "verified_mask",
]

Apply = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""An affine layer as a function of input, weight and bias."""


class Box(NamedTuple):
    """All points within `radius` (never negative) of `centre`, entry by entry."""

    centre: Tensor
    radius: Tensor

    @property
    def lower(self) -> Tensor:
        """The least value of each entry."""
        return self.centre - self.radius

    @property
    def upper(self) -> Tensor:
        """The greatest value of each entry."""
        return self.centre + self.radius


class Inputs(NamedTuple):
    """Inputs as the network takes them, and the box around each."""

    clean: Tensor
    box: Box


def box_between(lower: Tensor, upper: Tensor) -> Box:
    """The box from its two ends."""
    centre = (lower + upper) / 2
    return Box(centre, upper - centre)


def input_box(
    inputs: Tensor,
    eps: float | Tensor,
    *,
    limits: tuple[float, float] | None = (0.0, 1.0),
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Inputs:
    """Everything within `eps` (L-infinity) of the inputs and within the limits, then normalised by channel (axis 1).

    `eps`, a number or a tensor that broadcasts, and `limits` are in the inputs' own units, before normalisation. With
    limits None nothing is clipped. Raises DataError for values that are not finite or outside the limits, ConfigError
    for an eps that is negative, not finite or larger than the range, and for statistics that fit no channel.
    """
    _require_valid(inputs, torch.as_tensor(eps), limits)
    lower, upper = inputs - eps, inputs + eps
    if limits is not None:
        lower, upper = lower.clamp_(min=limits[0]), upper.clamp_(max=limits[1])
    box = box_between(lower, upper)
    if mean is None and std is None:
        return Inputs(inputs, box)
    shift, scale = _per_channel(mean, 0.0, inputs), _per_channel(std, 1.0, inputs)
    if not bool((scale > 0).all()):
        raise ConfigError(f"A standard deviation must be above 0; got {list(std or ())}", where="std")
    return Inputs((inputs - shift) / scale, Box((box.centre - shift) / scale, box.radius / scale))


def _require_valid(inputs: Tensor, eps: Tensor, limits: tuple[float, float] | None) -> None:
    low, high = (float(end) for end in inputs.aminmax()) if inputs.numel() else (0.0, 0.0)
    if not (low > float("-inf") and high < float("inf")):
        bad = (~inputs.isfinite()).nonzero()[0].tolist()
        raise DataError(
            "The inputs hold a value that is not a finite number",
            where=f"first at {bad}",
            cure="Remove or fill such values before bounds are computed.",
        )
    if not bool(((eps >= 0) & eps.isfinite()).all()):
        raise ConfigError(f"eps must be a finite number of at least 0; got {float(eps.min())}", where="eps")
    if limits is None:
        return
    if float(eps.max()) > limits[1] - limits[0]:
        raise ConfigError(
            f"eps = {float(eps.max()):g} is larger than the whole range of the inputs, {limits[0]:g} to {limits[1]:g}",
            where="eps",
            cure="Give eps in the inputs' own units; an eps out of 255 is divided by 255.",
        )
    if low < limits[0] or high > limits[1]:
        raise DataError(
            f"Inputs between {low:g} and {high:g} leave the valid range, {limits[0]:g} to {limits[1]:g}",
            where="inputs",
            cure="Pass inputs before normalisation, with its mean and std; or set the limits.",
        )


def _per_channel(values: Sequence[float] | None, default: float, inputs: Tensor) -> Tensor:
    given = torch.as_tensor(
        [default] if values is None else list(values), dtype=inputs.dtype, device=inputs.device
    )
    if values is not None and len(given) not in (1, inputs.shape[1]):
        raise ConfigError(
            f"{len(given)} statistics for inputs of {inputs.shape[1]} channels", where="mean and std"
        )
    return given.view(1, -1, *[1] * (inputs.ndim - 2))


def affine_box(box: Box, apply: Apply, weight: Tensor, bias: Tensor | None) -> Box:
    """The exact box of an affine layer's output: its own weights on the centre, their size on the radius."""
    return Box(apply(box.centre, weight, bias), apply(box.radius, weight.abs(), None))


def add_boxes(left: Box, right: Box) -> Box:
    """Sums of a point of each box."""
    return Box(left.centre + right.centre, left.radius + right.radius)


def monotone_box(box: Box, function: Callable[[Tensor], Tensor]) -> Box:
    """The box of a function that never falls: its values at both ends."""
    return box_between(function(box.lower), function(box.upper))


def rectify_box(box: Box, *, in_place: bool = False) -> Box:
    """The box after ReLU. With `in_place` the given box's tensors are overwritten, which no other user may need."""
    centre, radius = box if in_place else (box.centre.clone(), box.radius.clone())
    return Box(*_Rectify.apply(centre, radius))


class _Rectify(torch.autograd.Function):
    """ReLU of both ends in the two buffers that came in; fresh memory is what elementwise work on a CPU waits for."""

    @staticmethod
    def forward(ctx: Any, centre: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
        lower = torch.sub(centre, radius, out=centre)
        upper = torch.add(lower, radius, alpha=2, out=radius)
        lower.clamp_(min=0)
        upper.clamp_(min=0)
        new_centre = torch.lerp(lower, upper, 0.5, out=upper)
        new_radius = torch.sub(new_centre, lower, out=lower)
        ctx.mark_dirty(centre, radius)
        ctx.save_for_backward(new_centre, new_radius)
        return new_centre, new_radius

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        grad_centre, grad_radius = grads
        centre, radius = ctx.saved_tensors
        gate = torch.ops.aten.threshold_backward.grad_input
        lower = torch.sub(centre, radius)
        grad_lower = torch.sub(grad_centre, grad_radius)
        gate(grad_lower, lower, 0, grad_input=grad_lower)
        grad_upper = torch.add(grad_centre, grad_radius, out=lower)
        gate(grad_upper, centre, 0, grad_input=grad_upper)
        to_centre = torch.lerp(grad_lower, grad_upper, 0.5, out=grad_upper)
        return to_centre, torch.sub(to_centre, grad_lower, out=grad_lower)


class Statistics(NamedTuple):
    """A batch normalised by its own statistics, and the affine map by channel that did it, (C channels) each."""

    normed: Tensor
    scale: Tensor
    shift: Tensor


def clean_statistics(hidden: Tensor, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> Statistics:
    """Batch norm in training mode on a clean batch, (B, C, ...): running statistics move, gradients flow through all.

    Raises DataError for a batch of one item, whose statistics say nothing.
    """
    if len(hidden) < 2:
        raise DataError(
            "Batch norm in training mode needs more than one item in a batch",
            where="a batch of 1",
            cure="Drop the last, smaller batch, or put the network into eval mode.",
        )
    momentum = norm.momentum
    if norm.track_running_stats and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        momentum = 1 / float(norm.num_batches_tracked) if momentum is None else momentum
    weight = hidden.new_ones(hidden.shape[1]) if norm.weight is None else norm.weight
    bias = hidden.new_zeros(hidden.shape[1]) if norm.bias is None else norm.bias
    return Statistics(
        *_Normalise.apply(
            hidden, weight, bias, norm.running_mean, norm.running_var, momentum or 0.0, norm.eps
        )
    )


class _Normalise(torch.autograd.Function):
    """Torch's batch norm, with its scale and shift as outputs that have gradients of their own."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        var: Tensor,
        momentum: float,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        normed, mean_C, inv_std_C = torch.native_batch_norm(
            hidden, weight, bias, mean, var, True, momentum, eps
        )
        ctx.save_for_backward(hidden, weight, mean_C, inv_std_C)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        scale_C = weight * inv_std_C
        return normed, scale_C, bias - mean_C * scale_C

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        hidden, weight, mean_C, inv_std_C = ctx.saved_tensors
        zeros_C = torch.zeros_like(mean_C)
        grad_scale_C, grad_shift_C = (zeros_C if grad is None else grad for grad in grads[1:])
        to_hidden, to_weight, to_bias = None, zeros_C, zeros_C
        if grads[0] is not None:
            to_hidden, to_weight, to_bias = torch.ops.aten.native_batch_norm_backward(
                grads[0], hidden, weight, None, None, mean_C, inv_std_C, True, ctx.eps, [True, True, True]
            )
        # shift = bias - mean * scale and scale = weight * inv_std; both are functions of the batch's two moments.
        grad_scale_C = grad_scale_C - mean_C * grad_shift_C
        per_channel = (1, -1, *[1] * (hidden.ndim - 2))
        count = hidden.numel() // hidden.shape[1]
        slope_C = -(grad_scale_C * weight) * inv_std_C**3 / count
        offset_C = -grad_shift_C * weight * inv_std_C / count - slope_C * mean_C
        slope, offset = slope_C.view(per_channel), offset_C.view(per_channel)
        if to_hidden is None:
            to_hidden = hidden * slope
        else:
            to_hidden.addcmul_(hidden, slope)
        return (
            to_hidden.add_(offset),
            to_weight + grad_scale_C * inv_std_C,
            to_bias + grad_shift_C,
            None,
            None,
            None,
            None,
        )


def margin_bounds(box: Box, weight_CD: Tensor, bias_C: Tensor | None, labels_B: Tensor) -> Tensor:
    """Lower bounds of z_y - z_j for each class j, (B, C), from the box before the last linear layer; 0 for j = y.

    The difference is one affine map, which is tighter than the difference of two bounds. Raises DataError for a label
    that is no class.
    """
    if not bool(((labels_B >= 0) & (labels_B < len(weight_CD))).all()):
        raise DataError(
            f"A label lies outside the {len(weight_CD)} classes",
            where=f"labels {labels_B.unique().tolist()[:10]}",
        )
    logits_BC = nn.functional.linear(box.centre, weight_CD, bias_C)
    centre_BC = logits_BC.gather(1, labels_B[:, None]) - logits_BC
    gaps_CCD = (weight_CD[:, None] - weight_CD[None]).abs()
    return centre_BC - torch.bmm(gaps_CCD[labels_B], box.radius[:, :, None]).squeeze(2)


def robust_losses(margins_BC: Tensor) -> Tensor:
    """Cross-entropy at the worst logits the bounds allow, log(1 + sum over j != y of exp(-margin)), nats, (B,)."""
    return torch.logsumexp(-margins_BC.float(), dim=1)


def verified_mask(margins_BC: Tensor, labels_B: Tensor) -> Tensor:
    """Which items are proven right everywhere in their box: every margin but the label's own is above 0, (B,)."""
    own_BC = torch.arange(margins_BC.shape[1], device=margins_BC.device) == labels_B[:, None]
    return ((margins_BC > 0) | own_BC).all(dim=1)
