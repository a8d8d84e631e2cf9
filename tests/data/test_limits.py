"""Small limits of the machine: open files, shared memory, ranks with uneven data."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from small_shards import make_shards

SCRIPT = textwrap.dedent("""
    import resource, sys
    from pretrain.data.loader import DataConfig, open_batches, open_splits
    from pretrain.errors import DataError
    from pretrain.views.plan import ViewConfig

    if __name__ == "__main__":
        resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]), int(sys.argv[2])))
        config = DataConfig(shards=sys.argv[1], lanes=64, shuffle_block=2, decode_threads=1)
        batches = open_batches(config, open_splits(config), [ViewConfig(size_px=8)], seed=0, batch_size=64)
        try:
            print(sum(len(next(batches).sample_ids) for _ in range(6)))
        except DataError as error:
            print(error)
        batches.close()
""")


def run_with_files(folder: Path, num_files: int) -> str:
    script = folder / "run.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), str(folder), str(num_files)],
        capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_sixty_four_lanes_of_plain_tars_need_few_open_files(tmp_path: Path) -> None:
    make_shards(tmp_path, [2] * 70, height=4, width=4)
    assert run_with_files(tmp_path, 64) == str(6 * 64)


@pytest.mark.slow
def test_too_few_open_files_for_compressed_shards_are_told(tmp_path: Path) -> None:
    make_shards(tmp_path, [2] * 70, ".tar.gz", height=4, width=4)
    assert "cannot be read (too many open files)" in run_with_files(tmp_path, 48).lower()


@pytest.mark.parametrize("world_size", [2, 4])
def test_no_rank_runs_out_of_data_before_another(tmp_path: Path, world_size: int) -> None:
    from pretrain.data.loader import DataConfig, open_batches, open_splits
    from pretrain.views.plan import ViewConfig

    make_shards(tmp_path, [1, 9, 3, 4], height=4, width=4)  # fewer shards than lanes, all of other sizes
    config = DataConfig(shards=str(tmp_path), lanes=8, shuffle_block=2, decode_threads=0)
    splits = open_splits(config)
    counts = []
    for rank in range(world_size):
        batches = open_batches(
            config, splits, [ViewConfig(size_px=4)], seed=0, batch_size=8, rank=rank, world_size=world_size
        )
        counts.append([len(next(batches).sample_ids) for _ in range(9)])  # more than four epochs
        batches.close()
    assert counts == [[8 // world_size] * 9] * world_size
