"""Imported once by the server that test processes are forked from."""

import pretrain.data.worker
import pretrain.train  # noqa: F401
from pretrain.engine.deepspeed_engine import _import_deepspeed

_import_deepspeed()
