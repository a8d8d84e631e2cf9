from __future__ import annotations

import fcntl
import hashlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from range_server import Fault, RangeServer, wait_until

from pretrain.data import cache as cache_module
from pretrain.data.cache import FINISHED_NS, CacheConfig, ShardCache
from pretrain.data.storage import Location, StorageConfig, StorageError, parse_location
from pretrain.errors import ConfigError, DataError

QUICK = StorageConfig(timeout_seconds=10.0, retry_seconds=(0.01, 0.02))
SHARD_BYTES = 200_000
SHARDS = [random.Random(number).randbytes(SHARD_BYTES) for number in range(8)]
SPAWN = multiprocessing.get_context("spawn")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RangeServer]:
    (tmp_path / "served").mkdir()
    for number, data in enumerate(SHARDS):
        (tmp_path / "served" / f"{number}.tar").write_bytes(data)
    with RangeServer(tmp_path / "served") as running:
        yield running


def cache_of(tmp_path: Path, num_shards: int = 8, storage: StorageConfig = QUICK) -> ShardCache:
    return ShardCache(CacheConfig(tmp_path / "cache", num_shards * SHARD_BYTES), storage)


def fetch(cache: ShardCache, server: RangeServer, number: int) -> bytes:
    data = SHARDS[number]
    place = parse_location(server.url).join(f"{number}.tar")
    return cache.fetch(place, len(data), sha256(data)).read_bytes()


