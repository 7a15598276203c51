"""Scenes to pixels: signed distances at twice the resolution, an edge one sample wide, averaged down.

Shape letters: N scenes, M objects, S samples a side (twice the pixels).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from temper.core.errors import ConfigError
from temper.data.worlds.captions.glyphs import draw_glyphs
from temper.data.worlds.captions.noise import normal, uniform
from temper.data.worlds.captions.scenes import Scene, Texture, Thing
from temper.data.worlds.captions.shapes import DISTANCES
from temper.data.worlds.captions.words import SHAPES

__all__ = ["render"]

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

CHUNK_SAMPLES = 1 << 18
"""Samples worked on at once; larger chunks fall out of the processor's cache."""
SUPERSAMPLING = 2
OUTLINE_PX = 1.3
HATCH_PX = 4.4
"""Two stripes, measured along a row."""
SPECKLE_STREAM, NOISE_STREAM = 21, 22


def render(scenes: Sequence[Scene]) -> Bytes:
    """The pictures, shape (N, H, W, 3); a picture depends on its scene alone. Raises ConfigError for mixed sizes."""
    sizes = {scene.size_px for scene in scenes}
    if len(sizes) > 1:
        raise ConfigError(
            f"The scenes have several sizes: {sorted(sizes)}", cure="Render each size by itself."
        )
    side = sizes.pop() if sizes else 0
    pixels_NHWC = np.empty((len(scenes), side, side, 3), dtype=np.uint8)
    for chunk in _chunks(scenes, side):
        pixels_NHWC[chunk] = _render([scenes[index] for index in chunk], side)
    return pixels_NHWC


