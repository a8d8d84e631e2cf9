"""The page around the sections: head, table of contents, what was left out and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pretrain.report.markup import Markup, join, tag
from pretrain.report.style import STYLE

# nothing is fetched and nothing runs, whatever a name in a config or a path may hold
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class Section:
    """A part of the report; `body` None leaves it out, and `missing` says why."""

    slug: str
    title: str
    body: Markup | None
    missing: str = ""


def section(slug: str, title: str, *parts: str | None) -> Section:
    return Section(slug, title, join(parts))


def left_out(slug: str, title: str, why: str) -> Section:
    return Section(slug, title, None, why)


def page(title: str, header: Markup, sections: Sequence[Section], footer: str) -> str:
    """The whole document, one string."""
    shown = [part for part in sections if part.body is not None]
    absent = [part for part in sections if part.body is None]
    entries = [tag("li", tag("a", part.title, href=f"#{part.slug}")) for part in shown]
    if absent:
        entries.append(tag("li", tag("a", "Not in this report", href="#absent")))
    body = [
        tag("a", "Skip to the report", href="#content", class_="skip"),
        header,
        tag("nav", tag("h2", "Contents"), tag("ol", *entries), aria_label="Contents"),
        tag("main", *[_shown(part) for part in shown], _absent(absent), id="content"),
        tag("footer", tag("p", footer)),
    ]
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name_="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", STYLE),
    ]
    return f"<!doctype html>\n{tag('html', tag('head', *head), tag('body', *body), lang='en')}\n"


def wide(table: Markup) -> Markup:
    """A table that scrolls inside its box where it is wider than the page."""
    return tag("div", table, class_="wide", tabindex=0, role="region", aria_label="table, scrolls sideways")


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    numbers: Sequence[int] = (),
    wrapped: Sequence[int] = (),
) -> Markup:
    """numbers: the columns that are aligned to the right; wrapped: those of words, which may be of several
    lines. The first cell of a row is its heading."""

    def class_of(place: int) -> str | None:
        return "number" if place in numbers else "wrap" if place in wrapped else None

    columns = [
        tag("th", name, scope="col", class_=class_of(place) if place in numbers else None)
        for place, name in enumerate(head)
    ]
    lines = [
        tag(
            "tr",
            tag("th", row[0], scope="row"),
            join(tag("td", cell, class_=class_of(place)) for place, cell in enumerate(row) if place),
        )
        for row in rows
    ]
    return wide(tag("table", tag("thead", tag("tr", *columns)), tag("tbody", *lines)))


def how_to_read(*words: str) -> Markup:
    """What a figure shows and what good looks like."""
    return tag("p", *words, class_="reading")


def _shown(part: Section) -> Markup:
    return tag(
        "section",
        tag("h2", part.title, id=f"{part.slug}-title"),
        part.body,
        id=part.slug,
        aria_labelledby=f"{part.slug}-title",
    )


def _absent(parts: Sequence[Section]) -> Markup | None:
    if not parts:
        return None
    entries = [tag("li", tag("b", part.title), ": ", part.missing) for part in parts]
    return tag("section", tag("h2", "Not in this report"), tag("ul", *entries), id="absent")
