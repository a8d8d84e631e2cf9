"""The report in a real browser: on a phone and a desktop, in light and dark, without a network."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pages import ALL

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SIZES = {"phone": (390, 844), "narrow phone": (320, 640), "desktop": (1280, 900)}
SMALLEST_PX = {"phone": 11.0, "narrow phone": 10.0, "desktop": 11.0}  # of text in a drawing

# of every picture, in <img> and in <image>: did it decode, and to what width
DECODED = """async () => {
  const addresses = [...document.querySelectorAll('img')].map(one => one.src)
    .concat([...document.querySelectorAll('svg image')].map(one => one.href.baseVal));
  return Promise.all(addresses.map(async address => {
    const image = new Image();
    image.src = address;
    await image.decode();
    return image.naturalWidth;
  }));
}"""
TEXT_PX = """() => [...document.querySelectorAll('svg text')].map(text =>
  parseFloat(getComputedStyle(text).fontSize) * text.getScreenCTM().a)"""
# elements that reach beyond the right edge of the page, but for what scrolls in a box of its own
BEYOND = """() => [...document.body.querySelectorAll('*')].filter(one =>
  !one.closest('.wide') && !one.closest('svg') && !one.matches('.skip') &&
  one.getBoundingClientRect().right > innerWidth + 1).map(one => one.outerHTML.slice(0, 80))"""
OVERLAPPING_LABELS = """() => [...document.querySelectorAll('svg.chart')].filter(chart => {
  const boxes = [...chart.querySelectorAll('text')].map(text => text.getBoundingClientRect());
  return boxes.some((one, i) => boxes.some((other, j) => i < j && one.left < other.right - 1 &&
    other.left < one.right - 1 && one.top < other.bottom - 3 && other.top < one.bottom - 3));
}).map(chart => chart.getAttribute('aria-label'))"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser is installed: none of {', '.join(BROWSERS)} is on the PATH")
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's own rule for root
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=found, args=arguments)
        yield opened
        opened.close()


class Watched:
    """A page that lets nothing through but the file itself, and remembers what it complained about."""

    def __init__(self, browser: Any, size: str, **settings: Any) -> None:
        width, height = SIZES[size]
        self.context = browser.new_context(viewport={"width": width, "height": height}, **settings)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("requestfailed", lambda request: self.complaints.append(f"failed: {request.url[:80]}"))
        self.context.route("**/*", self._decide)

    def _decide(self, route: Any) -> None:
        address = route.request.url
        if address.startswith("data:"):
            route.continue_()
            return
        self.requests.append(address)
        if address.startswith("file:"):
            route.continue_()
        else:
            route.abort()

    def open(self, path: Path) -> Any:
        self.page.goto(path.as_uri())
        return self.page


@pytest.mark.parametrize(
    ("size", "scheme"),
    [
        ("phone", "light"),
        ("phone", "dark"),
        ("narrow phone", "light"),
        ("desktop", "light"),
        ("desktop", "dark"),
    ],
)
def test_it_fits_decodes_and_asks_for_nothing(
    browser: Any, complete: Path, tmp_path: Path, size: str, scheme: str
) -> None:
    watched = Watched(browser, size, color_scheme=scheme)
    page = watched.open(complete / "report.html")
    width = SIZES[size][0]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(BEYOND) == []
    widths = page.evaluate(DECODED)
    assert len(widths) > 100
    assert min(widths) > 0
    assert min(page.evaluate(TEXT_PX)) >= SMALLEST_PX[size]
    assert page.evaluate(OVERLAPPING_LABELS) == []
    shown = page.evaluate("[...document.querySelectorAll('main > section')].map(one => one.id)")
    assert shown == ALL
    heights = page.evaluate("[...document.querySelectorAll('main > section')].map(one => one.offsetHeight)")
    assert min(heights) > 100
    picture = tmp_path / f"{size}-{scheme}.png"
    page.screenshot(path=picture, full_page=True)
    assert picture.stat().st_size > 50_000
    assert watched.complaints == []
    assert watched.requests == [(complete / "report.html").as_uri()]
    watched.context.close()


def test_both_schemes_have_readable_contrast(browser: Any, complete: Path) -> None:
    """WCAG's 4.5:1 for words and 3:1 for lines, computed from what the browser resolved."""
    script = """(names) => names.map(name => {
      const probe = document.createElement('span');
      probe.style.color = `var(${name})`;
      document.body.append(probe);
      const color = getComputedStyle(probe).color.match(/[\\d.]+/g).map(Number);
      probe.remove();
      return color;
    })"""
    words = ["--ink", "--soft", "--link", "--good", "--bad"]
    lines = [f"--c{place}" for place in range(8)]
    for scheme in ("light", "dark"):
        watched = Watched(browser, "desktop", color_scheme=scheme)
        page = watched.open(complete / "report.html")
        papers = page.evaluate(script, ["--paper", "--card", "--note"])
        for names, least in ((words, 4.5), (lines, 3.0)):
            for name, color in zip(names, page.evaluate(script, names), strict=True):
                for paper in papers:
                    assert contrast(color, paper) >= least, (scheme, name, color, paper)
        watched.context.close()


def contrast(one: list[float], other: list[float]) -> float:
    def luminance(color: list[float]) -> float:
        shares = [value / 255 for value in color]
        linear = [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_links_lead_to_their_sections_and_wide_tables_scroll_in_their_box(
    browser: Any, complete: Path
) -> None:
    watched = Watched(browser, "phone")
    page = watched.open(complete / "report.html")
    for slug in ALL:
        page.click(f"nav a[href='#{slug}']")
        assert -1 < page.evaluate(f"document.getElementById('{slug}').getBoundingClientRect().top") < 844
        page.evaluate("scrollTo(0, 0)")
    boxes = page.evaluate(
        "[...document.querySelectorAll('.wide')].map(box => [box.scrollWidth > box.clientWidth, "
        "getComputedStyle(box).overflowX, box.tabIndex])"
    )
    assert any(is_wide for is_wide, _, _ in boxes)
    assert all(overflow == "auto" and index == 0 for _, overflow, index in boxes)
    watched.context.close()


def test_print_is_light_and_loses_nothing(browser: Any, complete: Path, tmp_path: Path) -> None:
    watched = Watched(browser, "desktop", color_scheme="dark")
    page = watched.open(complete / "report.html")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
    heights = page.evaluate("[...document.querySelectorAll('main > section')].map(one => one.offsetHeight)")
    assert len(heights) == len(ALL)
    assert min(heights) > 100
    page.pdf(path=tmp_path / "report.pdf", format="A4")
    assert (tmp_path / "report.pdf").stat().st_size > 50_000
    watched.context.close()
