"""What the backbone costs: a plain ViT from its sizes, anything else counted on the module itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pretrain.plan import recipe
from pretrain.plan.cost import Cost, block, norm, product, scaled, total, unfused_attention
from pretrain.plan.heads import Level
from pretrain.plan.recipe import Seen, Settings
from pretrain.plan.vits import VitSize, size_of

CHANNELS = 3


@dataclass(frozen=True)
class Encoder:
    """The backbone of a run."""

    name: str
    dim: int  # of its final tokens
    levels: tuple[Level, ...]
    cost: Cost  # its parameters; FLOPs and what is kept of all views that the student encodes, of one image
    blocks: Cost  # of these, what is done inside the blocks, which recomputing drops
    block_inputs: float  # elements of one image that stand between blocks, which recomputing keeps
    largest: Cost  # of one image: the block that keeps most, of the views of one call
    unfused: Cost  # what plain attention would keep more, of one image; nothing where that is not known
    # size of a view in px -> FLOPs forward of such a view with nothing hidden: what a teacher does
    whole: Mapping[int, float]
    is_counted: bool = False  # on the module itself


def encoder_of(settings: Settings) -> Encoder:
    size = size_of(settings["model"])
    if size is None:
        from pretrain.plan.counted import counted_encoder

        return counted_encoder(settings)
    return _vit(settings, size)


def _vit(settings: Settings, size: VitSize) -> Encoder:
    model, dim = settings["model"], size.dim
    seen = [recipe.seen_of(settings, name) for name in recipe.encoded_views(settings)]
    # blocks of a step may keep one number of tokens, of another step another one: means
    blocks = [_block(view, size) for view in seen]
    stems = [_stem(settings, view, dim) for view in seen]
    parameters = _parameters(settings, size)
    activity = total(
        [*(scaled(cost, size.depth) for cost in blocks), *(scaled(cost) for cost in stems)]
        + [scaled(norm(view.tokens, dim)) + Cost(saved_fp32=view.tokens * dim) for view in seen]
    )
    sizes = {view["size_px"] for view in settings["views"].values()}
    whole = {size_px: _whole(settings, size_px) for size_px in sizes}
    return Encoder(
        name=str(model["name"]),
        dim=dim,
        levels=(Level(dim, model["patch_px"]),) * size.depth,
        cost=parameters + activity,
        blocks=scaled(total(blocks), size.depth),
        block_inputs=size.depth * dim * sum(view.tokens for view in seen),
        largest=max(by_calls(settings, blocks), key=lambda cost: cost.saved, default=Cost()),
        unfused=scaled(
            total(unfused_attention(view.square_tokens, size.num_heads) for view in seen),
            size.depth,
        ),
        whole={
            size_px: _stem(settings, view, dim).forward + size.depth * _block(view, size).forward
            for size_px, view in whole.items()
        },
    )


def by_calls(settings: Settings, of_views: Sequence[Cost]) -> list[Cost]:
    """Of all views that are encoded in one call, together. of_views: those that are encoded, in order"""
    calls: dict[str, Cost] = {}
    for name, cost in zip(recipe.encoded_views(settings), of_views, strict=True):
        shape = repr(recipe.shape(settings["views"][name]))
        calls[shape] = calls.get(shape, Cost()) + scaled(cost)
    return list(calls.values())


def _whole(settings: Settings, size_px: int) -> Seen:
    rows, columns = recipe.grid(settings["model"], size_px)
    count = rows * columns
    return Seen(size_px, count, count, count**2, recipe.num_prefix(settings))


def _block(seen: Seen, size: VitSize) -> Cost:
    return block(seen.tokens, seen.square_tokens, size.dim, size.num_heads, size.hidden)


def _stem(settings: Settings, seen: Seen, dim: int) -> Cost:
    """The patch embedding of all patches, also of those then dropped; no gradient is asked of its input."""
    model = settings["model"]
    inner = CHANNELS * model["patch_px"] ** 2
    num_gradients = 0 if model["freeze_patch_embed"] else 1
    made = product(seen.num_patches, inner, dim, num_gradients=num_gradients)
    # the convolution keeps the images; in bf16 a rounded copy of them
    return made + Cost(saved=seen.num_patches * inner if num_gradients else 0.0)


def _parameters(settings: Settings, size: VitSize) -> Cost:
    model, dim = settings["model"], size.dim
    patch_embed = CHANNELS * model["patch_px"] ** 2 * dim + dim
    prefix = recipe.num_prefix(settings)
    rows, columns = recipe.grid(model)
    positions = 0 if model["pos_embed"] == "none" else (prefix + rows * columns) * dim
    one = block(1, 1, dim, size.num_heads, size.hidden)
    trained = size.depth * one.parameters + prefix * dim + 2 * dim
    is_learned, is_trained = model["pos_embed"] == "learn", not model["freeze_patch_embed"]
    return Cost(
        parameters=trained + (positions if is_learned else 0) + (patch_embed if is_trained else 0),
        frozen=(0 if is_learned else positions) + (0 if is_trained else patch_embed),
        matrices=size.depth * one.matrices + patch_embed,
    )
