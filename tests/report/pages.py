"""Reading a report back, strictly."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

# the sections of a run of several tasks that was resumed, evaluated and exported
ALL = [
    *("tasks", "views", "restorations", "weights", "training", "health", "attempts", "attention", "patches"),
    *("plane", "neighbours", "evaluation", "export"),
]
VOID = {"img", "meta", "br"}  # of HTML; in SVG a tag closes itself


@dataclass
class Element:
    name: str
    attributes: dict[str, str]
    children: list[Element] = field(default_factory=list)
    words: str = ""

    @property
    def text(self) -> str:
        return self.words

    def all(self, name: str) -> list[Element]:
        found = [self] if self.name == name else []
        return found + [inner for child in self.children for inner in child.all(name)]


class _Reader(HTMLParser):
    """Builds the tree and refuses what is not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Element("#root", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"an attribute stands twice in <{tag}>"
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].children.append(Element(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].name == tag, f"</{tag}> closes <{self.open[-1].name}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element.words += data


def parse(text: str) -> Element:
    reader = _Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == [reader.root], f"<{reader.open[-1].name}> is never closed"
    return reader.root


def read_report(path: Path) -> Element:
    """A report that holds nothing to fetch and nothing to run."""
    text = path.read_text(encoding="utf-8")
    page = parse(text)
    for element in page.all("script") + page.all("link") + page.all("iframe") + page.all("object"):
        raise AssertionError(f"<{element.name}> in a report")
    for name in ("img", "image", "a", "use"):
        for element in page.all(name):
            address = element.attributes.get("src") or element.attributes.get("href") or ""
            assert address.startswith(("data:image/", "#")), address[:60]
    assert not re.search(r"url\(|@import", text), "the style fetches something"
    handlers = [name for element in _everything(page) for name in element.attributes if name.startswith("on")]
    assert handlers == []
    return page


def _everything(element: Element) -> list[Element]:
    return [element] + [inner for child in element.children for inner in _everything(child)]


def section_ids(page: Element) -> list[str]:
    return [section.attributes["id"] for section in page.all("section")]


def section_of(page: Element, slug: str) -> Element:
    (found,) = [section for section in page.all("section") if section.attributes["id"] == slug]
    return found
