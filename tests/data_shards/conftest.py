"""The scripts in data_shards/ are run as files, so they import each other by plain names."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "data_shards"))
