"""What somebody with the weights can do to them without training: round them, or leave the small ones out.

Shapes: a weight matrix is (O, I), outputs by inputs; convolutions and stacked matrices count everything but O as I.
"""

from __future__ import annotations

from torch import Tensor

from temper.core.errors import ConfigError

__all__ = ["pruned", "rounded"]


def rounded(weight_OI: Tensor, bits: int, group: int = 0) -> Tensor:
    """The weights on a symmetric grid of `bits` bits, by round-to-nearest; back in their own dtype.

    Every row has a grid of its own, or every `group` neighbours of a row; the largest weight stays as it is. A row whose
    length `group` does not divide is one group.
    """
    if not 2 <= bits <= 16:
        raise ConfigError(f"{bits} bits are no grid", where="bits", cure="Take 2 to 16, e.g. 8 or 4.")
    flat = weight_OI.float().flatten(1)
    width = group or flat.shape[1]
    if flat.shape[1] % width:
        width = flat.shape[1]
    parts = flat.reshape(len(flat), -1, width)
    largest = 2 ** (bits - 1) - 1
    step = parts.abs().amax(-1, keepdim=True) / largest
    on_grid = (parts / step.clamp(min=1e-30)).round().clamp(-largest, largest) * step
    return on_grid.view(weight_OI.shape).to(weight_OI.dtype)


def pruned(weight: Tensor, share: float) -> Tensor:
    """The weights with the smallest `share` of them, by size, set to 0; equal ones leave together."""
    if not 0 <= share < 1:
        raise ConfigError(f"A share of {share:g} cannot be pruned", where="share", cure="Take 0 to below 1.")
    num_out = int(share * weight.numel())
    if not num_out:
        return weight.clone()
    sizes = weight.abs().flatten().float()
    bound = sizes.kthvalue(num_out).values
    return weight.masked_fill(weight.abs() <= bound, 0)
