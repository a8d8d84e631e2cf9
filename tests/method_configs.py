"""The configs of all methods, and overrides that make each small enough for a processor."""

from __future__ import annotations

from pathlib import Path

from pretrain.config import RunConfig, load_config

METHODS = Path(__file__).parents[1] / "configs" / "methods"
PATHS = sorted(METHODS.glob("*.yaml"))
NAMES = [path.stem for path in PATHS]
BATCH = 8

# widths and lengths of the heads; what a task does not have is left out
_SMALL = {
    "hidden_dim": 32,
    "out_dim": 16,
    "bottleneck_dim": 16,
    "projector_dim": 32,
    "predictor_dim": 24,
    "predictor_depth": 1,
    "num_heads": 2,
    "queue_length": 64,
    "decoder_dim": 24,
    "decoder_depth": 1,
    "decoder_heads": 2,
    "num_clusters": 4,
    "pca_dim": 8,
    "num_prototypes": 8,
    "num_permutations": 10,
}


# A queue that begins with random directions is easier than one of real keys, so a longer one would let the
# loss rise over so few steps.
_SMALL_OF = {"dino": {"out_dim": 64}, "moco_v2": {"queue_length": BATCH}}


def reduced(path: Path, shards: Path, num_steps: int) -> list[str]:
    """Overrides: a small backbone and heads, small views and batches, few steps at one learning rate."""
    config = load_config(path)
    own_px, small_px = config.model.img_px, 32
    overrides = [
        f"data.shards={shards}",
        "data.lanes=4",
        "data.resident=false",
        "data.decode_threads=1",
        f"batch.global_size={BATCH}",
        "engine.precision=fp32",
        f"schedule={{kind: constant, steps: {num_steps}}}",
        f"checkpoint.every_steps={num_steps // 2}",
        "log.every_steps=1",
        "log.prometheus.port=0",
        "optim.lr_batch=null",
        f"optim.base_lr={0.3 if config.optim.name == 'lars' else 2e-3}",
    ]
    if config.tasks.moco_v2 is not None:
        overrides.append("teacher.momentum=0.99")
    if config.model.is_swin:
        small_px = 64
        args = "{embed_dim: 12, depths: [1, 1, 1, 1], num_heads: [1, 2, 3, 6]}"
    elif config.model.name == "t2t_vit_14":
        small_px = 64
        args = "{depth: 2, embed_dim: 24, num_heads: 2}"
    else:
        args = "{depth: 4, embed_dim: 24, num_heads: 2}"
        overrides += ["model.patch_px=4"]
    overrides += [f"model.args={args}", f"model.img_px={small_px}"]
    for name, view in config.views.items():
        overrides.append(f"views.{name}.size_px={small_px if view.size_px == own_px else 16}")
    for name, settings in config.tasks.enabled().items():
        fields = type(settings).model_fields
        small = {**_SMALL, **_SMALL_OF.get(name, {})}
        overrides += [f"tasks.{name}.{key}={value}" for key, value in small.items() if key in fields]
    return overrides


def reduced_config(path: Path, shards: Path, *more: str, num_steps: int = 4) -> RunConfig:
    return load_config(path, [*reduced(path, shards, num_steps), *more])
