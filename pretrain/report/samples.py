"""The section that shows what the network is given: originals, their crops, clean views and patch plans."""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.report.markup import Markup, join, tag
from pretrain.report.page import Section, how_to_read, section
from pretrain.report.patch_drawing import (
    FINE_COLUMNS,
    VIEW_DASHES,
    Plan,
    crop_drawing,
    plan_drawing,
    plan_legend,
    share_bar,
)
from pretrain.report.pictures import Pixels, panel, panels, picture

PATCH_TASKS = ("colorization", "inpainting", "relative_position", "jigsaw")


@dataclass(frozen=True)
class SampleView:
    """One view of an image, as a training step of the run would show it."""

    name: str
    box: tuple[int, int, int, int]  # top, left, height, width of the crop, in px of the original
    clean: Pixels
    seen: Pixels | None  # what the encoder is given, what is hidden from it in grey; None: the clean view
    plan: Plan
    words: tuple[str, ...] = ()  # such as "flipped", "turned by 90°"


@dataclass(frozen=True)
class SampleImage:
    """An image and the views of it."""

    original: Pixels  # perhaps shrunk
    size: tuple[int, int]  # (height, width) in px of the image itself
    views: tuple[SampleView, ...]
    label: str | None = None


@dataclass(frozen=True)
class Samples:
    """Some images of the data, and how many views there are of each."""

    images: tuple[SampleImage, ...]
    num_views: int  # of the recipe; not all may be shown
    source: str  # where the images are from


def samples_section(samples: Samples) -> Section:
    first, view = samples.images[0], _telling(samples.images[0])
    plans = [view.plan for image in samples.images for view in image.views]
    legend = plan_legend(plans)
    is_planned = view.plan.is_changed
    views = f"{samples.num_views} view{'s' if samples.num_views > 1 else ''}"
    rows = samples.images[1:] if is_planned and len(samples.images) > 1 else samples.images
    parts: list[Markup | None] = [
        how_to_read(
            f"Images of {samples.source}, cut and changed exactly as a training step of this run does. ",
            _method_of(view),
            f" The recipe has {views} of each image"
            + (f"; {len(first.views)} are shown." if samples.num_views > len(first.views) else "."),
        ),
        _hero(first, view, legend) if is_planned else None,
        tag("h3", "More images") if is_planned else None,
        how_to_read(
            "For each image the original with the box of every crop ("
            + ", ".join(f"{view.name} {_dash_name(place)}" for place, view in enumerate(first.views))
            + "), then each view clean and as the encoder gets it. ",
            tag("b", "Good"),
            ": what is left of the image is enough for a person to answer what the tasks ask.",
        ),
        join(_row(image) for image in rows),
    ]
    return section("views", "Views and patch plans", *parts)


def _method_of(view: SampleView) -> str:
    plan = view.plan
    tasks = [one for one in plan.sets if one.kind in PATCH_TASKS]
    if len(tasks) == 1:
        return "The task works on patches of its own; the rest of the view stays as it is."
    if tasks:
        return (
            "Tasks that destroy content work on patches of their own: no patch belongs to two of them, and "
            "the rest stays as it is, so that one pass of the encoder serves all tasks."
        )
    if plan.sets:
        return "Patches are hidden from the encoder, and the task is about what it did not see."
    if plan.rectangles:
        return "Rectangles of the view are damaged, and the task is to repair them."
    if view.seen is not None:
        return "Patches are moved, or cut and coloured one by one."
    return "No task hides or damages patches here."


def _telling(image: SampleImage) -> SampleView:
    """The first view that something is done to, else the first."""
    return next((view for view in image.views if view.plan.is_changed), image.views[0])


def _hero(image: SampleImage, view: SampleView, legend: Markup | None) -> Markup:
    """One image in large: original, clean view, the view with its plan, and what the colours say."""
    named = f" ({image.label})" if image.label else ""
    size = f"{image.size[1]} \N{MULTIPLICATION SIGN} {image.size[0]} px"
    bar = share_bar(view.plan) if view.plan.sets else None
    return tag(
        "div",
        join(
            [
                panel(
                    crop_drawing(
                        image.original,
                        [view.box],
                        f"original image{named} with the box of its crop",
                        image.size,
                    ),
                    f"original{named}, {size}; the box is view {view.name}",
                ),
                panel(picture(view.clean, f"clean view {view.name}"), _clean_caption(view)),
                panel(
                    plan_drawing(_encoded(view), view.plan, _spoken(view), signs=True),
                    "what the encoder gets, with the plan drawn on it",
                ),
                tag("div", bar, legend, class_="told"),
            ]
        ),
        class_="hero",
    )


def _row(image: SampleImage) -> Markup:
    named = f" ({image.label})" if image.label else ""
    boxes = [view.box for view in image.views]
    cells = [
        panel(
            crop_drawing(
                image.original, boxes, f"original image{named} with the boxes of its crops", image.size
            ),
            f"original{named}",
        )
    ]
    for view in image.views:
        cells.append(panel(picture(view.clean, f"clean view {view.name}"), _clean_caption(view)))
        if view.seen is not None:
            cells.append(panel(plan_drawing(view.seen, view.plan, _spoken(view)), f"{view.name}, as encoded"))
    is_fine = any(view.plan.grid[1] > FINE_COLUMNS for view in image.views)
    return panels(cells, "panels row fine" if is_fine else "panels row", len(cells))


def _clean_caption(view: SampleView) -> str:
    return f"view {view.name}" + (f": {', '.join(view.words)}" if view.words else "")


def _spoken(view: SampleView) -> str:
    told = [f"{len(one.patches)} patches {one.kind.replace('_', ' ')}" for one in view.plan.sets]
    told += [f"{len(view.plan.rectangles)} damaged rectangles"] if view.plan.rectangles else []
    return f"view {view.name} as the encoder gets it" + (f": {', '.join(told)}" if told else "")


def _encoded(view: SampleView) -> Pixels:
    return view.clean if view.seen is None else view.seen


def _dash_name(place: int) -> str:
    return ("solid", "dashed", "dotted", "dash-dotted")[place % len(VIEW_DASHES)]
