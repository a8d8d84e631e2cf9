from __future__ import annotations

import contextlib
import gzip
import io
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from range_server import Fault, RangeServer

from pretrain.data.deadline import DeadlineError, in_time
from pretrain.data.remote import open_remote
from pretrain.data.storage import (
    Location,
    StorageConfig,
    StorageError,
    list_names,
    open_file,
    open_stream,
    parse_location,
    read_bytes,
)
from pretrain.errors import ConfigError, DataError

QUICK = StorageConfig(timeout_seconds=10.0, retry_seconds=(0.01, 0.02))
HASTY = StorageConfig(timeout_seconds=0.5, retry_seconds=(0.01, 0.02))
DATA = random.Random(3).randbytes(300_000)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RangeServer]:
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "a.tar").write_bytes(DATA)
    with RangeServer(tmp_path / "served") as running:
        yield running


def file_on(server: RangeServer, name: str = "a.tar") -> Location:
    return parse_location(server.url).join(name)


@pytest.fixture(params=["local", "http"])
def location(request: pytest.FixtureRequest, tmp_path: Path, server: RangeServer) -> Location:
    """The same file, by its path and by its address."""
    return file_on(server) if request.param == "http" else Location(str(server.folder / "a.tar"))


# ---- locations


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("pipe:cat secret", "'pipe:' is refused"),
        ("PIPE:cat secret", "'pipe:' is refused"),
        ("file:///etc/passwd", "'file:' is refused; give the path itself"),
        ("file:../x", "'file:' is refused"),
        ("simplecache::s3://bucket/x", "chains places"),
        ("s3://bucket/x::y", "chains places"),
        ("zip://a.tar::http://host/x.zip", "chains places"),
        ("ftp://host/x", "'ftp:' is refused"),
        ("github://user:repo@main/x", "'github:' is refused"),
        ("memory://x", "'memory:' is refused"),
        ("", "no place is given"),
        ("  ", "no place is given"),
        ("a\nb", "control character"),
        ("http://host/a\x00b", "control character"),
        ("http://user:word@host/x", "user or password"),
        ("https://user@host/x", "user or password"),
        ("s3://key:word@bucket/x", "user or password"),
        ("http:///x", "names no host"),
        ("s3:bucket/x", "names no host or bucket"),
        ("s3://", "names no host or bucket"),
        ("http://host:port/x", "not a valid http:// address"),
        ("http://[::1/x", "chains places|not a valid"),
    ],
)
def test_places_outside_the_allowed_schemes_are_refused_in_one_line(text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        parse_location(text, "data.shards")
    assert str(caught.value).startswith("data.shards: ")
    assert "\n" not in str(caught.value)
    assert "word" not in str(caught.value).replace("password", "")


@pytest.mark.parametrize(
    "text", ["shards", "/data/a b", "../x", "./pipe:x", "a:b/c"[2:], "https://h/x?sig=1"]
)
def test_a_place_that_is_allowed_stays_as_written(text: str) -> None:
    assert parse_location(text).url == text


def test_an_address_that_was_made_a_path_is_refused() -> None:
    with pytest.raises(ConfigError, match="is an address where a path is meant"):
        parse_location(Path("s3://bucket/x"))


def test_an_address_of_an_ipv6_host_is_no_chain() -> None:
    assert parse_location("http://[::1]:8000/x").url == "http://[::1]:8000/x"


@pytest.mark.parametrize(("scheme", "package", "remedy"), [("s3", "s3fs", "s3"), ("gs", "gcsfs", "gs")])
def test_a_store_without_its_package_tells_what_to_install(
    monkeypatch: pytest.MonkeyPatch, scheme: str, package: str, remedy: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(ConfigError, match=rf"pip install 'pretrain\[{remedy}\]'"):
        parse_location(f"{scheme}://bucket/x")


def test_parsing_a_location_loads_no_storage_package() -> None:
    code = (
        "import sys; from pretrain.data.storage import parse_location;"
        "parse_location('http://h/x'); parse_location('hf://datasets/a/b');"
        "heavy = {'fsspec', 'aiohttp', 's3fs', 'huggingface_hub', 'torch'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("folder", ["shards", "/data/shards", "http://h/shards", "http://h/s/?sig=x"])
@pytest.mark.parametrize(
    "name",
    ["../a", "a/../b", "/etc/passwd", "..", ".", "", "a//b", "http://x/a", "pipe://x", "a\nb", "a\x00"],
)
def test_no_name_leads_out_of_its_folder(folder: str, name: str) -> None:
    with pytest.raises(ConfigError, match="not the name of a file below this folder"):
        parse_location(folder).join(name)


def test_a_joined_name_keeps_its_odd_characters(server: RangeServer) -> None:
    name = "50% of #1?, ä+b.tar"
    (server.folder / name).write_bytes(b"odd")
    assert read_bytes(file_on(server, name), QUICK) == b"odd"
    assert read_bytes(Location(str(server.folder)).join(name), QUICK) == b"odd"
    signed = parse_location("https://h/folder?sig=1").join("a b.tar")
    assert signed.url == "https://h/folder/a%20b.tar?sig=1"


def test_messages_show_no_password_and_no_signature() -> None:
    assert str(Location("https://user:word@h:1/x/a.tar?X-Signature=abc")) == "https://h:1/x/a.tar?..."
    assert str(Location("s3://bucket/a.tar")) == "s3://bucket/a.tar"


def test_locations_and_errors_survive_a_trip_between_processes() -> None:
    error = StorageError("x: gone", permanent=True, missing=True, retry_after_seconds=2.0)
    again, place = pickle.loads(pickle.dumps((error, Location("a"))))
    assert place == Location("a")
    assert (str(again), again.permanent, again.missing, again.retry_after_seconds) == (
        "x: gone",
        True,
        True,
        2.0,
    )


# ---- reads that go well


def test_any_range_is_the_slice_of_the_bytes(location: Location) -> None:
    rng = random.Random(1)
    with open_file(location, QUICK) as file:
        assert file.num_bytes == len(DATA)
        ranges = [(0, 1), (0, len(DATA)), (len(DATA) - 1, len(DATA) + 9), (len(DATA), len(DATA) + 1), (7, 7)]
        ranges += [(rng.randrange(len(DATA)), rng.randrange(len(DATA) + 100)) for _ in range(30)]
        for begin, end in ranges:
            assert file.read(begin, end) == DATA[begin:end]
        with pytest.raises(ValueError, match="begins at -1"):
            file.read(-1, 1)


def test_threads_share_a_file_and_a_few_connections(location: Location, server: RangeServer) -> None:
    with open_file(location, QUICK) as file, ThreadPoolExecutor(8) as pool:
        begins = [random.Random(number).randrange(len(DATA) - 1000) for number in range(200)]
        pieces = list(pool.map(lambda begin: file.read(begin, begin + 1000), begins))
    assert pieces == [DATA[begin : begin + 1000] for begin in begins]
    assert server.num_connections <= 8


def test_an_empty_file_is_read_as_empty(server: RangeServer) -> None:
    (server.folder / "empty").write_bytes(b"")
    for place in (file_on(server, "empty"), Location(str(server.folder / "empty"))):
        with open_file(place, QUICK) as file:
            assert (file.num_bytes, file.read(0, 10)) == (0, b"")


def test_a_stream_gives_all_bytes_and_can_be_rewound(location: Location) -> None:
    with open_stream(location, QUICK) as stream:
        assert stream.read() == DATA
        stream.seek(5)
        assert stream.read(10) == DATA[5:15]
        assert stream.seek(-3, io.SEEK_END) == len(DATA) - 3
        assert stream.read() == DATA[-3:]


def test_a_compressed_file_is_decompressed_from_a_stream(server: RangeServer) -> None:
    (server.folder / "a.tar.gz").write_bytes(gzip.compress(DATA))
    with open_stream(file_on(server, "a.tar.gz"), QUICK) as stream, gzip.open(stream) as unpacked:
        assert unpacked.read() == DATA


def test_a_small_file_is_read_whole_but_not_a_large_one(location: Location) -> None:
    assert read_bytes(location, QUICK) == DATA
    assert read_bytes(location, QUICK, max_bytes=len(DATA)) == DATA
    with pytest.raises(StorageError, match="300000 bytes, more than 299999"):
        read_bytes(location, QUICK, max_bytes=len(DATA) - 1)


def test_names_of_a_folder_are_sorted_files_only(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name in ("b.tar", "a.tar"):
        (tmp_path / name).touch()
    assert list_names(Location(str(tmp_path)), QUICK) == ["a.tar", "b.tar"]
    with pytest.raises(StorageError, match="no such folder") as caught:
        list_names(Location(str(tmp_path / "absent")), QUICK)
    assert caught.value.missing
    with pytest.raises(DataError, match=r"needs an index\.json"):
        list_names(parse_location("http://h/x"), QUICK)


def test_a_password_comes_from_netrc_and_a_wrong_one_is_final(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(DATA)
    netrc = tmp_path / "netrc"
    netrc.touch(mode=0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setattr("pretrain.data.remote._http_client.cache_clear", lambda: None, raising=False)
    config = StorageConfig(
        timeout_seconds=19.0, retry_seconds=(0.01,)
    )  # a client of its own, made with netrc
    with RangeServer(tmp_path, password="word") as server:
        with pytest.raises(StorageError, match="access denied") as caught:
            open_file(file_on(server, "a"), config)
        assert caught.value.permanent
        netrc.write_text("machine 127.0.0.1 login user password word\n")
        assert read_bytes(file_on(server, "a"), config) == DATA


def test_a_forked_process_reads_with_a_client_of_its_own(server: RangeServer) -> None:
    assert read_bytes(file_on(server), QUICK) == DATA
    child = os.fork()
    if child == 0:
        os._exit(0 if read_bytes(file_on(server), QUICK) == DATA else 1)
    assert os.waitpid(child, 0)[1] == 0


# ---- storage that fails for a while


BREAKS = {
    "status 500": Fault(status=500),
    "status 503": Fault(status=503),
    "status 429": Fault(status=429),
    "cut": Fault(cut_after_bytes=1000),
    "cut at once": Fault(cut_after_bytes=0),
    "stalled": Fault(stall_after_bytes=1000),
    "stalled at once": Fault(stall_after_bytes=0),
}


def patience(name: str) -> StorageConfig:
    """A short one where a server is to be waited for in vain."""
    return HASTY if "stalled" in name else QUICK


@pytest.mark.parametrize("name", BREAKS)
def test_a_passing_fault_costs_a_counted_retry_and_no_byte(server: RangeServer, name: str) -> None:
    problems: list[str] = []
    with open_file(file_on(server), patience(name), problems.append) as file:
        server.faults += [BREAKS[name]] * 2
        assert file.read(1000, 200_000) == DATA[1000:200_000]
    assert 1 <= len(problems) <= 2  # opening it anew may pass with the same fault
    assert all(str(file_on(server)) in problem and "\n" not in problem for problem in problems)


@pytest.mark.parametrize("name", BREAKS)
def test_a_lasting_fault_ends_in_an_error_within_the_deadlines(server: RangeServer, name: str) -> None:
    problems: list[str] = []
    with open_file(file_on(server), patience(name), problems.append) as file:
        server.always = BREAKS[name]
        begin = time.monotonic()
        with pytest.raises(StorageError) as caught:
            file.read(1000, 200_000)
        assert time.monotonic() - begin < 3 * HASTY.timeout_seconds + 1.5
    assert not caught.value.permanent
    assert len(problems) == len(HASTY.retry_seconds)


def test_a_throttled_server_runs_into_the_deadline_and_is_read_when_it_is_quick_again(
    server: RangeServer,
) -> None:
    problems: list[str] = []
    server.faults += [Fault(), Fault(bytes_per_second=50_000)]
    # a deadline that only the throttled answer (6 s) misses, however busy the machine is
    unhurried = StorageConfig(timeout_seconds=2.0, retry_seconds=HASTY.retry_seconds)
    with open_file(file_on(server), unhurried, problems.append) as file:
        assert file.read(0, len(DATA)) == DATA
    (problem,) = problems
    assert "no answer within 2 seconds" in problem


def test_a_stream_that_breaks_reads_only_the_broken_piece_again(
    server: RangeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.data.storage.REMOTE_PIECE_BYTES", 100_000)
    server.faults += [Fault(), Fault(), Fault(cut_after_bytes=70_000)]  # opening, first piece, second piece
    with open_stream(file_on(server), QUICK) as stream:
        assert stream.read() == DATA
    begins = [int(asked.removeprefix("bytes=").split("-")[0]) for _, asked in server.ranges]
    assert begins == [0, 0, 100_000, 0, 100_000, 200_000]  # opened, read, broken, opened anew, read on


def test_the_pause_a_server_asks_for_is_kept(server: RangeServer) -> None:
    server.faults += [Fault(status=503, retry_after="1")]
    begin = time.monotonic()
    assert read_bytes(file_on(server), QUICK) == DATA
    assert time.monotonic() - begin >= 1.0


def test_nobody_listening_is_an_error_after_the_retries(server: RangeServer) -> None:
    problems: list[str] = []
    server.__exit__(None, None, None)
    with pytest.raises(StorageError, match=r"127\.0\.0\.1"):
        open_file(file_on(server), QUICK, problems.append)
    assert len(problems) == 2


# ---- storage that is wrong for good


@pytest.mark.parametrize("status", [401, 403, 400, 405])
def test_a_refusal_is_final_at_once(server: RangeServer, status: int) -> None:
    server.always = Fault(status=status)
    with pytest.raises(StorageError) as caught:
        open_file(file_on(server), QUICK)
    assert caught.value.permanent
    assert len(server.ranges) == 1


def test_an_absent_remote_file_is_final_at_once(server: RangeServer) -> None:
    with pytest.raises(StorageError, match="no such file") as caught:
        open_file(file_on(server, "b.tar"), QUICK)
    assert caught.value.permanent
    assert caught.value.missing
    assert len(server.ranges) == 1


def test_a_server_that_ignores_ranges_gives_no_wrong_bytes(server: RangeServer) -> None:
    server.always = Fault(ignore_range=True)
    with pytest.raises(StorageError, match="ignores range requests") as caught:
        open_file(file_on(server), QUICK)
    assert caught.value.permanent
    server.always = Fault()
    with open_file(file_on(server), QUICK) as file:
        server.always = Fault(ignore_range=True)
        with pytest.raises(StorageError, match="ignores range requests"):
            file.read(10, 20)


def test_a_server_that_sends_another_range_gives_no_wrong_bytes(server: RangeServer) -> None:
    with open_file(file_on(server), QUICK) as file:
        server.always = Fault(wrong_range=True)
        with pytest.raises(StorageError, match="asked for the bytes from 10 on"):
            file.read(10, 20)


def rewrite(path: Path) -> None:
    path.write_bytes(DATA[::-1])


def replace(path: Path) -> None:
    other = path.with_suffix(".new")
    other.write_bytes(DATA[::-1])
    other.rename(path)


def shrink(path: Path) -> None:
    os.truncate(path, 1000)


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


@pytest.mark.parametrize("change", [rewrite, shrink, grow])
def test_a_file_that_changes_while_it_is_open_is_an_error(
    location: Location, server: RangeServer, change: Callable[[Path], None]
) -> None:
    with open_file(location, QUICK) as file:
        assert file.read(0, 10) == DATA[:10]
        change(server.folder / "a.tar")
        with pytest.raises(StorageError, match="was replaced while it was read") as caught:
            file.read(5000, 6000)
    assert caught.value.permanent


def test_a_remote_file_replaced_by_another_is_an_error(server: RangeServer) -> None:
    with open_file(file_on(server), QUICK) as file:
        replace(server.folder / "a.tar")
        with pytest.raises(StorageError, match="was replaced while it was read"):
            file.read(0, 10)


def test_a_local_file_replaced_by_another_is_read_to_its_end_as_it_was(server: RangeServer) -> None:
    path = server.folder / "a.tar"
    with open_file(Location(str(path)), QUICK) as file:
        replace(path)
        assert file.read(0, len(DATA)) == DATA
        path.unlink()
        assert file.read(0, len(DATA)) == DATA


def test_a_remote_file_that_vanishes_is_an_error(server: RangeServer) -> None:
    with open_file(file_on(server), QUICK) as file:
        (server.folder / "a.tar").unlink()
        with pytest.raises(StorageError, match="no such file"):
            file.read(0, 10)


def test_a_local_file_that_comes_back_in_time_is_read(tmp_path: Path) -> None:
    path, problems = tmp_path / "a.tar", []
    config = StorageConfig(timeout_seconds=5.0, retry_seconds=(0.01, 20.0))

    def back(problem: str) -> None:
        problems.append(problem)
        path.write_bytes(DATA)

    with open_file(Location(str(path)), config, back) as file:
        assert file.read(0, 10) == DATA[:10]
    assert problems == [f"{path}: cannot be read (no such file or directory); check the storage"]


def test_a_local_file_that_stays_away_is_an_error_after_the_retries(tmp_path: Path) -> None:
    problems: list[str] = []
    with pytest.raises(StorageError, match="no such file or directory") as caught:
        open_file(Location(str(tmp_path / "a.tar")), QUICK, problems.append)
    assert caught.value.missing
    assert len(problems) == len(QUICK.retry_seconds)
    problems.clear()
    with pytest.raises(StorageError):  # an index is not waited for
        read_bytes(Location(str(tmp_path / "index.json")), QUICK, on_retry=problems.append)
    assert problems == []


def test_a_fifo_and_a_folder_are_refused_without_waiting_for_a_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for place in (tmp_path / "fifo", tmp_path):
        begin = time.monotonic()
        with pytest.raises(StorageError, match="not a regular file") as caught:
            open_file(Location(str(place)), StorageConfig(timeout_seconds=60.0))
        assert caught.value.permanent
        assert time.monotonic() - begin < 5.0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_forbidden_file_is_final_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.tar").touch(mode=0)
    with pytest.raises(StorageError, match="permission denied") as caught:
        open_file(Location(str(tmp_path / "a.tar")), QUICK)
    assert caught.value.permanent


LEASE = """
import fcntl, os, signal, sys, time
signal.signal(signal.SIGIO, signal.SIG_IGN)  # the kernel asks for the lease back; we are slow
file = os.open(sys.argv[1], os.O_RDWR)
fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def hung_file(tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """A regular file that hangs on opening, as on a network file system whose server is away.

    Another process holds a lease on it and does not answer the kernel.
    """
    path = tmp_path / "hung.tar"
    path.write_bytes(DATA)
    holder = subprocess.Popen([sys.executable, "-c", LEASE, str(path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    try:
        if holder.stdout.readline() != "held\n":
            pytest.skip("this file system knows no leases")
        yield path, holder
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


def num_openings(path: Path) -> int:
    """How often this process has the file at ``path`` open: other tests' leftovers come and go meanwhile."""
    num_found = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            num_found += descriptor.readlink() == path
    return num_found


def test_a_client_that_gives_up_by_itself_says_after_how_long(tmp_path: Path) -> None:
    """Its own time-out may come a moment before that of whoever waits for it, and has no text."""
    (tmp_path / "file").write_bytes(bytes(1000))
    with RangeServer(tmp_path) as server:
        file = open_remote(Location(f"{server.url}/file"), 0.5)
        server.always = Fault(stall_after_bytes=10)
        with pytest.raises(StorageError, match=r"/file: no answer within 0\.5 seconds"):
            file.reader(0, 1000)()


def test_a_local_file_that_hangs_ends_in_an_error(hung_file: tuple[Path, subprocess.Popen[str]]) -> None:
    begin = time.monotonic()
    with pytest.raises(StorageError, match=r"no answer within 0\.5 seconds"):
        open_file(Location(str(hung_file[0])), HASTY)
    assert 1.5 <= time.monotonic() - begin < 5.0


def test_a_local_file_is_read_once_it_no_longer_hangs(
    hung_file: tuple[Path, subprocess.Popen[str]],
) -> None:
    path, holder = hung_file
    with open_file(Location(str(path)), HASTY, lambda _: holder.send_signal(signal.SIGKILL)) as file:
        assert file.read(0, len(DATA)) == DATA
        assert num_openings(path) >= 1
    end = time.monotonic() + 10  # the openings left behind close what they got
    while num_openings(path) and time.monotonic() < end:
        time.sleep(0.02)
    assert num_openings(path) == 0


def test_a_closed_file_is_not_read_any_more(location: Location) -> None:
    file = open_file(location, QUICK)
    file.close()
    with pytest.raises(ValueError, match="is closed"):
        file.read(0, 1)


@pytest.mark.parametrize("config", [{"timeout_seconds": 0}, {"retry_seconds": (-1.0,)}])
def test_impossible_waits_are_refused(config: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="; use "):
        StorageConfig(**config)  # type: ignore[arg-type]


# ---- deadlines


def test_a_task_in_time_gives_its_result_or_its_error() -> None:
    assert in_time(lambda: 3, 5.0) == 3
    with pytest.raises(ZeroDivisionError):
        in_time(lambda: 1 // 0, 5.0)


def test_a_late_result_is_handed_to_its_undertaker() -> None:
    gate, buried = threading.Event(), threading.Event()
    with pytest.raises(DeadlineError):
        in_time(lambda: gate.wait(10), 0.05, late=lambda result: buried.set() if result else None)
    assert not buried.is_set()
    gate.set()
    assert buried.wait(10)


def test_a_hanging_task_does_not_hold_up_the_others() -> None:
    gate = threading.Event()
    with pytest.raises(DeadlineError):
        in_time(lambda: gate.wait(30), 0.05)
    begin = time.monotonic()
    assert [in_time(lambda: 1, 5.0) for _ in range(50)] == [1] * 50
    assert time.monotonic() - begin < 5.0
    gate.set()


def test_threads_are_used_again() -> None:
    for _ in range(50):
        in_time(lambda: None, 5.0)
    assert sum(thread.name == "storage" for thread in threading.enumerate()) <= 17 + 8
