"""What the report shows of a run: how the loss fell, and test pictures with what was said of them."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from temper.core.types import Run
from temper.data.pictures import Picture
from temper.ops.train import TrainLog

__all__ = ["framed", "write_loss", "write_pictures"]

COLUMNS, ROWS, FRAME, ENLARGED = 12, 3, 2, 64
RIGHT, WRONG = (40, 160, 70), (205, 50, 50)


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
    merged = {kind: {**before.get(kind, {}), **found} for kind, found in figures.items()}
    run.folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**before, **merged}), "utf-8")
