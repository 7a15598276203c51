"""Scene graphs: objects as nodes, how they lie to one another as edges.

Shape letters: T things, F node features.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from temper.core.types import Json
from temper.data.worlds.captions.noise import normal
from temper.data.worlds.captions.scenes import Scene, Thing
from temper.data.worlds.captions.text import relation
from temper.data.worlds.captions.words import COLOURS, SHAPES

__all__ = ["NODE_FEATURES", "SceneGraph", "graph_json", "scene_graph", "triples"]

NODE_STREAM = 13
NODE_FEATURES = len(SHAPES) + len(COLOURS) + 3
"""One-hot shape and colour, then x, y and radius as shares of the picture."""
RELATIONS = ("left of", "right of", "above", "below")


class SceneGraph(NamedTuple):
    """Arrays of one scene's graph."""

    nodes_TF: NDArray[np.floating[Any]]
    edges_TT8: NDArray[np.floating[Any]]
    """From row to column: dx, dy and distance as shares of the picture, whether the row's object is left, above, of the same
    colour, of the same shape, and the log ratio of the radii. The diagonal is 0."""


def scene_graph(scene: Scene, noise: float = 0.0) -> SceneGraph:
    """The graph of a scene; `noise` is the standard deviation of what is added to the node features."""
    nodes = np.array([_node(thing, scene.size_px) for thing in scene.things])
    grain = normal(np.array([scene.noise_seed]), nodes.size, NODE_STREAM).reshape(nodes.shape)
    edges = np.array([[_edge(a, b, scene.size_px) for b in scene.things] for a in scene.things])
    edges[np.arange(len(nodes)), np.arange(len(nodes))] = 0
    return SceneGraph(nodes + noise * grain, edges)


def _node(thing: Thing, side: int) -> list[float]:
    shape = [float(name == thing.shape) for name in SHAPES]
    colour = [float(name == thing.colour) for name in COLOURS]
    return [*shape, *colour, thing.cx / side, thing.cy / side, thing.r / side]


def _edge(thing: Thing, other: Thing, side: int) -> list[float]:
    dx, dy = (thing.cx - other.cx) / side, (thing.cy - other.cy) / side
    flags = (dx < 0, dy < 0, thing.colour == other.colour, thing.shape == other.shape)
    return [dx, dy, float(np.hypot(dx, dy)), *map(float, flags), float(np.log(thing.r / other.r))]


def triples(scene: Scene) -> list[tuple[int, str, int]]:
    """(object, relation, object) by index: one of left of, right of, above, below for every ordered pair, and same_colour, same_shape."""
    found = []
    for i, thing in enumerate(scene.things):
        for j, other in enumerate(scene.things):
            if i == j:
                continue
            found.append((i, relation(thing, other), j))
            found += [
                (i, f"same_{f}", j) for f in ("colour", "shape") if getattr(thing, f) == getattr(other, f)
            ]
    return found


def graph_json(scene: Scene) -> dict[str, Json]:
    """Nodes with their attributes and edges as triples, as plain JSON values."""
    nodes = [{"shape": t.shape, "colour": t.colour, "place": scene.place(t.cell)} for t in scene.things]
    return {"nodes": nodes, "edges": [list(triple) for triple in triples(scene)]}
