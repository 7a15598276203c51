"""Pictures of records as unit vectors, and the linear probe on them that prompts are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from temper.core.errors import DataError
from temper.data.pictures import Picture
from temper.data.schemas import Labelled
from temper.methods.vision_language.cocoop.protocols import class_name
from temper.systems.dual_encoder import DualEncoder

__all__ = ["PICTURES_AT_ONCE", "image_vectors", "picture_of", "probe_accuracy"]

PICTURES_AT_ONCE = 256


@torch.no_grad()
def probe_accuracy(system: DualEncoder, shots: Sequence[Labelled], records: Sequence[Labelled]) -> float:
    """Test accuracy of a logistic regression on image vectors, trained on the shots."""
    from sklearn.linear_model import LogisticRegression

    def vectors(rows: Sequence[Labelled]) -> Any:
        pixels_NCHW = system.pixels([picture_of(record) for record in rows])
        return image_vectors(system, pixels_NCHW).cpu().numpy()

    # The vectors have length 1: the penalty must be light for the weights to grow to CLIP's logit scale.
    probe = LogisticRegression(C=100.0, max_iter=1000)
    probe.fit(vectors(shots), [class_name(record) for record in shots])
    return float(probe.score(vectors(records), [class_name(record) for record in records]))


def image_vectors(system: DualEncoder, pixels_NCHW: Tensor) -> Tensor:
    """Unit vectors (N, E), a part of the pictures at a time."""
    return torch.cat([system.image_vectors(part) for part in pixels_NCHW.split(PICTURES_AT_ONCE)])


def picture_of(record: Labelled) -> Picture:
    """The record's image; raises DataError for a text."""
    if record.image is None:
        raise DataError(
            "The row holds a text and no image",
            where=f"row {record.id!r}",
            cure="CLIP classifies pictures: give rows with a column image.",
        )
    return record.image
