"""Scenes: what a picture shows, as plain values, and drawing them at random. A scene is a pure function of its recipe and seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from temper.core.types import Json
from temper.data.worlds.captions.noise import normal, uniform
from temper.data.worlds.captions.words import COLOURS, HELD_OUT, PLACES_2, PLACES_3, RGB, SHAPES, STYLES

__all__ = [
    "Glyph",
    "Scene",
    "SceneRecipe",
    "Texture",
    "Thing",
    "all_pairs",
    "draw_scenes",
    "from_json",
    "size_word",
    "to_json",
]

Colour = tuple[float, float, float]
Ints = NDArray[np.integer[Any]]

BACKGROUND: dict[str, Colour] = {
    "flat": (0.93, 0.93, 0.93),
    "sketch": (0.98, 0.98, 0.98),
    "neon": (0.05, 0.05, 0.05),
    "mosaic": (0.88, 0.88, 0.88),
    "stripe": (0.93, 0.93, 0.93),
    "noisy": (0.6, 0.6, 0.6),
    "pastel": (0.85, 0.85, 0.85),
    "chalk": (0.14, 0.26, 0.2),
}
STYLE_NOISE = {"noisy": 0.22}
MAX_THINGS = 5
PLACE_STREAM, THING_STREAM, COLOUR_STREAM, GROUND_STREAM, PICK_STREAM, TEXTURE_STREAM, ORDER_STREAM = range(
    1, 8
)
TEXTURE_KINDS: tuple[Literal["stripe", "check"], ...] = ("stripe", "check")


@dataclass(frozen=True)
class Thing:
    """One object: its class, its drawn colour, and where it lies, in pixels and radians."""

    shape: str
    colour: str
    rgb: Colour
    cell: int
    cx: float
    cy: float
    r: float
    angle: float


@dataclass(frozen=True)
class Glyph:
    """A sign in a cell: `hazard`, `crossed`, or `word` with its text."""

    kind: Literal["hazard", "crossed", "word"]
    cell: int
    text: str = ""


@dataclass(frozen=True)
class Texture:
    """Bands, or the fields of a checkerboard, that darken every second stretch of half a pitch."""

    kind: Literal["stripe", "check"]
    pitch_px: float
    angle: float
    shade: float
    """What the darker half keeps of the colour."""


@dataclass(frozen=True)
class Scene:
    """All that a picture shows; captions, graphs, questions and masks are derived from it."""

    id: str
    size_px: int
    style: str
    background_rgb: Colour
    things: tuple[Thing, ...]
    noise_seed: int
    glyphs: tuple[Glyph, ...] = ()
    noise: float = 0.0
    """Standard deviation of pixel noise."""
    grid: int = 1
    """Cells a side; 1 is a single object in the middle."""
    textures: tuple[Texture, ...] = ()
    """Of the background, then of each object; () where nothing has one."""

    def place(self, cell: int) -> str:
        """The name of a cell."""
        return {1: ("middle",), 2: PLACES_2, 3: PLACES_3}[self.grid][cell]


@dataclass(frozen=True, kw_only=True)
class SceneRecipe:
    """What scenes are drawn from."""

    size_px: int = 32
    layout: Literal["solo", "scene"] = "solo"
    """One object near the middle, or 2 to 4 on a 2 x 2 grid (2 to 5 on 3 x 3 at 48 px)."""
    shapes: tuple[str, ...] = SHAPES
    colours: tuple[str, ...] = COLOURS
    styles: tuple[str, ...] = STYLES
    style_weights: tuple[float, ...] = ()
    """How often each style comes; () means equally."""
    skew: float = 0.0
    """Shape number k comes with weight (1 + k) ** -skew."""
    held_out: bool = True
    """Whether the combinations in `words.HELD_OUT` may come."""
    correlation: float | None = None
    """The share of scenes whose style is the one that goes with their shape (style k of `styles` with shape k, going
    round); the others share the rest equally. None draws styles independently."""
    turn: int = 0
    """How far the styles that go with shapes are turned."""
    noise: float = 0.0
    """Pixel noise beside what a style brings."""
    distinct: bool = False
    """No two objects of a scene share a shape or a colour; any combination may come."""
    textured: bool = False
    """The background and every object are striped or checked."""


def all_pairs(recipe: SceneRecipe) -> list[tuple[int, int]]:
    """The (shape, colour) pairs that may come, as indices into SHAPES and COLOURS."""
    return [
        (SHAPES.index(shape), COLOURS.index(colour))
        for shape in recipe.shapes
        for colour in recipe.colours
        if recipe.held_out or (SHAPES.index(shape), COLOURS.index(colour)) not in HELD_OUT
    ]


@dataclass
class _Drawn:
    """The arrays that scenes are made of; T is the most things of a scene."""

    style_N: Ints
    num_N: Ints
    shape_NT: Ints
    colour_NT: Ints
    cell_NT: Ints
    place_NT4: NDArray[np.floating[Any]] = field(repr=False)
    rgb_NT3: NDArray[np.floating[Any]] = field(repr=False)
    ground_N3: NDArray[np.floating[Any]] = field(repr=False)


def draw_scenes(
    recipe: SceneRecipe,
    seeds: Sequence[int] | Ints,
    *,
    styles: Sequence[str] | None = None,
    pairs: Sequence[tuple[int, int]] | None = None,
) -> list[Scene]:
    """One scene a seed; `styles` and `pairs` (of the first object) fix what is otherwise drawn, one a scene."""
    seeds_N = np.asarray(seeds, dtype=np.int64)
    if not len(seeds_N):
        return []
    drawn = _draw(recipe, seeds_N)
    if pairs is not None:
        drawn.shape_NT[:, 0], drawn.colour_NT[:, 0] = np.array(pairs).T
        drawn.style_N = _styles(recipe, seeds_N, drawn.shape_NT[:, 0])
    if styles is not None:
        drawn.style_N = np.array([STYLES.index(style) for style in styles])
    _paint(drawn, seeds_N)
    return _scenes(recipe, seeds_N, drawn)


def _grid(recipe: SceneRecipe) -> int:
    if recipe.layout == "solo":
        return 1
    return 3 if recipe.size_px == 48 else 2


def _draw(recipe: SceneRecipe, seeds_N: Ints) -> _Drawn:
    num, grid = len(seeds_N), _grid(recipe)
    most = {1: 1, 2: 4, 3: 5}[grid]
    picks = uniform(seeds_N, 1 + MAX_THINGS, PICK_STREAM)
    pairs = np.array(all_pairs(recipe))
    weights = (1.0 + np.arange(len(recipe.shapes))) ** -recipe.skew
    weight_of = dict(zip((SHAPES.index(s) for s in recipe.shapes), weights, strict=True))
    chosen_NT = pairs[_choose(np.array([weight_of[s] for s, _ in pairs]), picks[:, 1 : 1 + most])]
    shape_NT, colour_NT = chosen_NT[..., 0].copy(), chosen_NT[..., 1].copy()
    if recipe.distinct:
        shape_NT, colour_NT = _distinct(recipe, seeds_N, most)
    count_N = np.ones(num, dtype=int) if grid == 1 else 2 + (picks[:, 0] * (most - 1)).astype(int)
    cells = uniform(seeds_N, grid * grid, PLACE_STREAM).argsort(axis=1)[:, :most]
    return _Drawn(
        _styles(recipe, seeds_N, shape_NT[:, 0]),
        count_N,
        shape_NT,
        colour_NT,
        cells,
        _places(recipe, seeds_N, cells, most),
        np.empty(0),
        np.empty(0),
    )


def _distinct(recipe: SceneRecipe, seeds_N: Ints, most: int) -> tuple[Ints, Ints]:
    """Shapes and colours in two random orders, from the front."""
    shapes = np.array([SHAPES.index(shape) for shape in recipe.shapes])
    colours = np.array([COLOURS.index(colour) for colour in recipe.colours])
    keys = uniform(seeds_N, len(shapes) + len(colours), ORDER_STREAM)
    orders = keys[:, : len(shapes)].argsort(axis=1), keys[:, len(shapes) :].argsort(axis=1)
    return shapes[orders[0][:, :most]], colours[orders[1][:, :most]]


def _choose(weights: NDArray[np.floating[Any]], picks: NDArray[np.floating[Any]]) -> Ints:
    ends = np.cumsum(weights) / weights.sum()
    return np.minimum(np.searchsorted(ends, picks, side="right"), len(weights) - 1)


def _styles(recipe: SceneRecipe, seeds_N: Ints, shape_N: Ints) -> Ints:
    """Each scene's style as an index into STYLES."""
    known = np.array([STYLES.index(style) for style in recipe.styles])
    picks = uniform(seeds_N, 2, GROUND_STREAM)
    if recipe.correlation is None:
        return known[_choose(np.array(recipe.style_weights or [1.0] * len(known)), picks[:, 0])]
    rank = np.array([recipe.shapes.index(s) if s in recipe.shapes else 0 for s in SHAPES])
    own_N = (rank[shape_N] + recipe.turn) % len(known)
    other_N = (own_N + 1 + (picks[:, 1] * (len(known) - 1)).astype(int)) % len(known)
    return known[np.where(picks[:, 0] < recipe.correlation, own_N, other_N)]


