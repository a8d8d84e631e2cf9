"""Every slice, in the order in which they run: what others divide by comes first."""

from __future__ import annotations

from gpu.ceilings import CEILINGS
from gpu.head_cost import HEAD_COST
from gpu.layouts import LAYOUTS
from gpu.model_utilisation import slice_of
from gpu.peer_steps import PEER_STEPS
from gpu.real_data import REAL_DATA
from gpu.resident_step import RESIDENT_STEP
from gpu.setting import Slice
from gpu.stage_memory import STAGE_MEMORY
from gpu.step_profile import STEP_PROFILE
from gpu.view_pixels import VIEW_PIXELS

SLICES: dict[str, Slice] = {
    "ceilings": CEILINGS,
    "mfu-vitb16": slice_of("ViT-B/16"),
    "mfu-vits16": slice_of("ViT-S/16"),
    "mfu-vitl16": slice_of("ViT-L/16"),
    "heads": HEAD_COST,
    "views": VIEW_PIXELS,
    "resident": RESIDENT_STEP,
    "profile": STEP_PROFILE,
    "real-data": REAL_DATA,
    "memory": STAGE_MEMORY,
    "peers": PEER_STEPS,
    "layouts": LAYOUTS,
}
