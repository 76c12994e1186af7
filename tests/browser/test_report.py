"""The report in a browser: it asks for nothing, shows every picture, and fits a telephone."""

from pathlib import Path

import pytest

from tests.browser.conftest import Tab
from tests.unit.workflows.tiny_run import make_run
from workflows.report import write_report

pytestmark = [pytest.mark.browser, pytest.mark.slow]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory: Path = make_run(tmp_path_factory.mktemp("runs") / "tiny")
    return f"file://{write_report(directory)}"


@pytest.mark.parametrize("width", [1200, 360])
def test_the_page_shows_every_picture_and_is_no_wider_than_its_window(
    tab: Tab, address: str, width: int
) -> None:
    tab.open(address, width=width)
    assert tab.value("document.images.length") > 20
    assert tab.value("[...document.images].every(image => image.complete && image.naturalWidth > 0)") is True
    assert tab.value("document.documentElement.scrollWidth") <= width


def test_the_page_asks_for_nothing_and_the_browser_has_nothing_to_complain_of(tab: Tab, address: str) -> None:
    tab.requests.clear()
    tab.complaints.clear()
    tab.open(address, width=1200)
    tab.value("0")
    assert [request for request in tab.requests if not request.startswith("data:")] == [address]
    assert tab.complaints == []


def test_every_link_of_the_head_leads_to_its_chapter(tab: Tab, address: str) -> None:
    tab.open(address, width=1200)
    targets = "[...document.querySelectorAll('nav a')].map(link => link.getAttribute('href'))"
    assert tab.value(f"{targets}.length") >= 6
    assert tab.value(f"{targets}.every(target => document.querySelector(target))") is True
