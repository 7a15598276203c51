"""Signed distances to the ten shapes: negative inside. Points are in units of the shape's radius, y downwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["DISTANCES", "box", "triangle"]

Floats = NDArray[np.floating[Any]]


def _length(x: Floats, y: Floats) -> Floats:
    return np.sqrt(x * x + y * y)


def box(x: Floats, y: Floats, half_width: float, half_height: float) -> Floats:
    """Distance to an upright rectangle around the origin; past a corner the larger of the two side distances."""
    return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)


def _circle(x: Floats, y: Floats) -> Floats:
    """Radius 0.85."""
    return _length(x, y) - 0.85


def _square(x: Floats, y: Floats) -> Floats:
    """Side 1.5."""
    return box(x, y, 0.75, 0.75)


def triangle(x: Floats, y: Floats) -> Floats:
    """Upright, tip at (0, -1), base from (-0.9, 0.7) to (0.9, 0.7)."""
    norm = np.hypot(1.7, 0.9)
    return np.maximum((1.7 * np.abs(x) - 0.9 * (y + 1)) / norm, y - 0.7)


def _diamond(x: Floats, y: Floats) -> Floats:
    """Half as wide again upwards as sideways."""
    return (np.abs(x) * 1.0 + np.abs(y) * 0.7 - 0.7) / np.hypot(1.0, 0.7)


def _cross(x: Floats, y: Floats) -> Floats:
    """Two bars of equal length."""
    return np.minimum(box(x, y, 0.95, 0.3), box(x, y, 0.3, 0.95))


def _star(x: Floats, y: Floats) -> Floats:
    """Five points: the plane folded into half a point, then the distance to its edge."""
    first, second = (0.809017, -0.587785), (-0.809017, -0.587785)
    x, y = np.abs(x), -y
    for across in (first, second):
        fold = 2 * np.maximum(x * across[0] + y * across[1], 0)
        x, y = x - fold * across[0], y - fold * across[1]
    x = np.abs(x)
    tip, inner = 1.0, 0.42
    inner_x, inner_y = inner * 0.587785, inner * 0.809017
    along = np.hypot(inner_x, tip - inner_y)
    return ((tip - inner_y) * x + inner_x * (y - tip)) / along


def _heart(x: Floats, y: Floats) -> Floats:
    """A square on its corner, with a half circle on each of its upper sides."""
    x = np.abs(x)
    lobe = _length(x - 0.354, y + 0.254) - 0.5
    return np.minimum(lobe, (x + np.abs(y - 0.1) - 0.707) * 0.70711)


def _ring(x: Floats, y: Floats) -> Floats:
    """A band around the radius 0.66."""
    return np.abs(_length(x, y) - 0.66) - 0.2


def _crescent(x: Floats, y: Floats) -> Floats:
    """A disc with a bite on its right."""
    return np.maximum(_length(x, y) - 0.9, 0.72 - _length(x - 0.42, y + 0.1))


def _bar(x: Floats, y: Floats) -> Floats:
    """Three times as wide as high."""
    return box(x, y, 0.95, 0.32)


DISTANCES: tuple[Callable[[Floats, Floats], Floats], ...] = (
    _circle, _square, triangle, _diamond, _cross, _star, _heart, _ring, _crescent, _bar,
)  # fmt: skip
"""In the order of `words.SHAPES`."""
