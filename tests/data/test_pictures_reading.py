"""Images as rows: in Parquet, JSON lines, CSV and folders, as labelled records."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest

from temper.core.errors import ConfigError, DataError
from temper.core.spec import parse_data
from temper.data.loading import load_data, write_jsonl
from temper.data.pictures import Picture
from temper.data.schemas import Captioned, Labelled

GREY = Picture.from_array(np.arange(64, dtype=np.uint8).reshape(8, 8))
COLOUR = Picture.from_array(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))


def write(path, content: bytes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def pixels(record) -> np.ndarray:
    return record.image.array()


@pytest.mark.parametrize("name", ["image", "img"])
@pytest.mark.parametrize("shape", ["struct", "bytes", "path"])
def test_parquet_images(tmp_path, name, shape):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    write(tmp_path / "a.png", COLOUR.png())
    value = {"struct": {"bytes": COLOUR.png(), "path": None}, "bytes": COLOUR.png(), "path": {"bytes": None, "path": "a.png"}}  # fmt: skip
    pq.write_table(pa.table({name: [value[shape]], "label": [3]}), tmp_path / "rows.parquet")
    (record,) = load_data(str(tmp_path / "rows.parquet")).rows
    assert isinstance(record, Labelled)
    assert (record.text, record.label) == ("", 3)
    assert (pixels(record) == COLOUR.pixels).all()


def test_json_lines_and_csv_take_paths_and_data_uris(tmp_path):
    write(tmp_path / "a.png", GREY.png())
    rows = [{"image": "a.png", "label": "seven"}, {"image": GREY.uri(), "label": "seven"}]
    write(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, rows)).encode())
    write(tmp_path / "rows.csv", f'image,label\na.png,7\n"{GREY.uri()}",7\n'.encode())
    for name, label in (("rows.jsonl", "seven"), ("rows.csv", 7)):
        records = load_data(str(tmp_path / name)).rows
        assert [record.label for record in records] == [label, label]
        assert all((pixels(record)[:, :, 0] == GREY.pixels[:, :, 0]).all() for record in records)


def test_an_image_with_a_text_is_captioned_unless_asked_for_otherwise(tmp_path):
    row = {"image": GREY.uri(), "text": "a digit", "label": 1}
    path = write(tmp_path / "rows.jsonl", json.dumps(row).encode())
    assert isinstance(load_data(str(path)).rows[0], Captioned)
    labelled = load_data(str(path), "Labelled").rows[0]
    assert labelled.image is not None
    assert labelled.extra == {"text": "a digit"}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("data:image/png;base64,***", r"Not an image in base64.*line 1, column 'image'"),
        (5, "5 is a number, not a text"),
        ({"bytes": None, "path": None}, "None is nothing, not a text"),
    ],
)
def test_a_wrong_image_names_its_row(tmp_path, value, message):
    path = write(tmp_path / "rows.jsonl", json.dumps({"image": value, "label": 1}).encode())
    with pytest.raises(DataError, match=message):
        load_data(str(path))


def test_written_labelled_images_read_back(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [Labelled("", 3, GREY, id="x")])
    (record,) = load_data(str(tmp_path / "a.jsonl")).rows
    assert (record.id, record.label) == ("x", 3)
    assert (pixels(record) == GREY.pixels).all()


def test_a_folder_of_classes(tmp_path):
    for name, number in (("cat", 3), ("dog", 1)):
        for i in range(number):
            write(tmp_path / "photos" / name / f"{i}.png", COLOUR.png())
    write(tmp_path / "photos" / "cat" / "notes.txt", b"x")
    write(tmp_path / "photos" / ".cache" / "x.png", b"x")
    data = load_data(str(tmp_path / "photos"))
    assert list(data) == ["train"]
    assert [record.id for record in data.rows] == ["cat/0.png", "dog/0.png", "cat/1.png", "cat/2.png"]
    assert [record.label for record in data.rows] == ["cat", "dog", "cat", "cat"]
    assert [record.extra["class_index"] for record in data.rows] == [0, 1, 0, 0]
    assert (pixels(data.rows[0]) == COLOUR.pixels).all()


def test_splits_above_the_classes_share_their_order(tmp_path):
    for name in ("train/b", "train/c", "test/a", "test/c"):
        write(tmp_path / name / "x.png", GREY.png())
    data = load_data(f"{tmp_path}/")
    assert set(data) == {"train", "test"}
    assert {r.label: r.extra["class_index"] for part in data.values() for r in part} == {
        "a": 0,
        "b": 1,
        "c": 2,
    }
    assert list(load_data({"forget": f"{tmp_path}/train/"})) == ["forget"]


def test_a_folder_of_files_has_their_parts(tmp_path):
    for part in ("forget", "retain"):
        write(tmp_path / "rows" / f"{part}.jsonl", b'{"text": "t"}\n')
    assert set(load_data(f"{tmp_path}/rows")) == {"forget", "retain"}
    write(tmp_path / "rows" / "retain.csv", b"text\nt\n")
    with pytest.raises(DataError, match="Two files are the part 'retain'"):
        load_data(f"{tmp_path}/rows")


def test_wrong_folders_say_so(tmp_path):
    with pytest.raises(DataError, match="There is no such folder"):
        load_data(f"{tmp_path}/none/")
    write(tmp_path / "flat" / "a.png", GREY.png())
    with pytest.raises(DataError, match="neither files of rows nor images by class"):
        load_data(f"{tmp_path}/flat/")


def test_specs_of_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    assert parse_data("./photos").kind == "folder"
    assert parse_data("photos/").kind == "folder"
    assert parse_data("photos").kind == "step"
    with pytest.raises(ConfigError, match="is not understood"):
        parse_data("./none")


def test_a_broken_image_is_named_when_it_is_looked_at(tmp_path):
    path = write(tmp_path / "c" / "a.png", b"not a png")
    (record,) = load_data(f"{tmp_path}/").rows
    with pytest.raises(DataError, match=rf"Not an image: cannot identify image file \(.*{path.name}"):
        record.image.array()


def test_16_bits_are_scaled_not_cut():
    Image = pytest.importorskip("PIL.Image")
    out = io.BytesIO()
    Image.fromarray((np.arange(16, dtype=np.uint16) * 4096).reshape(4, 4)).save(out, "PNG")
    assert Picture.from_bytes(out.getvalue()).array().ravel().tolist() == list(range(0, 256, 16))


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        ([[0.0, np.nan]], "not finite numbers"),
        ([[0.0, np.inf]], "not finite numbers"),
        ([[0.0, 0.5]], "lie between 0 and 0.5.*Scale them to 0 to 255"),
        ([[-3.0, 9.0]], "lie between -3 and 9"),
        ([[0.0, 70_000.0]], "lie between 0 and 70000"),
    ],
)
def test_wide_pixels_are_never_cut_without_a_word(pixels, message):
    Image = pytest.importorskip("PIL.Image")
    out = io.BytesIO()
    Image.fromarray(np.array(pixels, dtype=np.float32)).save(out, "TIFF")
    with pytest.raises(DataError, match=message):
        Picture.from_bytes(out.getvalue()).array()


def test_float_pixels_from_0_to_255_are_read():
    Image = pytest.importorskip("PIL.Image")
    out = io.BytesIO()
    Image.fromarray(np.array([[0, 7, 255]], dtype=np.float32)).save(out, "TIFF")
    assert Picture.from_bytes(out.getvalue()).array().ravel().tolist() == [0, 7, 255]


def test_a_class_without_an_image_is_named(tmp_path):
    """Left out, it would give the classes behind it other numbers."""
    for name in ("a.png", "c.png"):
        write(tmp_path / name[0] / name, b"")
    write(tmp_path / "b" / "notes.txt", b"")
    with pytest.raises(DataError, match=r"The class 'b' has no image \(.*b\).*remove the folder"):
        load_data(f"{tmp_path}/")
