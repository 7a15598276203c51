"""The page: everything of the run is on it, nothing from outside is markup, nothing is loaded."""

import base64
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from sample_run import GROUPS, write_sample

from temper.core.errors import ConfigError, StoreError
from temper.report.folder import read_run
from temper.report.page import render_report, write_report
from temper.report.pictures import grids

ATTACK = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{7*7}}$x_1$"


class Reader(HTMLParser):
    """Collects tags, attributes and ids; complains about unbalanced tags."""

    VOID = frozenset({"meta", "br", "img", "link", "hr", "input"})

    def __init__(self):
        super().__init__()
        self.stack, self.tags, self.attributes, self.ids = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value for key, value in attrs if key == "id"]
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.stack.pop()

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag


def read(html):
    reader = Reader()
    reader.feed(html)
    assert reader.stack == []
    return reader


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return render_report(write_sample(tmp_path_factory.mktemp("run")))


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    return render_report(
        write_sample(tmp_path_factory.mktemp("run"), arms=("a",), seeds=(0,), hostile=ATTACK)
    )


def test_it_is_one_well_formed_page_with_unique_ids(page):
    reader = read(page)
    assert len(reader.ids) == len(set(reader.ids))
    assert reader.tags.count("h1") == 1


def test_it_loads_nothing_and_runs_nothing(page):
    reader = read(page)
    assert not {"script", "link", "iframe", "object", "embed", "img", "form"} & set(reader.tags)
    assert "default-src 'none'" in page
    for key, value in reader.attributes:
        assert not key.startswith("on")
        if key in ("href", "src", "xlink:href"):
            assert value.startswith("#"), value
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)


def test_text_from_outside_is_never_markup(attacked):
    reader = read(attacked)
    assert not {"script", "img"} & set(reader.tags)
    assert not any(key.startswith("on") for key, _ in reader.attributes)
    assert "{{7*7}}" in attacked
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in attacked
    # once a place: title, h1, arm headings, prompt, replies, settings, attempts, notes, environment, figures
    assert attacked.count("&lt;script&gt;") > 15


def test_every_section_is_there(page):
    for anchor in (
        "metrics",
        "curves",
        "categories",
        "examples",
        "attempts",
        "settings",
        "cost",
        "environment",
    ):
        assert f'<section id="{anchor}"' in page
        assert f'href="#{anchor}"' in page
    for title in ("ROC", "Threshold: category", "Calibration", "Attack effect over budget"):
        assert f"<h3>{title}</h3>" in page
    for group in GROUPS:
        assert f'<th scope="row">{group}</th>' in page


def with_picture(tmp_path, content):
    folder = write_sample(tmp_path, arms=("a",), seeds=(0,))
    step = next((folder / "steps").iterdir())
    (step / "figures.json").write_text(json.dumps({"pictures": {"Drawn <b>": {"png": content}}}))
    return folder


def test_pictures_stand_in_the_page_itself(tmp_path):
    content = base64.b64encode(b"\x89PNG\r\n\x1a\nrest").decode()
    html = render_report(with_picture(tmp_path, content))
    sources = [value for key, value in read(html).attributes if key == "src"]
    assert sources == ["data:image/png;base64," + content]
    assert "<b>" not in html


@pytest.mark.parametrize("content", ["<svg onload=x>", base64.b64encode(b"<svg/>").decode(), 3])
def test_nothing_but_a_png_is_a_picture(tmp_path, content):
    with pytest.raises(StoreError, match="no PNG"):
        render_report(with_picture(tmp_path, content))


def with_table(tmp_path, table):
    folder = write_sample(tmp_path, arms=("a",), seeds=(0, 1))
    for step in (folder / "steps").glob("test-*"):
        (step / "figures.json").write_text(json.dumps({"tables": {"Words <b>": table}}))
    return folder


def test_tables_of_steps_are_on_the_page(tmp_path):
    html = render_report(
        with_table(tmp_path, {"columns": ["vector", "word"], "rows": [["1", "<i>photo</i>"]]})
    )
    assert html.count("Words &lt;b&gt; (a · seed 0, test)</caption>") == 1
    assert "seed 1, test" not in html, "one seed says enough"
    assert '<th scope="row">1</th><td>&lt;i&gt;photo&lt;/i&gt;</td>' in html
    assert 'href="#noted"' in html