def num_downloads(server: RangeServer) -> dict[str, float]:
    """How often each shard was sent; opening one takes a byte more."""
    return {name: num_bytes // SHARD_BYTES for name, num_bytes in server.num_sent.items()}


def entries(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock"}


def read_all(url: str, folder: Path, num_shards: int, seed: int, rounds: int, hold: bool) -> None:
    """A job: reads every shard through the cache, in an order of its own, and checks every byte."""
    cache = ShardCache(CacheConfig(folder, num_shards * SHARD_BYTES), QUICK)
    order = random.Random(seed)
    for _ in range(rounds):
        for number in order.sample(range(8), k=8) if seed else range(8):
            data = SHARDS[number]
            place = parse_location(url).join(f"{number}.tar")
            with cache.open(place, len(data), sha256(data)) as file:
                if hold:
                    time.sleep(order.uniform(0, 0.02))
                assert file.read(0, file.num_bytes) == data
    assert cache.num_hits + cache.num_misses >= 8 * rounds  # more where one was evicted before it was opened


def start(*arguments: object) -> BaseProcess:
    process = SPAWN.Process(target=read_all, args=arguments)
    process.start()
    return process


def test_cold_and_warm_give_the_same_bytes_and_count_right(tmp_path: Path, server: RangeServer) -> None:
    cache = cache_of(tmp_path)
    cold = [fetch(cache, server, number) for number in range(8)]
    assert (cache.num_hits, cache.num_misses, cache.bytes_fetched) == (0, 8, 8 * SHARD_BYTES)
    num_asked = len(server.ranges)
    warm = [fetch(cache, server, number) for number in range(8)]
    assert cold == warm == SHARDS
    assert (cache.num_hits, cache.num_misses, cache.num_evicted) == (8, 8, 0)
    assert len(server.ranges) == num_asked


def test_names_in_the_folder_come_from_the_content_and_equal_shards_share_a_file(tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar"):
        (tmp_path / name).write_bytes(SHARDS[0])
    cache = cache_of(tmp_path)
    paths = {
        cache.fetch(Location(str(tmp_path / n)), SHARD_BYTES, sha256(SHARDS[0])) for n in ("a.tar", "b.tar")
    }
    assert len(paths) == 1
    assert entries(tmp_path / "cache") == {sha256(SHARDS[0]): SHARDS[0]}
    assert (cache.num_hits, cache.num_misses) == (1, 1)


@pytest.mark.parametrize("wrong", ["", "../../etc/passwd", "0" * 63, "A" * 64, "0" * 64 + "\n"])
def test_a_checksum_that_is_none_becomes_no_file_name(tmp_path: Path, wrong: str) -> None:
    with pytest.raises(DataError, match="its sha256 in the index is not one"):
        cache_of(tmp_path).fetch(Location("x"), 1, wrong)


def test_four_processes_download_each_shard_once(tmp_path: Path, server: RangeServer) -> None:
    server.always = Fault(bytes_per_second=2_000_000)  # so that they do meet
    jobs = [start(server.url, tmp_path / "cache", 8, 0, 1, False) for _ in range(4)]
    for job in jobs:
        job.join(60)
    assert [job.exitcode for job in jobs] == [0] * 4
    assert num_downloads(server) == {f"{number}.tar": 1 for number in range(8)}
    assert entries(tmp_path / "cache") == {sha256(data): data for data in SHARDS}


def test_threads_of_a_process_download_a_shard_once(tmp_path: Path, server: RangeServer) -> None:
    server.always = Fault(bytes_per_second=1_000_000)
    cache = cache_of(tmp_path)
    threads = [threading.Thread(target=fetch, args=(cache, server, 0)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (cache.num_hits, cache.num_misses) == (3, 1)
    assert num_downloads(server) == {"0.tar": 1}


def killed_in_download(tmp_path: Path, server: RangeServer) -> Path:
    """The part of shard 0 that a killed job leaves."""
    server.faults += [Fault(), Fault(stall_after_bytes=SHARD_BYTES // 2)]
    job = start(server.url, tmp_path / "cache", 8, 0, 1, False)
    wait_until(lambda: server.num_sent["0.tar"] > SHARD_BYTES // 2)
    part = tmp_path / "cache" / f"{sha256(SHARDS[0])}.part"
    assert part.exists()
    assert job.pid is not None
    os.kill(job.pid, signal.SIGKILL)
    job.join(20)
    assert part.exists()
    return part


@pytest.mark.timeout(60)
def test_a_killed_download_is_taken_over_by_the_next(tmp_path: Path, server: RangeServer) -> None:
    cache = cache_of(tmp_path, num_shards=1)  # no room for what the dead one had taken up
    killed_in_download(tmp_path, server)
    assert fetch(cache, server, 0) == SHARDS[0]
    assert entries(tmp_path / "cache") == {sha256(SHARDS[0]): SHARDS[0]}


def test_what_a_killed_download_left_is_swept_by_any_other(tmp_path: Path, server: RangeServer) -> None:
    cache = cache_of(tmp_path)
    part = killed_in_download(tmp_path, server)
    assert fetch(cache, server, 5) == SHARDS[5]
    assert not part.exists()


def test_who_waits_for_a_download_that_is_killed_does_it_himself(tmp_path: Path, server: RangeServer) -> None:
    server.faults += [Fault(), Fault(stall_after_bytes=SHARD_BYTES // 2)]
    first = start(server.url, tmp_path / "cache", 8, 0, 1, False)
    wait_until(lambda: server.num_sent["0.tar"] > SHARD_BYTES // 2)
    second = start(server.url, tmp_path / "cache", 8, 0, 1, False)
    second.join(3)
    assert second.is_alive()
    assert first.pid is not None
    os.kill(first.pid, signal.SIGKILL)
    second.join(20)
    first.join(20)
    assert second.exitcode == 0
    assert entries(tmp_path / "cache") == {sha256(data): data for data in SHARDS}


def folder_bytes(folder: Path) -> int | None:
    """All bytes of the folder at one moment; None where it changed while we looked."""

    def names() -> set[str]:
        return {path.name for path in folder.iterdir()}

    before = names()
    try:
        total = sum((folder / name).stat().st_size for name in before)
    except FileNotFoundError:
        return None
    return total if names() == before else None


def test_two_jobs_with_a_small_cap_never_exceed_it_and_read_right_bytes(
    tmp_path: Path, server: RangeServer
) -> None:
    server.always = Fault(bytes_per_second=4_000_000)
    jobs = [start(server.url, tmp_path / "cache", 3, seed, 4, True) for seed in (1, 2)]
    seen = []
    while any(job.is_alive() for job in jobs):
        if (tmp_path / "cache").exists():
            seen.append(folder_bytes(tmp_path / "cache"))
        time.sleep(0.001)
    for job in jobs:
        job.join()
    assert [job.exitcode for job in jobs] == [0, 0]
    counted = [total for total in seen if total is not None]
    assert len(counted) > 100
    assert max(counted) == 3 * SHARD_BYTES  # full, not more
    assert sum(num_downloads(server).values()) > 8  # so shards were evicted


def test_many_writers_and_room_for_one_take_turns(tmp_path: Path, server: RangeServer) -> None:
    jobs = [start(server.url, tmp_path / "cache", 1, seed, 1, True) for seed in (1, 2, 3)]
    for job in jobs:
        job.join(60)
    assert [job.exitcode for job in jobs] == [0] * 3
    assert len(entries(tmp_path / "cache")) == 1


def test_the_least_recently_used_goes_first(tmp_path: Path, server: RangeServer) -> None:
    cache = cache_of(tmp_path, num_shards=3)
    for number in (0, 1, 2, 0, 3):  # 0 is used again, so 1 is the oldest
        fetch(cache, server, number)
    assert set(entries(tmp_path / "cache")) == {sha256(SHARDS[number]) for number in (0, 2, 3)}
    assert cache.num_evicted == 1


def test_an_evicted_shard_can_be_read_on(tmp_path: Path, server: RangeServer) -> None:
    cache = cache_of(tmp_path, num_shards=1)
    place = parse_location(server.url).join("0.tar")
    with cache.open(place, SHARD_BYTES, sha256(SHARDS[0])) as file:
        assert file.read(0, 10) == SHARDS[0][:10]
        fetch(cache, server, 1)
        assert set(entries(tmp_path / "cache")) == {sha256(SHARDS[1])}
        assert file.read(0, SHARD_BYTES) == SHARDS[0]


def test_a_hit_by_another_job_does_not_look_like_a_change(tmp_path: Path, server: RangeServer) -> None:
    cache, other = cache_of(tmp_path), cache_of(tmp_path)
    with cache.open(parse_location(server.url).join("0.tar"), SHARD_BYTES, sha256(SHARDS[0])) as file:
        fetch(other, server, 0)
        assert other.num_hits == 1
        assert file.read(0, SHARD_BYTES) == SHARDS[0]


def test_a_shard_larger_than_the_cache_is_refused(tmp_path: Path, server: RangeServer) -> None:
    cache = ShardCache(CacheConfig(tmp_path / "cache", SHARD_BYTES - 1), QUICK)
    with pytest.raises(DataError, match="do not fit in a cache of 199999 bytes; raise"):
        fetch(cache, server, 0)


@pytest.mark.parametrize("data", [SHARDS[1], SHARDS[0][:-1], b"", SHARDS[0] + b"x"])
def test_a_damaged_entry_is_dropped_and_fetched_again(
    tmp_path: Path, server: RangeServer, data: bytes
) -> None:
    cache = cache_of(tmp_path)
    fetch(cache, server, 0)
    (tmp_path / "cache" / sha256(SHARDS[0])).write_bytes(data)
    assert fetch(cache, server, 0) == SHARDS[0]
    assert (cache.num_hits, cache.num_misses) == (0, 2)


def test_bytes_that_came_wrong_once_are_fetched_again(tmp_path: Path, server: RangeServer) -> None:
    problems: list[str] = []
    server.faults += [Fault(), Fault(corrupt=True)]
    cache = ShardCache(CacheConfig(tmp_path / "cache", SHARD_BYTES), QUICK, problems.append)
    assert fetch(cache, server, 0) == SHARDS[0]
    assert len(problems) == 1


def test_bytes_that_stay_wrong_are_never_served(tmp_path: Path, server: RangeServer) -> None:
    server.always = Fault(corrupt=True)
    cache = cache_of(tmp_path)
    wrong = sha256(bytes([SHARDS[0][0] ^ 1]) + SHARDS[0][1:])
    with pytest.raises(StorageError, match=rf"sha256 {wrong} instead of {sha256(SHARDS[0])}"):
        fetch(cache, server, 0)
    assert entries(tmp_path / "cache") == {}


def test_a_shard_of_another_size_is_not_downloaded(tmp_path: Path, server: RangeServer) -> None:
    cache = cache_of(tmp_path)
    with pytest.raises(StorageError, match="200000 bytes instead of the 199999 of its index"):
        cache.fetch(parse_location(server.url).join("0.tar"), SHARD_BYTES - 1, sha256(SHARDS[0][:-1]))
    assert entries(tmp_path / "cache") == {}
    assert cache.bytes_fetched == 0


def test_an_absent_shard_leaves_nothing_behind(tmp_path: Path, server: RangeServer) -> None:
    cache = cache_of(tmp_path)
    with pytest.raises(StorageError, match="no such file"):
        cache.fetch(parse_location(server.url).join("9.tar"), 1, sha256(b"x"))
    assert entries(tmp_path / "cache") == {}


def test_the_folder_is_for_its_user_alone(tmp_path: Path) -> None:
    cache_of(tmp_path)
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700
    (tmp_path / "open").mkdir(mode=0o755)
    (tmp_path / "open").chmod(0o755)
    with pytest.raises(DataError, match="open to other users"):
        ShardCache(CacheConfig(tmp_path / "open", 1))
    assert (tmp_path / "open").stat().st_mode & 0o777 == 0o755
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be a cache"):
        ShardCache(CacheConfig(tmp_path / "file", 1))
    with pytest.raises(ConfigError, match="max_bytes: 0 is not above 0"):
        CacheConfig(tmp_path, 0)


def test_files_of_others_in_the_folder_are_left_alone(tmp_path: Path, server: RangeServer) -> None:
    cache = cache_of(tmp_path, num_shards=1)
    strangers = {"notes.txt": b"x", "a.part": b"y"}
    for name, data in strangers.items():
        (tmp_path / "cache" / name).write_bytes(data)
    for number in (0, 1):
        fetch(cache, server, number)
    assert entries(tmp_path / "cache") == {**strangers, sha256(SHARDS[1]): SHARDS[1]}


def open_shard(cache: ShardCache, server: RangeServer, number: int) -> bytes:
    place = parse_location(server.url).join(f"{number}.tar")
    with cache.open(place, SHARD_BYTES, sha256(SHARDS[number])) as file:
        return file.read(0, SHARD_BYTES)


def locked(path: Path) -> int:
    """A descriptor that holds a file as a process does that stands still."""
    held = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(held, fcntl.LOCK_EX)
    return held


IMPATIENT = StorageConfig(timeout_seconds=0.5, retry_seconds=(0.01,))


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", [f"{sha256(SHARDS[0])}.part", "lock"])
def test_behind_a_process_that_stands_still_a_shard_is_read_where_it_lies(
    tmp_path: Path, server: RangeServer, name: str
) -> None:
    cache = cache_of(tmp_path, storage=IMPATIENT)
    held = locked(tmp_path / "cache" / name)
    begin = time.monotonic()
    assert open_shard(cache, server, 0) == SHARDS[0]
    assert 0.5 <= time.monotonic() - begin < 5
    assert (cache.num_bypassed, cache.num_hits, cache.num_misses) == (1, 0, 0)
    os.close(held)
    assert open_shard(cache, server, 0) == SHARDS[0]
    assert (cache.num_bypassed, cache.num_misses) == (1, 1)


@pytest.mark.timeout(30)
def test_nobody_waits_for_ever_for_room_that_a_process_holds_and_does_not_use(
    tmp_path: Path, server: RangeServer
) -> None:
    cache = cache_of(tmp_path, num_shards=1, storage=IMPATIENT)
    held = locked(tmp_path / "cache" / f"{sha256(SHARDS[1])}.part")
    os.truncate(held, SHARD_BYTES)
    assert open_shard(cache, server, 0) == SHARDS[0]
    assert cache.num_bypassed == 1
    assert set(entries(tmp_path / "cache")) == {f"{sha256(SHARDS[1])}.part"}
    os.close(held)
    assert open_shard(cache, server, 0) == SHARDS[0]
    assert set(entries(tmp_path / "cache")) == {sha256(SHARDS[0])}


@pytest.mark.timeout(30)
def test_a_slow_download_that_lives_is_waited_for(tmp_path: Path, server: RangeServer) -> None:
    cache = cache_of(tmp_path, storage=IMPATIENT)
    entry = tmp_path / "cache" / sha256(SHARDS[0])
    part = entry.with_name(f"{entry.name}.part")
    held = locked(part)

    def write() -> None:
        step = SHARD_BYTES // 20
        for begin in range(0, SHARD_BYTES, step):  # two seconds, four deadlines
            os.pwrite(held, SHARDS[0][begin : begin + step], begin)
            time.sleep(0.1)
        os.utime(held, ns=(time.time_ns(), FINISHED_NS))
        part.rename(entry)
        os.close(held)

    writer = threading.Thread(target=write)
    writer.start()
    assert open_shard(cache, server, 0) == SHARDS[0]
    writer.join()
    assert (cache.num_bypassed, cache.num_hits) == (0, 1)
    assert server.num_sent["0.tar"] == 0


def test_bytes_are_on_the_disk_before_they_have_a_name(
    tmp_path: Path, server: RangeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = cache_of(tmp_path)
    entry = tmp_path / "cache" / sha256(SHARDS[0])
    really, seen = os.fsync, []

    def fsync(descriptor: int) -> None:
        really(descriptor)
        seen.append((os.pread(descriptor, SHARD_BYTES + 1, 0) == SHARDS[0], entry.exists()))

    monkeypatch.setattr(cache_module.os, "fsync", fsync)
    fetch(cache, server, 0)
    assert seen == [(True, False)]
    assert entry.exists()


def test_an_entry_that_rotted_unseen_is_fetched_again_once_it_is_dropped(
    tmp_path: Path, server: RangeServer
) -> None:
    cache = cache_of(tmp_path)
    fetch(cache, server, 0)
    entry = tmp_path / "cache" / sha256(SHARDS[0])
    entry.write_bytes(SHARDS[0][:-1] + b"?")
    os.utime(entry, ns=(time.time_ns(), FINISHED_NS))  # as a disk does: no time of change tells it
    assert fetch(cache, server, 0) != SHARDS[0]
    cache.drop(sha256(SHARDS[0]))
    assert fetch(cache, server, 0) == SHARDS[0]
    assert (cache.num_dropped, cache.num_misses) == (1, 2)


@pytest.mark.parametrize("name", [sha256(SHARDS[0]), sha256(SHARDS[1]), "../kept"])
def test_a_sound_entry_an_absent_one_and_other_files_are_not_dropped(
    tmp_path: Path, server: RangeServer, name: str
) -> None:
    cache = cache_of(tmp_path)
    fetch(cache, server, 0)
    (tmp_path / "kept").write_bytes(b"x")
    cache.drop(name)
    assert entries(tmp_path / "cache") == {sha256(SHARDS[0]): SHARDS[0]}
    assert (tmp_path / "kept").exists()
    assert cache.num_dropped == 0


SMALL_DISK = """
import hashlib, os, sys
from pathlib import Path
from pretrain.data import cache as cache_module
from pretrain.data.cache import FINISHED_NS, CacheConfig, ShardCache
from pretrain.data.storage import Location
from pretrain.errors import DataError

source, disk = Path(sys.argv[1]), Path(sys.argv[2])
cache = ShardCache(CacheConfig(disk / "cache", 10**9))  # far more than the disk has
for number in range(8):
    data = (source / f"{number}.tar").read_bytes()
    path = cache.fetch(Location(str(source / f"{number}.tar")), len(data), hashlib.sha256(data).hexdigest())
    assert path.read_bytes() == data
assert cache.num_evicted == 5, cache.num_evicted
data = bytes(2_000_000)
(source / "large.tar").write_bytes(data)
try:
    cache.fetch(Location(str(source / "large.tar")), len(data), hashlib.sha256(data).hexdigest())
except DataError as error:
    print(error)
print(sorted(path.name for path in (disk / "cache").iterdir()))
"""


def test_on_a_full_disk_shards_are_evicted_and_else_it_is_told(tmp_path: Path, server: RangeServer) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "size=700k", "none", str(disk)]
    if subprocess.run(["unshare", "-rm", *mounted], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets us mount no small disk")
    script = f'{" ".join(mounted)} && exec "$0" "$@"'
    done = subprocess.run(
        [
            "unshare",
            "-rm",
            "sh",
            "-c",
            script,
            sys.executable,
            "-c",
            SMALL_DISK,
            str(server.folder),
            str(disk),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told, left = done.stdout.splitlines()
    assert "no room on the disk for" in told
    assert left == "['lock']"
