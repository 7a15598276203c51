"""A second modality of a scene: a map of tones, two waves whose frequencies tell the first object's shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from temper.data.worlds.captions.noise import normal, uniform
from temper.data.worlds.captions.scenes import Scene
from temper.data.worlds.captions.words import SHAPES

__all__ = ["TONE_SIDE", "tone_frequencies", "tone_maps"]

TONE_SIDE = 16
TONE_NOISE = 1.4
"""Standard deviation of what is added to waves of amplitude 1: a small CNN then reads 96 % of the maps and 90 % of the pictures."""
PHASE_STREAM, TONE_STREAM = 18, 19


def tone_frequencies(shape: str) -> tuple[int, int]:
    """Waves along the columns and along the rows of the map, no two shapes alike."""
    place = SHAPES.index(shape)
    return 1 + place % 4, 1 + place // 4


def tone_maps(scenes: Sequence[Scene], noise: float = TONE_NOISE) -> NDArray[np.uint8]:
    """Maps of (N, 16, 16): a wave along each axis with a phase of its own, and noise; 0 to 255 spans plus and minus 4."""
    if not scenes:
        return np.zeros((0, TONE_SIDE, TONE_SIDE), np.uint8)
    seeds = np.array([scene.noise_seed for scene in scenes])
    waves_N2 = np.array([tone_frequencies(scene.things[0].shape) for scene in scenes])
    phase_N2 = uniform(seeds, 2, PHASE_STREAM)
    at = np.arange(TONE_SIDE) / TONE_SIDE
    wave: NDArray[Any] = np.sin(2 * np.pi * (waves_N2[..., None] * at + phase_N2[..., None]))
    grain = normal(seeds, TONE_SIDE**2, TONE_STREAM).reshape(-1, TONE_SIDE, TONE_SIDE)
    map_NHW = wave[:, 0, None, :] + wave[:, 1, :, None] + noise * grain
    return ((map_NHW / 8 + 0.5).clip(0, 1) * 255 + 0.5).astype(np.uint8)
