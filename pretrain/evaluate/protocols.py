"""How the features of each method are read out, as its authors do it; found by the tasks of the pretraining.

Every number can be replaced on the command line; what was used is in the result.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from pretrain.errors import UserError, nearest
from pretrain.evaluate.encoder import Encoder
from pretrain.evaluate.feature import FeatureName, problem_of, usual
from pretrain.evaluate.probe import LinearConfig
from pretrain.evaluate.recipes import RecipeName

WIDE = 768  # of a token: from ViT-B on


@dataclass(frozen=True)
class Protocol:
    """Of one method."""

    name: str
    knn: FeatureName
    linear: FeatureName  # what is stored of an image for the linear probe
    probe: LinearConfig
    recipe: RecipeName  # of fine-tuning
    also: tuple[FeatureName, ...] = ()  # parts of it that are tried on their own as well; the best is taken


DINO = LinearConfig(base_lr=0.001, inputs=("raw",))
MOCO_V3 = LinearConfig(base_lr=3.0, inputs=("raw",), num_epochs=90)
MOBY = LinearConfig(base_lr=0.5, inputs=("raw",), warmup_epochs=5)  # 1.0 for a batch of 512
MAE = LinearConfig("lars", 0.1, inputs=("standardised",), num_epochs=90, batch_size=16384, warmup_epochs=10)
SIT = LinearConfig(  # 1e-3 for a batch of 512
    "adamw", 5e-4, inputs=("raw",), num_epochs=501, batch_size=480, final_lr=5e-6, weight_decay=5e-4
)

PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        # nothing is known, or several methods were mixed: wide rates, with and without normalisation
        Protocol("generic", "class", "class", LinearConfig(), "deit"),
        # Caron et al., 2021, arXiv:2104.14294, and its release: four layers of a ViT-S, else class and mean
        Protocol("dino_small", "class", "class_last4", DINO, "deit"),
        Protocol("dino", "class", "class_mean_patch", DINO, "deit"),
        # Chen, Xie and He, 2021, arXiv:2104.02057; of SimCLR, BYOL, SimSiam and MoCo v2 on a ViT as well
        Protocol("moco_v3", "class", "class", MOCO_V3, "deit"),
        # Xie et al., 2021, arXiv:2105.04553
        Protocol("moby", "class", "class", MOBY, "deit"),
        # He et al., 2021, arXiv:2111.06377, A.1
        Protocol("mae", "class", "class", MAE, "mae"),
        # Assran et al., 2023, arXiv:2301.08243, A: the last layer or the last four, whichever is better
        Protocol("ijepa", "mean_patch", "mean_patch_last4", DINO, "mae", also=("mean_patch",)),
        # Atito et al., 2021, arXiv:2104.03602: a head for each token
        Protocol("sit", "class", "class_rotation", SIT, "sit"),
        # Camporese et al., 2022, arXiv:2206.00481: no task trains the class token
        Protocol("relvit", "mean_patch", "mean_patch", DINO, "relvit"),
    )
}

JOINT_EMBEDDING = {"moco_v3", "moco_v2", "byol", "simsiam", "contrastive"}
RELATIONS = {"spatial_relation", "distance", "angle", "absolute_position", "drloc"}
TASKS_OF_SIT = {"reconstruction", "rotation", "contrastive"}
BESIDES = {"repre", "classification"}  # tasks that come on top of a method and do not change its read-out


def method_of(tasks: Collection[str], token_width: int = 0) -> str:
    """The key of PROTOCOLS for the tasks of a pretraining; `generic` where no method has exactly these."""
    of_method = set(tasks) - BESIDES
    if {"rotation", "contrastive"} <= of_method <= TASKS_OF_SIT:
        return "sit"
    if of_method and of_method <= RELATIONS:
        return "relvit"
    of_method -= {"reconstruction"} if len(of_method) > 1 else set()  # of the last version of SiT
    if len(of_method) != 1:
        return "generic"
    (task,) = of_method
    if task in JOINT_EMBEDDING:
        return "moco_v3"
    if task == "dino":
        return "dino" if token_width >= WIDE else "dino_small"
    if task == "maskfeat":
        return "mae"  # the protocol of the method next to it: its paper fine-tunes only
    return task if task in PROTOCOLS else "generic"


def protocol_for(encoder: Encoder, asked: str | None = None) -> Protocol:
    """What was asked for, or the method's that made the weights, with features that the network has."""
    if asked is not None and asked not in PROTOCOLS:
        raise UserError(f"--protocol {asked}: {nearest(asked, PROTOCOLS)}")
    protocol = PROTOCOLS[asked or method_of(encoder.tasks, encoder.token_width)]
    knn, linear = (_available(encoder, feature) for feature in (protocol.knn, protocol.linear))
    also = tuple(feature for feature in protocol.also if _available(encoder, feature) == feature)
    return replace(protocol, knn=knn, linear=linear, also=also if linear == protocol.linear else ())


def _available(encoder: Encoder, feature: FeatureName) -> FeatureName:
    """A network without the tokens that a method reads, such as a Swin, gives what stands for an image."""
    if encoder.feature == "pixels":
        return "pixels"
    is_missing = problem_of(feature, encoder.layout, encoder.num_blocks) is not None
    return usual(encoder.layout) if is_missing else feature
