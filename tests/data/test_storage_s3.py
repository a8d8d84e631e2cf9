"""Reads from a real S3-compatible server, through the same calls as every other storage."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from s3_server import S3Server, s3_server

from pretrain.data.cache import CacheConfig, ShardCache
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

DATA = random.Random(5).randbytes(300_000)
QUICK = StorageConfig(timeout_seconds=10.0, retry_seconds=(0.01, 0.02))


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as running:
        yield running


@pytest.fixture
def client(server: S3Server) -> Iterator[Any]:
    client: Any = server.client()
    yield client
    client.close()


@pytest.fixture
def location(server: S3Server, client: Any, monkeypatch: pytest.MonkeyPatch) -> Location:
    """A file in a bucket, and an environment that may read it."""
    from pretrain.data import remote

    remote.object_store.cache_clear()  # a client keeps the credentials it was made with
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    client.create_bucket(Bucket="shards")
    client.put_object(Bucket="shards", Key="set/a.tar", Body=DATA)
    return parse_location("s3://shards/set").join("a.tar")


def test_ranges_streams_and_whole_files_are_the_bytes_that_were_put(location: Location) -> None:
    rng = random.Random(1)
    with open_file(location, QUICK) as file, ThreadPoolExecutor(4) as pool:
        assert file.num_bytes == len(DATA)
        ranges = [(0, 1), (len(DATA) - 1, len(DATA) + 5), (len(DATA), len(DATA) + 1), (5, 5)]
        ranges += [(begin, begin + 1000) for begin in (rng.randrange(len(DATA)) for _ in range(30))]
        pieces = list(pool.map(lambda bounds: file.read(*bounds), ranges))
        assert pieces == [DATA[begin:end] for begin, end in ranges]
    with open_stream(location, QUICK) as stream:
        assert stream.read() == DATA
    assert read_bytes(location, QUICK) == DATA


def test_a_folder_lists_its_files_as_they_are_now(location: Location, client: Any) -> None:
    folder = parse_location("s3://shards/set")
    assert list_names(folder, QUICK) == ["a.tar"]
    client.put_object(Bucket="shards", Key="set/b.tar", Body=b"b")
    client.put_object(Bucket="shards", Key="set/below/c.tar", Body=b"c")
    assert list_names(folder, QUICK) == ["a.tar", "b.tar"]
    client.delete_object(Bucket="shards", Key="set/b.tar")
    client.delete_object(Bucket="shards", Key="set/below/c.tar")
    assert list_names(folder, QUICK) == ["a.tar"]


@pytest.mark.parametrize("url", ["s3://shards/set/absent.tar", "s3://no-such-bucket/a.tar"])
def test_an_absent_file_is_final_at_once(location: Location, url: str) -> None:
    problems: list[str] = []
    with pytest.raises(StorageError, match="no such file") as caught:
        open_file(parse_location(url), QUICK, problems.append)
    assert caught.value.missing
    assert caught.value.permanent
    assert problems == []


@pytest.mark.parametrize("variable", ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"])
def test_wrong_credentials_are_final_at_once_and_not_shown(
    location: Location, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    problems: list[str] = []
    monkeypatch.setenv(variable, "wrongwrongwrongwrong")
    with pytest.raises(StorageError, match="access denied") as caught:
        open_file(location, QUICK, problems.append)
    assert caught.value.permanent
    assert problems == []
    assert "wrongwrong" not in str(caught.value)


def test_no_credentials_at_all_is_told(location: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"):
        monkeypatch.delenv(name)
    with pytest.raises(StorageError, match=r"access denied.*check the credentials") as caught:
        open_file(location, QUICK)
    assert caught.value.permanent


def test_an_object_replaced_while_it_is_open_is_an_error(location: Location, client: Any) -> None:
    with open_file(location, QUICK) as file:
        assert file.read(0, 10) == DATA[:10]
        client.put_object(Bucket="shards", Key="set/a.tar", Body=DATA[::-1])
        with pytest.raises(StorageError, match="was replaced while it was read") as caught:
            file.read(0, 10)
    assert caught.value.permanent
    assert read_bytes(location, QUICK) == DATA[::-1]  # opened anew, it is the new one


def test_a_server_that_is_away_is_an_error_after_the_retries(
    location: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    problems: list[str] = []
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(StorageError) as caught:
        open_file(location, QUICK, problems.append)
    assert not caught.value.permanent
    assert len(problems) == len(QUICK.retry_seconds)


def test_a_shard_comes_through_the_cache(location: Location, tmp_path: Path) -> None:
    cache = ShardCache(CacheConfig(tmp_path / "cache", 10**6), QUICK)
    with cache.open(location, len(DATA), hashlib.sha256(DATA).hexdigest()) as file:
        assert file.read(0, len(DATA)) == DATA
