"""Split files of few-shot benchmarks: parts, names and paths, and what is not one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from temper.core.errors import DataError
from temper.data.loading import load_data
from temper.data.pictures import Picture
from temper.data.schemas import Labelled
from temper.data.splits import split_parts


def write(folder: Path, content: object, name: str = "split.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(content))
    return path


def test_parts_with_their_class_names(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"")
    path = write(tmp_path, {"train": [["a.png", 3, "sea_horse"]], "val": [], "test": [["b.png", 0, "ant"]]})
    parts = split_parts(path)
    assert parts is not None
    assert list(parts) == ["train", "test"]
    (row,) = parts["train"]
    assert row.values == {"image": "a.png", "label": 3, "name": "sea_horse"}
    assert row.place.folder == tmp_path / "pictures", "the folder that holds the first picture"


def test_a_split_file_is_data_with_parts(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(Picture.from_array(np.zeros((4, 4, 3), np.uint8)).png())
    path = write(tmp_path, {"train": [["a.png", 3, "sea_horse"]], "test": [["a.png", 3, "sea_horse"]]})
    data = load_data(str(path), {"train": "Labelled", "test": "Labelled"})
    (record,) = data["test"]
    assert isinstance(record, Labelled)
    assert (record.label, record.extra["name"]) == (3, "sea_horse")
    assert record.image is not None
    assert record.image.array().shape == (4, 4, 3)


@pytest.mark.parametrize(
    "content",
    [[{"text": "a", "label": 1}], {"text": "a", "label": 1}, {"train": [{"text": "a"}]}, {"messages": []}],
)
def test_other_json_is_not_one(tmp_path: Path, content: object) -> None:
    assert split_parts(write(tmp_path, content)) is None
    assert split_parts(write(tmp_path, {"train": [["a", 0, "b"]]}, "rows.jsonl")) is None
    assert split_parts(tmp_path / "missing.json") is None


def test_a_wrong_row_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, {"train": [["a.png", 0, "ant"], ["b.png", "one", "bee"]]})
    parts = split_parts(path)
    assert parts is not None
    with pytest.raises(DataError, match=r"not \[path, label, name\].*part 'train'.*row 2"):
        list(parts["train"])
