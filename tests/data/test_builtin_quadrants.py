"""The built-in pictures: counts, classes, and the generator's own pixels."""

from __future__ import annotations

import numpy as np

from temper.data.builtin.quadrants import generate
from temper.data.loading import load_data
from temper.data.pictures import Picture


def test_parts_and_classes():
    data = load_data("builtin:quadrants")
    assert {part: len(rows) for part, rows in data.items()} == {"test": 8, "train": 12}
    for rows in data.values():
        for row in rows:
            assert row.image.array().shape == (8, 8, 1)
            quarters = row.image.array()[:, :, 0].reshape(2, 4, 2, 4).mean((1, 3))
            assert int(quarters.argmax()) == row.label


def test_the_generator_gives_the_checked_in_pixels():
    data, built = load_data("builtin:quadrants"), generate.build()
    for part, rows in built.items():
        for row, record in zip(rows, data[part], strict=True):
            assert (row["id"], row["label"]) == (record.id, record.label)
            assert np.array_equal(Picture.from_uri(row["image"]).array(), record.image.array())
