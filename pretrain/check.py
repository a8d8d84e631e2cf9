"""Whether the settings of a run fit together: everything that spans several sections, told in one line."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial

import timm
import torch
from timm.models.swin_transformer import SwinTransformer

from pretrain import build
from pretrain.config import RunConfig
from pretrain.engine.deepspeed_engine import check_deepspeed_config, zero_stage
from pretrain.engine.monitors import check_monitors
from pretrain.errors import ConfigError, UserError, nearest
from pretrain.models.backbone import Backbone, BackboneConfig, create_backbone, levels_of
from pretrain.optim import check_optimizer_stage
from pretrain.tasks import TASKS
from pretrain.tasks.contract import Surroundings
from pretrain.views.masks import num_kept
from pretrain.views.plan import PATCH_TASKS, encoder_calls, stream_indices


def check(config: RunConfig, world_size: int) -> None:
    """Everything that can be known to be wrong from the settings alone: ConfigError, with a line for each."""
    problems = [problem for part in find_problems(config, world_size).values() for problem in part]
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise ConfigError(told(problems))


def told(problems: Sequence[UserError]) -> str:
    """Several problems as one message, each on a line of its own that says whose it is, as the first does."""
    return "\npretrain: ".join(str(problem) for problem in problems)


def find_problems(config: RunConfig, world_size: int) -> dict[str, list[ConfigError]]:
    """What is wrong, by the part of the settings; parts without problems are absent.

    What could only repeat the problem of another part is not looked at.
    """
    found: dict[str, list[ConfigError]] = {}

    def look(part: str, checks: Iterable[Callable[[], None]], needs: Collection[str] = ()) -> None:
        if found.keys().isdisjoint(needs):
            problems = _failing(checks)
            if problems:
                found[part] = [*found.get(part, []), *problems]

    named = list(config.tasks.enabled())
    look("tasks", [partial(_check_any_task, config)])
    look("model", [partial(_check_model, config)])
    if config.views:
        of_views = [partial(_check_view, config, name) for name in config.views]
        look("views", [partial(_check_first_size, config)], needs=["model"])
        look("views", [*of_views, partial(_check_turns, config), partial(_check_fill, config)])
        views_fit = "views" not in found
        look("names", [partial(_check_likes, config)])
        look("names", [partial(_check_names, config, task, views_fit) for task in named], needs=["names"])
        alone = [partial(_check_task, config, task, None) for task in named]
        look("tasks", alone, needs=["tasks", "model", "views", "names"])
        look("teacher", [partial(_check_teacher, config)], needs=["names", "views"])
        look("patches", [partial(_check_patches, config)], needs=["tasks", "model", "views", "names"])
    else:
        found["views"] = [ConfigError("views: none is named; a view needs a name, such as `one: {}`")]
    look("batch", [partial(_check_lanes, config, world_size), partial(_check_batch, config)])
    look("schedule", [partial(_check_schedule, config)])
    look("engine", [partial(_check_engine, config, world_size)])
    look("log", [partial(check_monitors, config.log.tensorboard, config.log.wandb, config.engine.kind)])
    return found


def _failing(checks: Iterable[Callable[[], None]]) -> list[ConfigError]:
    problems = []
    for run in checks:
        try:
            run()
        except ConfigError as error:
            problems.append(error)
    return problems


def _check_any_task(config: RunConfig) -> None:
    if not config.tasks.enabled():
        raise ConfigError(f"tasks: none is named; name one or more of {', '.join(TASKS)}")


def _check_engine(config: RunConfig, world_size: int) -> None:
    if config.engine.kind == "deepspeed":
        check_deepspeed_config(config.engine)
        stage = zero_stage(config.engine)
        check_optimizer_stage(config.optim, stage)
        if stage == 3 and config.engine.compile == "on":
            raise ConfigError(
                "engine.compile: 'on' does not go with ZeRO-3, which gathers parameters within blocks; use "
                "'auto' or 'off', or engine.deepspeed.zero_optimization.stage 0 to 2"
            )
    elif world_size > 1:
        raise ConfigError(
            f"engine.kind: 'local' trains on one process, not on {world_size}; use 'deepspeed' or --nproc 1"
        )


RELATIONS = ("spatial_relation", "distance", "angle", "absolute_position", "drloc")

# arguments of timm that follow from ours, and where to set them instead
_OWNED_MODEL_ARGS = {
    "img_size": "model.img_px",
    "patch_size": "model.patch_px",
    "class_token": "model.class_token",
    "pos_embed": "model.pos_embed",
    "drop_path_rate": "model.drop_path_ratio",
    "reg_tokens": "tasks",
    "num_classes": "tasks",
    "dynamic_img_size": "model.img_px",
}
_ENCODED_PARTS = {"patch_embed", "cls_token", "reg_token", "pos_embed", "norm_pre", "blocks", "norm"}


def _check_model(config: RunConfig) -> None:
    """Build the backbone without memory for its weights, and compare its tokens with the layout."""
    for key, owner in _OWNED_MODEL_ARGS.items():
        if key in config.model.args:
            raise ConfigError(f"model.args.{key}: follows from '{owner}'; remove it here and set that")
    layout = build.token_layout(config)
    try:
        vit = _outline(config.model, len(layout.registers))
    except (AssertionError, ValueError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"model.args: timm refuses them for '{config.model.name}': {reason}") from None
    if next(vit.parameters()).is_meta:  # else it is cut down to one block
        _check_levels(config, len(levels_of(vit)))
    if isinstance(vit, SwinTransformer):
        return
    left_out = {name.partition(".")[0] for name, _ in vit.named_parameters()} - _ENCODED_PARTS
    if left_out:
        raise ConfigError(
            f"model: '{config.model.name}' has parts that pretraining would never train: "
            f"{', '.join(sorted(left_out))}; choose a plain ViT and leave pooling to the class token"
        )
    found = (int(vit.num_prefix_tokens), int(vit.patch_embed.num_patches))
    if found != (layout.num_prefix, layout.num_patches):
        raise ConfigError(
            f"model.name: '{config.model.name}' has {found[0]} prefix and {found[1]} patch tokens, the "
            f"settings ask for {layout.num_prefix} and {layout.num_patches}; choose a plain ViT, or set "
            "model.class_token"
        )
    _check_prefix_without_positions(config.model, len(layout.registers))


def _check_levels(config: RunConfig, num_levels: int) -> None:
    """Tasks that read features between blocks raise ConfigError where there are too few."""
    for name, settings in config.tasks.enabled().items():
        taps = TASKS[name].taps
        if taps is not None:
            taps(settings, num_levels)


def _check_prefix_without_positions(model: BackboneConfig, num_registers: int) -> None:
    """Older timm forgets class token and registers where there are no positions (seen: 1.0.16 to 1.0.24)."""
    if model.pos_embed != "none":
        return
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        vit = create_backbone(_one_block(model), num_registers).eval()
        num_tokens = vit.forward_features(torch.zeros(1, 3, model.img_px, model.img_px)).shape[1]
    if num_tokens != vit.num_prefix_tokens + vit.patch_embed.num_patches:
        raise ConfigError(
            f"model.pos_embed: timm {timm.__version__} drops class token and registers when it is 'none', so "
            "an export would give other features; install a newer timm, or set it to 'learn'"
        )


def _one_block(model: BackboneConfig) -> BackboneConfig:
    return model.model_copy(update={"args": {**model.args, "depth": 1}})


def _outline(model: BackboneConfig, num_registers: int) -> Backbone:
    """The backbone without memory for its weights; of one block where an older timm cannot do that."""
    try:
        with torch.device("meta"):
            return create_backbone(model, num_registers)
    except RuntimeError:
        with torch.random.fork_rng(devices=[]):
            return create_backbone(_one_block(model), num_registers)


def _check_likes(config: RunConfig) -> None:
    """Views that copy another's place in the image name one that there is."""
    for name, view in config.views.items():
        if isinstance(view.like, str) and view.like not in config.views:
            raise ConfigError(
                f"views.{name}.like: no view is named '{view.like}'; {nearest(view.like, list(config.views))}"
            )
        if isinstance(view.like, int) and view.like >= len(config.views):
            raise ConfigError(f"views.{name}.like: there are {len(config.views)} views; name one of them")
    try:
        stream_indices(config.views)
    except ValueError as error:
        raise ConfigError(f"views: {error}; one of them must stand for itself") from None


