"""HTML and SVG from plain function calls, in which nothing but markup made here is left unescaped."""

from __future__ import annotations

import html
from collections.abc import Iterable

_VOID = frozenset({"img", "meta", "br", "circle", "image", "line", "path", "rect", "use", "stop"})


class Markup(str):
    """Text that is markup already. Any other text is escaped where it enters a tag."""

    __slots__ = ()


def text(value: object) -> Markup:
    """Escaped; characters that no page may hold, such as a terminal's codes, become a visible stand-in."""
    shown = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in str(value))
    return Markup(html.escape(shown, quote=True))


def join(parts: Iterable[str | None], separator: str = "") -> Markup:
    """The parts one after the other; None is left out."""
    return Markup(separator.join(_child(part) for part in parts if part is not None))


def tag(name: str, *children: str | None, **attributes: object) -> Markup:
    """`tag("p", "a < b", class_="note")` is `<p class="note">a &lt; b</p>`.

    A trailing underscore of an attribute's name is dropped, the others become hyphens. None leaves a child or
    an attribute out, True gives an attribute without a value.
    """
    opened = name
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        opened += f" {key}" if value is True else f' {key}="{text(_number(value))}"'
    if name in _VOID and not children:
        return Markup(f"<{opened}>" if name in ("img", "meta", "br") else f"<{opened}/>")
    return Markup(f"<{opened}>{join(children)}</{name}>")


def _child(part: str) -> str:
    return part if isinstance(part, Markup) else text(part)


def _number(value: object) -> object:
    """Coordinates with two decimals at most: they are most of a drawing's bytes."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value
