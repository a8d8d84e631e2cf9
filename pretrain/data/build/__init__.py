"""Build shards from images kept in any other way: `build_shards(request, report)`, seen from top to bottom.

find the source -> list its images -> lay out the shards -> write them in parallel -> write the index
"""

from pretrain.data.build.run import build_shards
from pretrain.data.build.settings import BuildRequest, BuildResult

__all__ = ["BuildRequest", "BuildResult", "build_shards"]
