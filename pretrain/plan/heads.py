"""What the head of each task costs, loss included: one function for each task, ordered as the TASKS table.

Losses are counted where they multiply matrices: similarities to a batch, a queue or prototypes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pretrain.plan import recipe
from pretrain.plan.cost import (
    Cost,
    block,
    convolution,
    linear,
    mlp,
    norm,
    product,
    projection_head,
    scaled,
    total,
)
from pretrain.plan.recipe import Settings

NUM_COLOR_BINS = 261  # of `tasks.color_bins`
NUM_DIRECTIONS = 8
NUM_RELATIONS = 9
NUM_TURNS = 4
HOG_DIM = 108


@dataclass(frozen=True)
class Level:
    """A place where features can be tapped, as `models.backbone.Level`."""

    dim: int
    stride_px: int


@dataclass(frozen=True)
class Site:
    """Where heads are built into."""

    settings: Settings
    dim: int  # of the backbone's final tokens
    levels: tuple[Level, ...]
    global_batch: int  # images of all ranks in one micro step
    local_batch: int  # of one rank
    num_samples: int

    @property
    def patch_px(self) -> int:
        return recipe.token_px(self.settings["model"])

    def num_views(self, task: str) -> int:
        return len(recipe.views_of(self.settings, task))

    def grids(self, task: str) -> list[tuple[int, int]]:
        """Of the views that a task reads."""
        views = self.settings["views"]
        model = self.settings["model"]
        return [recipe.grid(model, views[name]["size_px"]) for name in recipe.views_of(self.settings, task)]

    def num_patches(self, task: str) -> int:
        """Of all views that a task reads together."""
        return sum(rows * columns for rows, columns in self.grids(task))


def head(task: str, site: Site) -> Cost:
    """Of a task's parameters and of what it does for one image, in all views that it reads."""
    return _HEADS[task](site.settings["tasks"][task], site)


def teacher_head(task: str, site: Site, num_views: int) -> Cost:
    """Of the head that the teacher has an average of, for so many views of one image; forward only."""
    return _TEACHER_HEADS[task](site.settings["tasks"][task], site, num_views)


# --- image-level tasks


def _contrastive(task: Settings, site: Site) -> Cost:
    rows = site.num_views("contrastive")
    out = task["out_dim"]
    layers = projection_head(
        rows, site.dim, task["hidden_dim"], out, task["num_layers"], last_norm=task["last_norm"]
    )
    candidates = 2 * (site.global_batch if task["gather"] else site.local_batch)
    return layers + product(rows, out, candidates, saved=2 * rows * candidates)


def _rotation(task: Settings, site: Site) -> Cost:
    return linear(site.num_views("rotation"), site.dim, NUM_TURNS)


def _clustering(task: Settings, site: Site) -> Cost:
    rows, out, count = site.num_views("clustering"), task["out_dim"], task["num_prototypes"]
    prototypes = Cost(parameters=count * out)
    layers = projection_head(rows, site.dim, task["hidden_dim"], out, num_layers=2)
    return layers + prototypes + product(rows, out, count, saved=2 * rows * count)


def _classification(task: Settings, site: Site) -> Cost:
    return linear(site.num_views("classification"), site.dim, task["num_classes"])


def _exemplar(task: Settings, site: Site) -> Cost:
    return linear(site.num_views("exemplar"), site.dim, site.num_samples)


def _cluster_labels(task: Settings, site: Site) -> Cost:
    return linear(site.num_views("cluster_labels"), site.dim, task["num_clusters"])


def _two_layers(wide_in: int, task: Settings, rows: float, bias: bool) -> Cost:
    return projection_head(rows, wide_in, task["hidden_dim"], task["out_dim"], num_layers=2, bias=bias)


def _byol(task: Settings, site: Site) -> Cost:
    rows = site.num_views("byol")
    return _two_layers(site.dim, task, rows, bias=False) + _two_layers(
        task["out_dim"], task, rows, bias=False
    )


def _simsiam(task: Settings, site: Site) -> Cost:
    rows, out = site.num_views("simsiam"), task["out_dim"]
    hidden = task["projector_dim"] or site.dim
    projector = projection_head(rows, site.dim, hidden, out, num_layers=3, last_norm=True)
    return projector + projection_head(rows, out, task["predictor_dim"], out, num_layers=2)


def _moco_v2_projector(task: Settings, site: Site, rows: float) -> Cost:
    return mlp(rows, [site.dim, site.dim, task["out_dim"]])


def _moco_v2(task: Settings, site: Site) -> Cost:
    rows, length = (2 if task["symmetric"] else 1), task["queue_length"]
    found = product(rows, task["out_dim"], length, num_gradients=1, saved=rows * length)
    return _moco_v2_projector(task, site, rows) + found


def _moco_v3_projector(task: Settings, site: Site, rows: float) -> Cost:
    hidden, out, depth = task["hidden_dim"], task["out_dim"], task["num_layers"]
    return projection_head(rows, site.dim, hidden, out, depth, bias=False, last_norm=True)


