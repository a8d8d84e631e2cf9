"""Build shards from images kept in any other way: `run.build_shards`, seen from top to bottom.

find the source -> list its images -> lay out the shards -> write them in parallel -> write the index
"""