def _chunks(scenes: Sequence[Scene], side: int) -> Iterator[list[int]]:
    """Indices that are rendered together: one style, so that each style's steps run once a chunk."""
    most = max(1, CHUNK_SAMPLES // max(1, (side * SUPERSAMPLING) ** 2))
    order = sorted(range(len(scenes)), key=lambda index: scenes[index].style)
    for _, group in groupby(order, key=lambda index: scenes[index].style):
        indices = list(group)
        yield from (indices[start : start + most] for start in range(0, len(indices), most))


def _render(scenes: Sequence[Scene], side: int) -> Bytes:
    """Scenes of one style."""
    style = scenes[0].style
    ground_N3 = np.array([scene.background_rgb for scene in scenes], dtype=np.float32)
    canvas = np.broadcast_to(ground_N3[:, None, None], (len(scenes), side, side, 3)).copy()
    _shade(canvas, [scene.textures[:1] for scene in scenes])
    for turn in range(max((len(scene.things) for scene in scenes), default=0)):
        here = [index for index, scene in enumerate(scenes) if len(scene.things) > turn]
        things = [scenes[index].things[turn] for index in here]
        seeds = np.array([scenes[index].noise_seed * 8 + turn for index in here])
        alpha = _alpha(things, seeds, style, side)[..., None]
        rgb = _ink(np.array([thing.rgb for thing in things], dtype=np.float32), style)[:, None, None]
        covers = [scenes[index].textures[1 + turn : 2 + turn] for index in here]
        if any(covers):
            rgb = np.broadcast_to(rgb, (len(here), side, side, 3)).copy()
            _shade(rgb, covers)
        part = canvas if len(here) == len(scenes) else canvas[here]
        part += alpha * (rgb - part)
        if part is not canvas:
            canvas[here] = part
    canvas = _finish(canvas, style)
    _add_noise(canvas, scenes)
    draw_glyphs(canvas, scenes)
    return (canvas.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def _shade(canvas: Floats, textures: Sequence[tuple[Texture, ...]]) -> None:
    """Darken each picture, in place, where its texture is dark; () changes nothing."""
    there = [index for index, found in enumerate(textures) if found]
    if not there:
        return
    found = [textures[index][0] for index in there]
    facts = np.array([(t.pitch_px, np.cos(t.angle), np.sin(t.angle), t.shade) for t in found], np.float32)
    pitch, cos, sin, shade = (column[:, None, None] for column in facts.T)
    side = canvas.shape[1]
    at = ((np.arange(side * SUPERSAMPLING) + 0.5) / SUPERSAMPLING).astype(np.float32)
    dark = _in_first_half((cos * at + sin * at[:, None]) / pitch)
    checked = np.flatnonzero([texture.kind == "check" for texture in found])
    across = (cos[checked] * at[:, None] - sin[checked] * at) / pitch[checked]
    dark[checked] ^= _in_first_half(across)
    share = dark.reshape(len(there), side, SUPERSAMPLING, side, SUPERSAMPLING).sum(
        axis=(2, 4), dtype=np.float32
    )
    share /= SUPERSAMPLING**2
    canvas[there] *= (1 - (1 - shade) * share)[..., None]


def _in_first_half(turns: Floats) -> NDArray[np.bool_]:
    return turns - np.floor(turns) < np.float32(0.5)


def _ink(rgb_M3: Floats, style: str) -> Floats:
    """The colour that a style paints an object with."""
    if style == "neon":
        return np.minimum(1, 1.1 * rgb_M3 + np.float32(0.1))
    return np.float32(0.5) * rgb_M3 + np.float32(0.425) if style == "pastel" else rgb_M3


def _alpha(things: Sequence[Thing], seeds_M: NDArray[Any], style: str, side: int) -> Floats:
    """How much of each pixel an object covers, shape (M, H, W)."""
    distance = _distances(things, side)
    scale = max(1.0, side / 32)
    cover = _edge(distance)
    if style in ("sketch", "neon"):
        cover -= _edge(distance + np.float32(OUTLINE_PX * scale))
    elif style == "stripe":
        at = (np.arange(side * SUPERSAMPLING) + 0.5) / SUPERSAMPLING
        cover *= ((at[:, None] + at) % (HATCH_PX * scale) < HATCH_PX * scale / 2).astype(np.float32)
    alpha = cover.reshape(len(things), side, SUPERSAMPLING, side, SUPERSAMPLING).mean(axis=(2, 4))
    if style == "neon":
        alpha = np.minimum(1, np.float32(0.75) * alpha + np.float32(0.9) * _blurred(alpha))
    elif style == "chalk":
        speckle = uniform(seeds_M, side * side, SPECKLE_STREAM).reshape(-1, side, side) < 0.65
        alpha *= np.where(speckle, np.float32(0.7), np.float32(0.1))
    return alpha


def _edge(distance: Floats) -> Floats:
    """Coverage of a sample from its distance in pixels: 1 inside, 0 outside, a ramp one sample wide."""
    return np.clip(np.float32(0.5) - np.float32(SUPERSAMPLING) * distance, 0, 1)


def _distances(things: Sequence[Thing], side: int) -> Floats:
    """Signed distance of every sample to each object, in pixels, shape (M, S, S)."""
    at = ((np.arange(side * SUPERSAMPLING) + 0.5) / SUPERSAMPLING).astype(np.float32)
    place = np.array([(t.cx, t.cy, t.r, np.cos(t.angle), np.sin(t.angle)) for t in things], dtype=np.float32)
    cx, cy, r, cos, sin = (column[:, None] for column in place.T)
    across, down = (at - cx) / r, (at - cy) / r
    shapes = np.array([SHAPES.index(thing.shape) for thing in things])
    distance = np.empty((len(things), len(at), len(at)), dtype=np.float32)
    for shape in np.unique(shapes):
        chosen = shapes == shape
        c, s = cos[chosen], sin[chosen]
        x = (c * across[chosen])[:, None, :] + (s * down[chosen])[:, :, None]
        y = (c * down[chosen])[:, :, None] - (s * across[chosen])[:, None, :]
        distance[chosen] = DISTANCES[shape](x, y) * r[chosen][:, None]
    return distance


def _finish(canvas: Floats, style: str) -> Floats:
    """What a style does to the whole picture."""
    if style == "mosaic":
        num, side = canvas.shape[:2]
        blocks = canvas.reshape(num, side // 2, 2, side // 2, 2, 3).mean(axis=(2, 4), keepdims=True)
        return np.broadcast_to(blocks, (num, side // 2, 2, side // 2, 2, 3)).reshape(canvas.shape).copy()
    return _blurred(canvas) if style == "pastel" else canvas


def _blurred(image: Floats) -> Floats:
    """The mean over 3 x 3 pixels, edges repeated; axes 1 and 2 are rows and columns."""
    for axis in (1, 2):
        width = [(1, 1) if other == axis else (0, 0) for other in range(image.ndim)]
        padded = np.pad(image, width, mode="edge")
        parts = [np.take(padded, range(start, start + image.shape[axis]), axis=axis) for start in range(3)]
        image = (parts[0] + parts[1] + parts[2]) / np.float32(3)
    return image


def _add_noise(canvas: Floats, scenes: Sequence[Scene]) -> None:
    noise_N = np.array([scene.noise for scene in scenes], dtype=np.float32)
    loud = np.flatnonzero(noise_N).tolist()
    if loud:
        seeds = np.array([scenes[index].noise_seed for index in loud])
        grain = normal(seeds, canvas[0].size, NOISE_STREAM).reshape(len(loud), *canvas.shape[1:])
        canvas[loud] += noise_N[loud, None, None, None] * grain
