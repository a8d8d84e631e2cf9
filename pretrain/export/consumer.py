"""Other libraries that may or may not be installed beside us."""

from __future__ import annotations

import importlib
import importlib.metadata
from importlib.util import find_spec
from types import ModuleType

from pretrain.export.quiet import quiet


class AbsentError(Exception):
    """A consumer that cannot be asked here; the message tells why."""


def import_consumer(module: str) -> ModuleType:
    """Import a module of a consumer's library, silently; raises `AbsentError` where that is impossible."""
    library = module.partition(".")[0]
    if find_spec(library) is None:
        raise AbsentError(f"{library} is not installed here, so its reading is not proved")
    try:
        with quiet():
            return importlib.import_module(module)
    except (
        Exception
    ) as error:  # an old library may fail in any way beside a new torch: no fault of the export
        reason = " ".join(str(error).split())[:100]
        raise AbsentError(
            f"{module} cannot be imported here ({reason}), so its reading is not proved"
        ) from None


def version_of(library: str) -> str:
    """`name version`, or the bare name for a checkout without a distribution."""
    try:
        return f"{library} {importlib.metadata.version(library)}"
    except importlib.metadata.PackageNotFoundError:
        return library
