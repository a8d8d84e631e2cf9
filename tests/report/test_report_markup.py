"""Markup: whatever a config, a path or a class is called, it stays text."""

from __future__ import annotations

import pytest
from pages import parse

from pretrain.report.markup import Markup, join, tag, text

HOSTILE = "</td><script>alert(1)</script>\"' onload=x & \x1b[31m"


@pytest.mark.parametrize("name", ["p", "td", "figcaption", "text"])
def test_text_between_tags_comes_back_as_text(name: str) -> None:
    root = parse(tag(name, HOSTILE))
    (element,) = root.children
    assert element.children == []
    assert element.text == HOSTILE.replace("\x1b", "\ufffd")


def test_an_attribute_cannot_be_left_by_its_value() -> None:
    (element,) = parse(tag("img", src="data:image/png;base64,", alt=HOSTILE)).children
    assert set(element.attributes) == {"src", "alt"}
    assert element.attributes["alt"] == HOSTILE.replace("\x1b", "\ufffd")


def test_only_markup_made_here_is_left_as_it_is() -> None:
    inner = tag("b", "x < y")
    assert tag("p", inner, " and <b>") == "<p><b>x &lt; y</b> and &lt;b&gt;</p>"
    assert isinstance(join([inner, "<", None]), Markup)
    assert join([inner, "<", None]) == "<b>x &lt; y</b>&lt;"
    assert text("<b>") == "&lt;b&gt;"
    # an ordinary operation on markup gives ordinary text, which is escaped again where it enters a tag
    assert not isinstance(inner + "<i>", Markup)


def test_attributes_are_named_written_short_and_left_out_as_told() -> None:
    made = tag("line", x1=1.0, x2=0.3333, y1=-0.001, stroke_width=2, class_="grid", hidden=None, open=True)
    assert made == '<line x1="1" x2="0.33" y1="-0" stroke-width="2" class="grid" open/>'