def _check_names(config: RunConfig, task: str, views_fit: bool) -> None:
    """A task names views that there are; if all views are sound, also enough of them that go together."""
    settings = config.tasks.enabled()[task]
    if settings.weight < 0:
        raise ConfigError(f"tasks.{task}.weight: {settings.weight} is below 0; use 0 or more")
    for name in settings.views or ():
        if name not in config.views:
            raise ConfigError(
                f"tasks.{task}.views: no view is named '{name}'; known: {', '.join(config.views)}"
            )
    if not views_fit:
        return
    names = build.views_of(config, task)
    if len(set(names)) < len(names) or not names:
        raise ConfigError(f"tasks.{task}.views: {list(names)} must name one or more different views")
    if TASKS[task].reads == "pair" and len(names) != 2:
        raise ConfigError(
            f"tasks.{task}: compares two views, but has {len(names)}; "
            + ("add a view" if len(names) < 2 else "name two")
        )
    if TASKS[task].reads == "all":
        return
    known = {view: place for place, call in enumerate(encoder_calls(build.views(config))) for view in call}
    if len({known[name] for name in names}) > 1:
        raise ConfigError(
            f"tasks.{task}.views: {list(names)} differ in size, or in what is hidden or worked on; "
            "give views that are encoded together"
        )


