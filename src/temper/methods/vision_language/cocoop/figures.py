"""What the report shows of a run: how the loss fell, the words nearest to the context, and test pictures with what was said of them."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from temper.core.types import Run
from temper.data.pictures import Picture
from temper.methods.vision_language.cocoop.explain import Shift
from temper.ops.train import TrainLog

__all__ = ["framed", "heated", "write_loss", "write_maps", "write_pictures", "write_shifts", "write_words"]

COLUMNS, ROWS, FRAME, ENLARGED = 12, 3, 2, 64
RIGHT, WRONG = (40, 160, 70), (205, 50, 50)
HEAT = (230, 60, 20)
MAPS = "Which visual tokens the score of the right class comes from"
SHIFTS = "What the shift that each picture gives its prompt changes"
WORDS = "Words nearest to the context vectors, and how far away they are"
NUM_SETS = 4
"""Classes whose words are shown where each class has a context of its own."""


def write_loss(log: TrainLog, kind: str, run: Run) -> None:
    """The loss of every step."""
    line = {"x": list(range(1, log.num_steps + 1)), "y": log.loss}
    _write(run, {"curves": {"Training loss": {"x": "step", "y": "nats a picture", "lines": {kind: line}}}})


def write_pictures(title: str, pictures: Sequence[Picture], right: Sequence[bool], run: Run) -> None:
    """The first pictures of a test, in a green frame where the answer was right and in a red one where it was wrong."""
    if run.folder is None or not pictures:
        return
    tiles = [framed(p.array(), r) for p, r in zip(pictures[: COLUMNS * ROWS], right, strict=False)]
    tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % COLUMNS)
    rows = [np.hstack(tiles[start : start + COLUMNS]) for start in range(0, len(tiles), COLUMNS)]
    png = base64.b64encode(Picture.from_array(np.vstack(rows)).png()).decode()
    _write(run, {"pictures": {f"{title}: right answers in green, wrong ones in red": {"png": png}}})


def write_words(words: Sequence[Sequence[tuple[str, float]]], labels: Sequence[str], run: Run) -> None:
    """A table: a row a context vector, a column a rank."""
    columns = ["vector", *(f"word {rank}" for rank in range(1, 1 + len(words[0])))]
    rows = [
        [label, *(f"{word} ({distance:.2f})" for word, distance in row)]
        for label, row in zip(labels, words, strict=True)
    ]
    _write(run, {"tables": {WORDS: {"columns": columns, "rows": rows}}})


def write_shifts(shifts: Sequence[Shift], classes: Sequence[str], title: str, run: Run) -> None:
    """A table: a row a picture; nothing where no picture shifts its prompt."""
    if not shifts:
        return
    columns = [
        "class", "length of the shift in context vectors", "of which the picture's own", "answer", "without the shift", "probability of the class",
        "without the shift",
    ]  # fmt: skip
    rows = [
        [
            name,
            f"{s.length:.2f}",
            f"{s.own:.2f}",
            s.answer,
            s.answer_without,
            f"{s.probability:.3f}",
            f"{s.probability_without:.3f}",
        ]
        for name, s in zip(classes, shifts, strict=True)
    ]
    _write(run, {"tables": {f"{SHIFTS}: {title.lower()}": {"columns": columns, "rows": rows}}})


def write_maps(
    title: str, pictures: Sequence[Picture], right: Sequence[bool], maps_BSS: Any, label: str, run: Run
) -> None:
    """A strip of the grid that lays arms side by side: pictures in their frames, below each its map up to its own largest value."""
    tiles = [framed(picture.array(), r) for picture, r in zip(pictures, right, strict=True)]
    below = [
        framed(heated(picture.array(), map_SS), r)
        for picture, map_SS, r in zip(pictures, maps_BSS, right, strict=True)
    ]
    strip = np.vstack([np.hstack(tiles), np.hstack(below)])
    png = base64.b64encode(Picture.from_array(strip).png()).decode()
    _write(run, {"grids": {f"{MAPS}{label and f' ({label})'}": {title: {"png": png}}}})


def heated(pixels_HWC: Any, map_SS: Any) -> Any:
    """A picture in pale grey under the map, smoothed to its size."""
    from PIL import Image

    height, width = pixels_HWC.shape[:2]
    top = max(float(map_SS.max()), 1e-12)
    small = Image.fromarray(np.uint8(255 * np.asarray(map_SS) / top))
    share_HW1 = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))[..., None] / 255 * 0.75
    grey_HW1 = 100 + pixels_HWC.mean(axis=2, keepdims=True) / 2
    return (grey_HW1 * (1 - share_HW1) + np.array(HEAT) * share_HW1).clip(0, 255).astype(np.uint8)


def framed(pixels_HWC: Any, is_right: bool) -> Any:
    """A picture as a square tile of one size with a coloured frame; small ones keep their pixels sharp."""
    from PIL import Image

    colour = (
        np.broadcast_to(pixels_HWC, (*pixels_HWC.shape[:2], 3)) if pixels_HWC.shape[2] == 1 else pixels_HWC
    )
    resample = Image.Resampling.NEAREST if max(colour.shape[:2]) <= ENLARGED else Image.Resampling.BICUBIC
    tile = np.array(Image.fromarray(np.ascontiguousarray(colour)).resize((ENLARGED, ENLARGED), resample))
    framed_HWC = np.full((ENLARGED + 4 * FRAME, ENLARGED + 4 * FRAME, 3), 255, np.uint8)
    framed_HWC[FRAME:-FRAME, FRAME:-FRAME] = RIGHT if is_right else WRONG
    framed_HWC[2 * FRAME : -2 * FRAME, 2 * FRAME : -2 * FRAME] = tile
    return framed_HWC


def _write(run: Run, figures: dict[str, Any]) -> None:
    if run.folder is None:
        return
    path = run.folder / "figures.json"
    before = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    run.folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_merged(before, figures)), "utf-8")


def _merged(before: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Both, key by key and level by level; what was found later wins."""
    both = {
        key: _merged(before[key], found[key])
        for key in before.keys() & found.keys()
        if isinstance(found[key], dict)
    }
    return {**before, **found, **both}
