"""The result of `make bench` as text and as the README's table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

BEGIN, END = "<!-- step times: begin -->", "<!-- step times: end -->"


def lines_of(result: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The lines of all tables, in order; a table that failed is one line."""
    for name, table in result["tables"].items():
        if "problem" in table:
            yield {"label": name, "absent": table["problem"]}
        else:
            yield from table["rows"]


def verdict(line: Mapping[str, Any]) -> str:
    """Whether the median is what is wanted; `close` where only the lower quartile is."""
    if "wanted" not in line:
        return ""
    ratio = line["ratio"]
    if ratio["median"] <= line["wanted"]:
        return "yes"
    return "close" if ratio["lower"] <= line["wanted"] else "no"


def text(result: Mapping[str, Any]) -> str:
    width = max(len(line["label"]) for line in lines_of(result)) + 2
    found = [f"{'':{width}}{'median':>8}{'quartiles':>18}{'range':>18}{'wanted':>9}  met"]
    for line in lines_of(result):
        if "absent" in line:
            found.append(f"{line['label']:{width}}  {line['absent']}")
            continue
        ratio = line["ratio"]
        middle, all_of_them = (
            f"{ratio[low]:.3f} to {ratio[high]:.3f}" for low, high in (("lower", "upper"), ("low", "high"))
        )
        wanted = f"{line['wanted']:.2f}" if "wanted" in line else ""
        spread = f"{ratio['median']:8.3f}{middle:>18}{all_of_them:>18}"
        found.append(f"{line['label']:{width}}{spread}{wanted:>9}  {verdict(line)}".rstrip())
    return "\n".join(found)


def markdown(result: Mapping[str, Any]) -> str:
    """The README's table, between its marks."""
    rows = [
        "| step time of / step time of | ratio, with quartiles | wanted | met |",
        "| --- | --- | --- | --- |",
    ]
    for line in lines_of(result):
        if "absent" in line:
            rows.append(f"| {line['label']} | {line['absent']} | | |")
            continue
        ratio = line["ratio"]
        wanted = f"≤ {line['wanted']:.2f}" if "wanted" in line else ""
        middle = f"{ratio['median']:.3f} ({ratio['lower']:.3f} to {ratio['upper']:.3f})"
        rows.append(f"| {line['label']} | {middle} | {wanted} | {verdict(line)} |")
    note = f" {result['note']}" if "note" in result else ""
    rows += ["", f"Measured on {_conditions(result)}.{note}"]
    return "\n".join([BEGIN, *rows, END])


def _conditions(result: Mapping[str, Any]) -> str:
    machine = result["machine"]
    rounds = [table["rounds"] for table in result["tables"].values() if "rounds" in table]
    packages = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    load = f"{machine['cores']} cores, load {machine['load']:.1f} as it began"
    return f"{machine['cpu']}, {load}; {min(rounds)} to {max(rounds)} rounds; {packages}"


def in_readme(readme: str) -> str:
    """What stands between the marks, with them."""
    begin, end = readme.index(BEGIN), readme.index(END)
    return readme[begin : end + len(END)]