def check_tasks(config: RunConfig, num_samples: int | None = None) -> None:
    """Does every task fit the views and the model? num_samples: of the data, where it is known."""
    problems = _failing([partial(_check_task, config, task, num_samples) for task in config.tasks.enabled()])
    if problems:
        raise problems[0] if len(problems) == 1 else ConfigError(told(problems))


def _check_task(config: RunConfig, task: str, num_samples: int | None) -> None:
    spec, around = TASKS[task], build.surroundings(config, task, num_samples)
    if spec.reads in ("pair", "all") and build.micro_step_batch(config) < 2:
        raise ConfigError(f"batch: tasks.{task} compares images, and a micro step has one; raise it")
    reason = _general_reason(task, config, around)
    if reason is None and spec.unsuited is not None:
        reason = spec.unsuited(config.tasks.enabled()[task], around)
    if reason is not None:
        raise ConfigError(f"tasks.{task}: {reason}")


def _general_reason(task: str, config: RunConfig, around: Surroundings) -> str | None:
    spec = TASKS[task]
    dropping = [n for n, view in around.views.items() if view.mask is not None and view.mask.how == "drop"]
    if dropping and (spec.patch_request or spec.taps):
        return (
            f"reads all patches, but view '{dropping[0]}' drops some (mask.how: drop); "
            "let it read another view, by `views`"
        )
    resized = [n for n, view in around.views.items() if view.size_px != config.model.img_px]
    if resized and spec.patch_request:
        return f"works on views of model.img_px, {config.model.img_px}; '{resized[0]}' has another size"
    is_moved = config.tasks.jigsaw and set(build.views_of(config, "jigsaw")) & set(around.views)
    if is_moved and task in RELATIONS:
        return (
            "relates the patches at their places, but 'jigsaw' moves some of them in the same view; "
            "let one of the two read another view, by `views`"
        )
    shuffled = [n for n, view in around.views.items() if view.shuffle]
    if shuffled and spec.own_places:
        return (
            f"its answers stand at the places of what they are about, but view '{shuffled[0]}' shuffles its "
            "patches; set `shuffle: false`, or let it read another view"
        )
    hidden = [n for n, view in around.views.items() if view.mask is not None or view.local is not None]
    if hidden and spec.patch_request:
        return (
            f"works on patches of its own, but view '{hidden[0]}' hides or damages any of them (mask, "
            "local); let it read another view, by `views`"
        )
    if task == "inpainting" and config.tasks.inpainting.fill == "token" and config.model.pos_embed == "none":
        return "without positions all hidden patches look alike; set fill: zero, or model.pos_embed"
    masked = [n for n, view in around.views.items() if view.mask is not None and view.mask.how == "token"]
    if masked and config.model.pos_embed == "none":
        return (
            f"without positions all hidden patches of view '{masked[0]}' look alike; set model.pos_embed, or "
            "drop patches (mask.how: drop)"
        )
    for name, view in around.views.items():
        if spec.patch_request and not view.corrupt:
            return f"works on patches of view '{name}', whose `corrupt` is false; set it to true"
        if spec.patch_request and isinstance(view.corrupt, tuple) and task not in view.corrupt:
            return f"works on patches of view '{name}', whose `corrupt` does not name it; add it there"
    return None


