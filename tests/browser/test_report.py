"""The report in a real browser: it renders, fits a phone, and no text on it becomes a script."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "report"))
from sample_run import write_sample

from temper.report.page import write_report

BROWSER = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on this machine")

PROBE = "<script>document.title='HIT'</script><img src=x onerror=\"document.title='HIT'\">"


def browse(page, profile, *arguments):
    common = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={profile}",
    ]
    done = subprocess.run(
        [BROWSER, *common, *arguments, page.as_uri()], capture_output=True, timeout=60, check=True
    )
    return done.stdout.decode()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return write_report(
        write_sample(tmp_path_factory.mktemp("run"), arms=("a", "b"), seeds=(0,), hostile=PROBE)
    )


def test_no_text_of_the_run_becomes_a_script(page, tmp_path):
    dom = browse(page, tmp_path, "--dump-dom")
    title = re.search(r"<title>(.*?)</title>", dom, re.DOTALL)[1]
    assert "temper report" in title  # the probe would have replaced it
    assert "<img" not in dom


@pytest.mark.parametrize("width", [360, 1200])
def test_the_page_is_drawn_and_not_wider_than_the_window(page, tmp_path, width):
    # A frame of the wanted width reports whether its document is wider: headless windows have a least width.
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<iframe id="f" src="{page.as_uri()}" style="border:0" width="{width}" height="800"></iframe><script>'
        "onload = () => { const d = document.getElementById('f').contentDocument.documentElement;"
        " document.title = `${d.scrollWidth}x${d.scrollHeight}x${d.querySelectorAll('svg').length}`; }</script>"
    )
    dom = browse(frame, tmp_path / "profile", "--allow-file-access-from-files", "--dump-dom")
    wide, high, drawings = map(int, re.search(r"<title>(\d+)x(\d+)x(\d+)</title>", dom).groups())
    assert wide <= width
    assert high > 2000
    assert drawings == 5