@pytest.mark.parametrize("table", [{"columns": ["a"], "rows": [["1", "2"]]}, {"rows": []}, 3])
def test_a_table_must_fit_its_columns(tmp_path, table):
    with pytest.raises(StoreError, match="no columns, or rows of other lengths"):
        render_report(with_table(tmp_path, table))


def test_strips_of_arms_stand_side_by_side(tmp_path):
    folder = write_sample(tmp_path, arms=("before", "after"), seeds=(0, 1))
    content = base64.b64encode(b"\x89PNG\r\n\x1a\nrest").decode()
    record = json.loads((folder / "run.json").read_text())
    for cell in record["cells"]:
        strips = {"star": {"png": content}} | ({"ring": {"png": content}} if cell["arm"] == "after" else {})
        place = folder / "steps" / next(iter(cell["steps"].values()))
        (place / "figures.json").write_text(json.dumps({"grids": {"Drawn": strips}}))
    found = grids(read_run(folder).steps)
    uri = "data:image/png;base64," + content
    assert found == [("Drawn (seed 0)", ["before", "after"], [("star", [uri, uri]), ("ring", ["", uri])])], (
        "one seed, so that a column differs from the next by its arm alone"
    )
    html = render_report(folder)
    assert [v for k, v in read(html).attributes if k == "src"] == [uri] * 3
    assert 'alt="ring, after"' in html


def test_what_attacks_wrote_is_folded(page):
    text = page[page.index('<section id="attempts"') :]
    assert text.count("<details><summary>Show input and reply</summary>") == 18
    without = re.sub(r"<details>.*?</details>", "", text, flags=re.DOTALL)
    assert "vex rel" not in without


def test_settings_carry_their_origins_and_differences(page):
    text = page[page.index('<section id="settings"') : page.index('<section id="cost"')]
    assert "refusal-tokens/small, step refuse" in text
    assert re.search(r"<code>single</code> <span class=\"note\">single</span>", text)  # differs between arms
    assert text.count(">num_epochs</th>") == 1


def test_cost_says_what_was_not_recorded(page):
    text = page[page.index('<section id="cost"') : page.index('<section id="environment"')]
    assert "1 min 23 s" in text
    assert "2.30 GiB" in text
    assert "<td>–</td>" in text


def test_tables_are_accessible(page):
    for table in re.findall(r"<table.*?</table>", page, flags=re.DOTALL):
        assert "<caption>" in table
        assert 'scope="col"' in table
        assert "<th>" not in table
    for figure in re.findall(r"<figure>.*?</figure>", page, flags=re.DOTALL):
        assert re.search(r'role="img" aria-label="[^"]+', figure)


def test_figures_use_the_colours_of_the_page(page):
    drawings = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(drawings) == 5
    for drawing in drawings:
        assert "var(--ink)" in drawing
        assert not re.search(r"#0[0-9a-f]0[0-9a-f]0[0-9a-f]\b", drawing)


def test_the_same_run_gives_the_same_page(tmp_path):
    folder = write_sample(tmp_path / "run", seeds=(0,))
    assert render_report(folder) == render_report(folder)


def test_a_run_with_nothing_but_its_record(tmp_path):
    (tmp_path / "run.json").write_text(
        json.dumps({"id": "x", "status": "failed", "error": "DataError: no <rows>"})
    )
    html = render_report(tmp_path)
    read(html)
    assert "did not finish: DataError: no &lt;rows&gt;" in html
    assert "This run has no rows" in html


def test_writing_is_whole_or_not_at_all(tmp_path):
    folder = write_sample(tmp_path / "run", arms=("a",), seeds=(0,))
    path = write_report(folder)
    assert path == folder / "report.html"
    good = path.read_text()
    (folder / "steps" / "test-a-0" / "figures.json").write_text("{")
    with pytest.raises(StoreError, match=r"figures\.json"):
        write_report(folder)
    assert path.read_text() == good
    assert not list(folder.glob(".report*"))


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(ConfigError, match="not a run folder"):
        write_report(tmp_path)