def _check_teacher(config: RunConfig) -> None:
    wanted = build.teacher_views(config)
    if wanted and config.teacher is None:
        raise ConfigError(
            f"tasks.{next(iter(wanted))}: needs an averaged teacher; add `teacher: {{momentum: 0.996}}`"
        )
    names = [name for views in wanted.values() for name in views]
    sizes = {config.views[name].size_px for name in names}
    if len(sizes) > 1:
        raise ConfigError(
            f"tasks: the teacher would have to encode views of {sorted(sizes)} px; name views of one size"
        )


def _check_first_size(config: RunConfig) -> None:
    name, view = next(iter(config.views.items()))
    if view.size_px != config.model.img_px:
        raise ConfigError(
            f"views.{name}.size_px: {view.size_px} differs from model.img_px, {config.model.img_px}; "
            "the first view is of the model's own size"
        )


def _check_view(config: RunConfig, name: str) -> None:
    view = config.views[name]
    _check_size(config, name, view.size_px)
    ranges = {"scale": view.scale, "aspect": view.aspect, "blur.sigma_px": view.blur.sigma_px}
    for setting, (low, high) in ranges.items():
        if not 0 < low <= high:
            raise ConfigError(f"views.{name}.{setting}: [{low}, {high}] is not a range above 0, low to high")
    for task in view.corrupt if isinstance(view.corrupt, tuple) else ():
        if task not in PATCH_TASKS:
            raise ConfigError(
                f"views.{name}.corrupt: '{task}' is no patch-level task; {nearest(task, tuple(PATCH_TASKS))}"
            )
    if view.scale[1] > 1:
        raise ConfigError(f"views.{name}.scale: a crop covers at most 1.0 of the image, not {view.scale[1]}")
    if view.shift_px >= view.size_px:
        raise ConfigError(f"views.{name}.shift_px: {view.shift_px} is not below size_px, {view.size_px}")
    if view.shuffle and view.corrupt and build.patch_config(config).total:
        raise ConfigError(
            f"views.{name}.shuffle: moves the patches that patch-level tasks work on; set `corrupt: false`"
        )
    if view.mask is not None and not config.model.is_swin:
        side = view.size_px // config.model.token_px
        num_kept(view.mask, (side, side))  # raises where the grid is too small
    if view.mask is not None and config.model.is_swin:
        raise ConfigError(
            f"views.{name}.mask: a Swin works on windows of whole images and can neither drop patches "
            "nor stand a token in for them; choose a ViT"
        )


def _check_turns(config: RunConfig) -> None:
    if config.tasks.rotation is None or _has_all_turns(config):
        return
    for name in build.views_of(config, "rotation"):
        if name in config.views and not config.views[name].turn:
            raise ConfigError(
                "tasks.rotation: needs `turn: true` in every view it reads, or a view for each "
                "fixed_turn; else every label is 'not turned'"
            )


def _check_fill(config: RunConfig) -> None:
    inpainting = config.tasks.inpainting
    if config.model.is_swin and inpainting is not None and inpainting.fill == "token":
        raise ConfigError("tasks.inpainting.fill: a Swin has no mask token; set it to 'zero'")


def _has_all_turns(config: RunConfig) -> bool:
    names = [name for name in build.views_of(config, "rotation") if name in config.views]
    return {config.views[name].fixed_turn for name in names} == {0, 1, 2, 3}


