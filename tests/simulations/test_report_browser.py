"""The page of a report in a real browser: it fetches nothing, no script throws, it fits a phone."""

from __future__ import annotations

import html
import re
from pathlib import Path

import pytest

from prunecast.simulations.report import gather, write_studies
from support.browser import open_page

pytestmark = pytest.mark.engine


def test_a_page_that_fetches_and_throws_is_found_out(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text('<img src="http://127.0.0.1:9/x.png"><script>nothingLikeThis()</script>')
    seen = open_page(page, tmp_path)
    assert seen.fetched == ["http://127.0.0.1:9/x.png"]
    assert "nothingLikeThis is not defined" in seen.said[0]


def test_the_report_stands_alone_in_a_browser(folders, tmp_path: Path) -> None:
    written = write_studies(tmp_path, gather(folders))
    seen = open_page(written["page"], tmp_path)
    assert seen.fetched == []
    assert seen.said == []
    assert seen.dom.count("<svg") == written["page"].read_text().count("<svg")
    assert "Pareto front" in seen.dom


@pytest.mark.parametrize("width", [390, 1200])
def test_nothing_sticks_out_at_the_sides(folders, tmp_path: Path, width: int) -> None:
    written = write_studies(tmp_path, gather(folders))
    text = written["page"].read_text().replace("<details>", "<details open>")
    probe = (
        "<script>parent.document.title = JSON.stringify([document.documentElement.scrollWidth, "
        "innerWidth, [...document.querySelectorAll('svg.wide')].filter(s => "
        "getComputedStyle(s).display != 'none').length])</script></body>"
    )
    # a window is never narrower than 500 pixels: the phone is a frame in it
    inside = html.escape(text.replace("</body>", probe), quote=True)
    style = f"width:{width}px;height:900px;border:0"
    page = tmp_path / "frame.html"
    page.write_text(f'<title></title><iframe srcdoc="{inside}" style="{style}"></iframe>')
    shown = open_page(page, tmp_path, width=width + 100)
    taken = re.search(r"<title>\[(\d+),(\d+),(\d+)\]</title>", shown.dom)
    assert taken is not None
    needed, there, wide = map(int, taken.groups())
    assert there == width
    assert needed <= there
    assert (wide > 0) == (width > 600)