def _places(recipe: SceneRecipe, seeds_N: Ints, cell_NT: Ints, most: int) -> NDArray[np.floating[Any]]:
    """cx, cy, r and angle of each object, shape (N, T, 4)."""
    picks = uniform(seeds_N, 4 * most, THING_STREAM).reshape(-1, most, 4)
    side = recipe.size_px / _grid(recipe)
    centre = np.stack([cell_NT % _grid(recipe), cell_NT // _grid(recipe)], axis=-1) * side + side / 2
    low, high, shift = _radii(recipe)
    place = np.empty_like(picks)
    place[..., :2] = centre + shift * (2 * picks[..., :2] - 1)
    place[..., 2] = low + (high - low) * picks[..., 2]
    place[..., 3] = 0.4 * picks[..., 3] - 0.2
    return place.round(3)


def _radii(recipe: SceneRecipe) -> tuple[float, float, float]:
    """Smallest and largest radius and the largest shift of a centre, in pixels."""
    if recipe.layout == "scene":
        scale = recipe.size_px / _grid(recipe) / 16
        return 5 * scale, 7.2 * scale, 1.5 * scale
    if recipe.size_px <= 16:
        return 4.5 * recipe.size_px / 16, 6.5 * recipe.size_px / 16, recipe.size_px / 16
    return 6 * recipe.size_px / 32, 12 * recipe.size_px / 32, 3 * recipe.size_px / 32


def size_word(scene: Scene) -> str:
    """The size of a lone object, "small" or "large" by thirds of the radii that are drawn, else ""."""
    if scene.grid != 1:
        return ""
    low, high, _ = _radii(SceneRecipe(size_px=scene.size_px))
    share = (scene.things[0].r - low) / (high - low)
    return "small" if share < 1 / 3 else "large" if share > 2 / 3 else ""


def _paint(drawn: _Drawn, seeds_N: Ints) -> None:
    """Colours with their jitter: sd 0.04 for objects, 0.03 for backgrounds."""
    most = drawn.shape_NT.shape[1]
    jitter = normal(seeds_N, 3 * MAX_THINGS + 3, COLOUR_STREAM).astype(float)
    rgb = np.array(RGB)[drawn.colour_NT] + 0.04 * jitter[:, 3 : 3 + 3 * most].reshape(-1, most, 3)
    drawn.rgb_NT3 = rgb.clip(0, 1).round(3)
    ground = np.array([BACKGROUND[style] for style in STYLES])[drawn.style_N] + 0.03 * jitter[:, :3]
    drawn.ground_N3 = ground.clip(0, 1).round(3)


def _scenes(recipe: SceneRecipe, seeds_N: Ints, drawn: _Drawn) -> list[Scene]:
    grid = _grid(recipe)
    columns = (drawn.shape_NT, drawn.colour_NT, drawn.cell_NT, drawn.place_NT4, drawn.rgb_NT3)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    facts = (seeds_N, drawn.style_N, drawn.num_N, drawn.ground_N3)
    textures = _textures(seeds_N) if recipe.textured else [()] * len(seeds_N)
    scenes = []
    for (seed, style, num, ground), row, covers in zip(
        zip(*(fact.tolist() for fact in facts), strict=True), rows, textures, strict=True
    ):
        things = tuple(
            Thing(SHAPES[shape], COLOURS[colour], tuple(rgb), cell, *place)
            for shape, colour, cell, place, rgb in list(zip(*row, strict=True))[:num]
        )
        name = STYLES[style]
        noise = max(recipe.noise, STYLE_NOISE.get(name, 0.0))
        scenes.append(
            Scene(
                f"{seed}",
                recipe.size_px,
                name,
                tuple(ground),
                things,
                seed,
                noise=noise,
                grid=grid,
                textures=covers[: 1 + num],
            )
        )
    return scenes


def _textures(seeds_N: Ints) -> list[tuple[Texture, ...]]:
    """One for the background and each object that may come; a pitch is 4 to 10 px, a shade 0.3 to 0.7."""
    picks = uniform(seeds_N, 4 * (1 + MAX_THINGS), TEXTURE_STREAM).reshape(len(seeds_N), -1, 4)
    values = np.stack([4 + 6 * picks[..., 1], np.pi * picks[..., 2], 0.3 + 0.4 * picks[..., 3]], axis=-1)
    kinds = (picks[..., 0] * len(TEXTURE_KINDS)).astype(int).tolist()
    return [
        tuple(Texture(TEXTURE_KINDS[kind], *value) for kind, value in zip(row, numbers, strict=True))
        for row, numbers in zip(kinds, values.round(3).tolist(), strict=True)
    ]


def to_json(scene: Scene) -> dict[str, Json]:
    """The scene as plain JSON values; `textures` only where there are any."""
    plain: dict[str, Json] = _plain(dataclasses.asdict(scene))
    if not scene.textures:
        del plain["textures"]
    return plain


def _plain(value: Json) -> Json:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def from_json(value: Mapping[str, Json]) -> Scene:
    """The scene whose `to_json` this is."""
    things = tuple(Thing(**{**thing, "rgb": tuple(thing["rgb"])}) for thing in value["things"])
    glyphs = tuple(Glyph(**glyph) for glyph in value["glyphs"])
    textures = tuple(Texture(**texture) for texture in value.get("textures", ()))
    ground = tuple(value["background_rgb"])
    made = {"things": things, "glyphs": glyphs, "background_rgb": ground, "textures": textures}
    return Scene(**{**value, **made})