def _moco_v3(task: Settings, site: Site) -> Cost:
    rows, hidden, out = site.num_views("moco_v3"), task["hidden_dim"], task["out_dim"]
    cost = _moco_v3_projector(task, site, rows)
    if task["predictor"]:
        cost += projection_head(rows, out, hidden, out, num_layers=2, bias=False, last_norm=True)
    return cost + product(rows, out, site.global_batch, num_gradients=1, saved=rows * site.global_batch)


def _moby(task: Settings, site: Site) -> Cost:
    rows, length, out = site.num_views("moby"), task["queue_length"], task["out_dim"]
    layers = _two_layers(site.dim, task, rows, bias=True) + _two_layers(out, task, rows, bias=True)
    return layers + product(rows, out, length, num_gradients=1, saved=rows * length)


def _dino_head(task: Settings, site: Site, rows: float) -> Cost:
    bottleneck, out = task["bottleneck_dim"], task["out_dim"]
    layers = mlp(rows, [site.dim, task["hidden_dim"], task["hidden_dim"], bottleneck], keeps_input=True)
    gains = 0 if task["norm_last_layer"] else out
    return layers + product(rows, bottleneck, out) + Cost(parameters=bottleneck * out + gains)


def _dino(task: Settings, site: Site) -> Cost:
    rows = site.num_views("dino")
    # of each view its softmax and what it is to predict
    return _dino_head(task, site, rows) + Cost(saved_fp32=2.0 * rows * task["out_dim"])


# --- tasks about single patches