def _check_size(config: RunConfig, name: str, size_px: int) -> None:
    unit = config.model.token_px
    if size_px == config.model.img_px:
        return
    if config.model.is_swin or config.model.name == "t2t_vit_14":
        raise ConfigError(
            f"views.{name}.size_px: {size_px}, but {config.model.name} takes model.img_px, "
            f"{config.model.img_px}, only"
        )
    if size_px % unit:
        raise ConfigError(
            f"views.{name}.size_px: {size_px} px are not whole {unit} px patches; {_nearest(size_px, unit)}"
        )


def _check_patches(config: RunConfig) -> None:
    patches = build.patch_config(config)
    num_patches = patches.num_patches
    if patches.total > num_patches // 2:
        parts = {
            "colorization": patches.colorization,
            "inpainting": patches.inpainting,
            "relative_position": 2 * patches.pairs,
            "jigsaw": patches.jigsaw,
        }
        shares = ", ".join(f"{name} {count}" for name, count in parts.items() if count)
        raise ConfigError(
            f"tasks: patch-level tasks work on {patches.total} of {num_patches} patches ({shares}), "
            "more than half of the image; lower their ratios"
        )
    if patches.jigsaw_mode == "permset" and patches.jigsaw and min(patches.grid) < 3:
        raise ConfigError(
            f"tasks.jigsaw.mode: 'permset' needs a grid of 3x3 patches, this one is {patches.grid}"
        )


def check_lengths(config: RunConfig, num_samples: int) -> None:
    """What can be known of the schedule once the size of the data is."""
    length = build.num_steps(config, num_samples)
    warmup = build.warmup_steps(config, num_samples, length)
    if warmup >= length:
        raise ConfigError(f"schedule: a warm-up of {warmup} steps leaves nothing of a run of {length}")
    if config.tasks.cluster_labels is not None and len(config.data.all_sources) > 1:
        raise ConfigError(
            "tasks.cluster_labels: clusters one set of images, and the data are mixed from several; use one"
        )


def _check_lanes(config: RunConfig, world_size: int) -> None:
    if config.data.lanes % world_size:
        raise ConfigError(
            f"data.lanes: {config.data.lanes} lanes cannot be shared equally by {world_size} ranks; "
            f"{_nearest(config.data.lanes, world_size)}"
        )


def _check_batch(config: RunConfig) -> None:
    size, accumulation, lanes = config.batch.global_size, config.batch.accumulation_steps, config.data.lanes
    unit = lanes * accumulation
    if size % unit:
        raise ConfigError(
            f"batch.global_size: {size} is not divisible by data.lanes * batch.accumulation_steps = "
            f"{lanes} * {accumulation}; {_nearest(size, unit)}, or fewer lanes"
        )


def _nearest(value: int, unit: int) -> str:
    below = value // unit * unit
    return f"nearest legal values: {below} and {below + unit}" if below else f"nearest legal value: {unit}"


def _check_schedule(config: RunConfig) -> None:
    schedule = config.schedule
    if (schedule.steps is None) == (schedule.epochs is None):
        raise ConfigError("schedule: give either `steps` or `epochs`")
    warmups = (schedule.warmup_steps, schedule.warmup_epochs, schedule.warmup_ratio)
    if sum(warmup is not None for warmup in warmups) > 1:
        raise ConfigError("schedule: give one of `warmup_steps`, `warmup_epochs` and `warmup_ratio`")
    for unit in ("steps", "epochs"):
        length, warmup = getattr(schedule, unit), getattr(schedule, f"warmup_{unit}")
        if length is not None and warmup is not None and warmup >= length:
            raise ConfigError(f"schedule.warmup_{unit}: {warmup} is not below schedule.{unit}, {length}")
    if schedule.kind == "quarter_cosine" and schedule.start_lr:
        raise ConfigError("schedule.start_lr: a quarter_cosine warms up from 0; remove it")
    base = config.optim.scaled_lr(config.batch.global_size)
    if schedule.final_lr > base and schedule.kind != "constant" and not schedule.scale_ends:
        raise ConfigError(
            f"schedule.final_lr: {schedule.final_lr:g} is above the learning rate it ends, {base:g} "
            "(optim.base_lr scaled to the batch); lower it"
        )
