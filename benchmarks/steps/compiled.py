"""What `engine.compile` does to a step on this machine."""

from __future__ import annotations

import time
from typing import Any

from steps.core import CORE, views
from steps.ours import CONTRASTIVE_ONLY, LOCAL, Setting, configuration, inputs_for, training_step
from steps.turns import CPU, Step, row, table, take_turns

ON, OFF = "compiled", "not compiled"


def compiled(setting: Setting) -> dict[str, Any]:
    common = [*LOCAL, setting.model(224, 16), *views(setting, 224), setting.batch(2), *CONTRASTIVE_ONLY]
    steps: dict[str, Step] = {}
    first_seconds = {}
    for name, value in ((OFF, "off"), (ON, "on")):
        config = configuration(CORE, *common, f"engine.compile='{value}'")
        steps[name] = training_step(config, inputs_for(config, setting.shards))
        begin = time.perf_counter()
        steps[name]()
        first_seconds[name] = round(time.perf_counter() - begin, 2)
    seconds = take_turns(steps, setting.rounds_or(11))
    rows = [row("compiled / not compiled, ViT-S/16, 224 px", seconds, ON, OFF)]
    found = table("ViT-S/16 at 224 px, contrastive, 2 images of two views, fp32", CPU, seconds, rows)
    return found | {"first_step_seconds": first_seconds}