def _colorization(task: Settings, site: Site) -> Cost:
    rows = site.num_views("colorization") * recipe.patch_counts(site.settings)["colorization"]
    side = site.patch_px
    out = {"pixel": 3 * side**2, "mean": 3, "ab": 2 * side**2}.get(task["target"], 0)
    told = Cost()
    if task["target"] == "ab_cls":
        cells = (side // task["cell_px"]) ** 2
        out = cells * NUM_COLOR_BINS
        told = product(rows * cells, NUM_COLOR_BINS, 2, num_gradients=0)  # the colour, for the metric
    return mlp(rows, [site.dim, site.dim, out], keeps_input=True) + told


def _inpainting(task: Settings, site: Site) -> Cost:
    rows = site.num_views("inpainting") * recipe.patch_counts(site.settings)["inpainting"]
    return mlp(rows, [site.dim, site.dim, 3 * site.patch_px**2], keeps_input=True)


def _relative_position(task: Settings, site: Site) -> Cost:
    pairs = recipe.patch_counts(site.settings)["relative_position"]
    rows = site.num_views("relative_position") * 2 * pairs  # in both orders
    return mlp(rows, [2 * site.dim, task["hidden_dim"], NUM_DIRECTIONS], keeps_input=True)


def _jigsaw(task: Settings, site: Site) -> Cost:
    views = site.num_views("jigsaw")
    if task["mode"] == "permset":
        dims = [recipe.NUM_CELLS * site.dim, task["hidden_dim"], task["num_permutations"]]
        return mlp(views, dims, keeps_input=True)
    rows, columns = recipe.grid(site.settings["model"])
    return linear(views * recipe.patch_counts(site.settings)["jigsaw"], site.dim, rows * columns)


def _reconstruction(task: Settings, site: Site) -> Cost:
    dims = [*[site.dim] * (1 + task["hidden_layers"]), 3 * site.patch_px**2]
    return mlp(site.num_patches("reconstruction"), dims, keeps_input=True)


def _maskfeat(task: Settings, site: Site) -> Cost:
    rows = site.num_patches("maskfeat")
    return norm(rows, site.dim) + linear(rows, site.dim, HOG_DIM)


# --- decoders


def _repre(task: Settings, site: Site) -> Cost:
    step = len(site.levels) // task["num_levels"]
    levels = [site.levels[step * k - 1] for k in range(1, task["num_levels"] + 1)]
    side_px = site.settings["views"][recipe.views_of(site.settings, "repre")[0]]["size_px"]
    places = [(side_px // level.stride_px) ** 2 for level in levels]
    dec_dim = task["dec_dim"]
    widths = [dec_dim or level.dim for level in levels]
    parts = []
    for level, count in zip(levels, places, strict=True):
        if task["tap_norm"] == "own":
            parts.append(norm(count, level.dim))
        if dec_dim:
            parts.append(convolution(count, level.dim, dec_dim, kernel=1))
    for (shallow, deep), count in zip(itertools.pairwise(widths), places[:-1], strict=True):
        if task["decoder"] == "conv":
            for wide_in in [deep + shallow, *[shallow] * (task["num_layers"] - 1)]:
                parts.append(convolution(count, wide_in, shallow, kernel=3))
                parts.append(Cost(saved=count * shallow))  # ReLU
        else:
            parts.append(convolution(count, deep + shallow, shallow, kernel=1))
            one = block(count, count**2, shallow, max(1, shallow // 64), 4 * shallow)
            parts += [one] * task["num_layers"]
    parts.append(convolution(places[0], widths[0], 3 * levels[0].stride_px ** 2, kernel=1))
    return total(parts)


def _mae(task: Settings, site: Site) -> Cost:
    dim, out, prefix = (
        task["decoder_dim"],
        3 * site.patch_px**2,
        int(recipe.has_class_token(site.settings["model"])),
    )
    parts = [Cost(parameters=dim)]  # the mask token
    for number, name in enumerate(recipe.views_of(site.settings, "mae")):
        seen = recipe.seen_of(site.settings, name)
        tokens = prefix + seen.num_patches
        of_view = [
            linear(prefix + seen.num_kept, site.dim, dim),
            *[block(tokens, tokens**2, dim, task["decoder_heads"], 4 * dim)] * task["decoder_depth"],
            norm(seen.num_patches, dim),
            linear(seen.num_patches, dim, out),
            Cost(saved_fp32=4.0 * seen.num_patches * out),  # prediction, target, their difference, its square
        ]
        parts += of_view if number == 0 else [scaled(part) for part in of_view]
    return total(parts)


def _ijepa(task: Settings, site: Site) -> Cost:
    dim, depth, num_heads = task["predictor_dim"], task["predictor_depth"], task["num_heads"]
    parts = [Cost(parameters=dim)]
    is_first = True
    for name in recipe.views_of(site.settings, "ijepa"):
        view = site.settings["views"][name]
        count = view["mask"]["num_targets"]
        for size in recipe.block_sizes(view["mask"], recipe.grid(site.settings["model"], view["size_px"])):
            tokens = size.context + size.target
            of_size = total(
                [
                    linear(size.context, site.dim, dim),
                    *[block(count * tokens, count * tokens**2, dim, num_heads, 4 * dim)] * depth,
                    norm(count * size.target, dim),
                    linear(count * size.target, dim, site.dim),
                ]
            )
            weighted = scaled(of_size, size.share)
            parts.append(
                Cost(**{**vars(weighted), "parameters": of_size.parameters, "matrices": of_size.matrices})
                if is_first
                else weighted
            )
            is_first = False
    return total(parts)


# --- tasks about pairs of patches


def _pooled(task: Settings, grid: tuple[int, int]) -> int:
    """Patches of a grid that are left after pooling, if there is any."""
    return math.prod((side + 1) // 2 if task["pool"] else side for side in grid)


def _pairs(name: str, num_outputs: int) -> Callable[[Settings, Site], Cost]:
    def cost(task: Settings, site: Site) -> Cost:
        counts = [_pooled(task, grid) for grid in site.grids(name)]
        is_full = task["bilinear_full"]
        width = site.dim if is_full else site.dim // num_outputs
        queries = linear(sum(counts), site.dim, num_outputs * width, bias=False)
        keys = Cost() if is_full else queries
        rows = num_outputs * float(sum(counts))
        kept = Cost(saved=(1 if is_full else 2) * rows * width)
        scores = total(product(num_outputs * n, width, n, saved=num_outputs * n**2) for n in counts)
        return queries + keys + kept + scores

    return cost


def _absolute_position(task: Settings, site: Site) -> Cost:
    rows = sum(_pooled(task, grid) for grid in site.grids("absolute_position"))
    return linear(rows, site.dim, _pooled(task, recipe.grid(site.settings["model"])))


def _drloc(task: Settings, site: Site) -> Cost:
    dims = [2 * site.dim, task["hidden_dim"], task["hidden_dim"], 2]
    return mlp(site.num_views("drloc") * task["num_pairs"], dims)


_HEADS: dict[str, Callable[[Any, Site], Cost]] = {
    "contrastive": _contrastive,
    "rotation": _rotation,
    "clustering": _clustering,
    "colorization": _colorization,
    "inpainting": _inpainting,
    "relative_position": _relative_position,
    "jigsaw": _jigsaw,
    "reconstruction": _reconstruction,
    "repre": _repre,
    "mae": _mae,
    "ijepa": _ijepa,
    "maskfeat": _maskfeat,
    "spatial_relation": _pairs("spatial_relation", NUM_RELATIONS),
    "distance": _pairs("distance", 1),
    "angle": _pairs("angle", 1),
    "absolute_position": _absolute_position,
    "drloc": _drloc,
    "classification": _classification,
    "exemplar": _exemplar,
    "cluster_labels": _cluster_labels,
    "byol": _byol,
    "simsiam": _simsiam,
    "moco_v2": _moco_v2,
    "moco_v3": _moco_v3,
    "moby": _moby,
    "dino": _dino,
}
_TEACHER_HEADS: dict[str, Callable[[Any, Site, int], Cost]] = {
    "byol": lambda task, site, rows: _two_layers(site.dim, task, rows, bias=False),
    "moco_v2": _moco_v2_projector,
    "moco_v3": _moco_v3_projector,
    "moby": lambda task, site, rows: _two_layers(site.dim, task, rows, bias=True),
    "dino": _dino_head,
}
