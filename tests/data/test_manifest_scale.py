"""A manifest of a million shards and 1.3 billion samples, without the samples' bytes."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np

from pretrain.data.manifest import COLUMNS_NAME, FORMAT, INDEX_NAME, shards_hash

NUM_SHARDS = 1_000_000
SHARD_SIZE = 1_300


def write_index(folder: Path) -> None:
    """The columns of the shards as they would be; those of the samples are a hole in the file."""
    names = [f"set-train-{number:07d}.tar".encode() for number in range(NUM_SHARDS)]
    rng = np.random.default_rng(0)
    columns = {
        "names": np.frombuffer(b"".join(names), dtype=np.uint8),
        "name_ends": np.cumsum([len(name) for name in names], dtype=np.int64),
        "num_bytes": np.full(NUM_SHARDS, 143_000_000),
        "num_samples": np.full(NUM_SHARDS, SHARD_SIZE),
        "data_bytes": np.full(NUM_SHARDS, 142_998_976),
        "sha256": rng.integers(0, 256, (NUM_SHARDS, 32), dtype=np.uint8),
        "split": np.zeros(NUM_SHARDS, dtype=np.uint8),
        "digests": rng.integers(0, 2**63, NUM_SHARDS, dtype=np.uint64),
    }
    num_samples = NUM_SHARDS * SHARD_SIZE
    kinds = {"uint8": "U8", "int32": "I32", "uint32": "U32", "int64": "I64", "uint64": "U64"}
    header, place = {}, 0
    for name, column in columns.items():
        header[f"shards.{name}"] = {
            "dtype": kinds[column.dtype.name],
            "shape": column.shape,
            "data_offsets": (place, place + column.nbytes),
        }
        place += column.nbytes
    for name, kind, num_bytes, count in (
        ("starts", "I64", 8, num_samples + NUM_SHARDS),
        ("image_begins", "U32", 4, num_samples),
        ("image_bytes", "U32", 4, num_samples),
        ("hashes", "U64", 8, num_samples),
        ("labels", "I32", 4, num_samples),
    ):
        end = place + num_bytes * count
        header[f"samples.{name}"] = {"dtype": kind, "shape": (count,), "data_offsets": (place, end)}
        place = end
    text = json.dumps(header).encode()
    with (folder / COLUMNS_NAME).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for column in columns.values():
            file.write(column.tobytes())
        file.truncate(8 + len(text) + place)
    index = {
        "format": FORMAT,
        "shards_root": ".",
        "split_names": ["train"],
        "class_names": [],
        "shards_sha256": shards_hash(columns, ("train",)),
        "columns_sha256": "",
    }
    (folder / INDEX_NAME).write_text(json.dumps(index))


def test_a_million_shards_open_in_two_seconds_and_are_ordered_in_a_millisecond(tmp_path: Path) -> None:
    write_index(tmp_path)
    script = tmp_path / "measure.py"
    script.write_text(
        textwrap.dedent("""
            import sys, time
            from pathlib import Path
            from pretrain.data.manifest import Manifest  # without torch, which takes 500 MiB by itself

            def peak_mib():
                status = Path("/proc/self/status").read_text()
                return int(status.partition("VmHWM:")[2].split()[0]) / 1024

            begin = time.process_time()
            Manifest.load(sys.argv[1])
            opened = time.process_time() - begin
            opened_mib = peak_mib()

            from pretrain.data.loader import DataConfig, mixture_of, open_splits
            imports_mib = peak_mib()
            config = DataConfig(shards=sys.argv[1])
            mixture = mixture_of(config, open_splits(config), seed=0, batch_size=4096)
            mixture.batch(0)
            seconds = []
            for step in range(1, 41):
                begin = time.process_time()
                mixture.batch(step)
                seconds.append(time.process_time() - begin)
            order_mib = peak_mib() - imports_mib
            print(opened, opened_mib, order_mib, min(seconds), mixture.num_samples)
        """)
    )
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        capture_output=True, text=True, timeout=120, check=True,
        cwd=Path(__file__).parents[2], env={"PYTHONPATH": ".", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    opened, opened_mib, order_mib, per_batch, num_samples = map(float, done.stdout.split())
    print(f"{opened:.2f} s, {opened_mib:.0f} MiB, {order_mib:.0f} MiB, {1000 * per_batch:.2f} ms")  # noqa: T201
    assert num_samples == NUM_SHARDS * SHARD_SIZE
    assert opened < 2
    assert opened_mib < 500
    assert order_mib < 500
    assert per_batch < 0.001
