"""Range reads of remote files through fsspec: web servers, S3, Google Cloud Storage, the Hugging Face hub.

fsspec's own instance cache makes one client per thread and keeps listings; here there is one client per
process and kind, so connections are used again, and no listing is kept, so a replaced file is seen.
Credentials come from the environment, as each package documents; for http(s) from ~/.netrc.
"""

from __future__ import annotations

import importlib
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.request import getproxies

from pretrain.data.location import SCHEMES, Location, StorageError, replaced

MAX_RETRY_AFTER_SECONDS = 60.0
TRANSIENT_STATUS = {408, 425, 429}  # beside all of 500..599
NUM_SDK_TRIES = 1  # of the S3 packages; the tries that count are those of storage.py
_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)")
_REPLACED = {"FileExpired"}  # names, because the packages that define these errors may not be there
_PERMANENT = {
    "ClientConnectorCertificateError",
    "InvalidUrlClientError",
    "InvalidURL",
    "NoCredentialsError",
    "NoSuchBucket",
    "ParamValidationError",
    "PartialCredentialsError",
    "RepositoryNotFoundError",
    "GatedRepoError",
}


class HttpFile:
    """A file of an http(s) server that answers range requests."""

    def __init__(self, location: Location, timeout_seconds: float) -> None:
        self._location = location
        self._timeout_seconds = timeout_seconds
        self._files = _http_client(timeout_seconds, os.getpid())
        self.num_bytes = 0
        self.stamp: object = None
        try:
            self._get(0, 1)
        except StorageError:
            if (
                self.stamp is None
            ):  # else the size is known: an empty file tells it, though it has no first byte
                raise

    def reader(self, begin: int, end: int) -> Callable[[], bytes]:
        return lambda: self._get(begin, end)

    def close(self) -> None:
        """The connection goes back to the client, for the next file."""

    def _get(self, begin: int, end: int) -> bytes:
        async def check(response: Any) -> None:  # before the body is read
            problem = self._problem(response, begin)
            if problem is not None:
                response.close()
                raise problem

        with explained(self._location, self._timeout_seconds):
            data: bytes = self._files.cat_file(
                self._location.url, start=begin, end=end, raise_for_status=check
            )
        return data

    def _problem(self, response: Any, begin: int) -> StorageError | None:
        """What speaks against the answer to a request for the bytes from `begin` on, if anything."""
        status, headers = response.status, response.headers
        opening = self.stamp is None
        tag = headers.get("ETag") or headers.get("Last-Modified") or ""
        if opening and status in (200, 416) and _length(headers, status) == 0:
            self.stamp = (0, tag)
            return None
        if status == 416:
            return replaced(self._location, f"it no longer has a byte {begin}")
        if status == 200:
            return StorageError(
                f"{self._location}: the server ignores range requests; use one that answers them "
                "(object storage, nginx, Apache), or copy the shards to a local folder",
                permanent=True,
            )
        if status != 206:
            return _status_problem(self._location, status, headers.get("Retry-After", ""))
        answered = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", ""))
        if answered is None or answered[1] is None or int(answered[1]) != begin or answered[3] == "*":
            told = headers.get("Content-Range")
            return StorageError(
                f"{self._location}: asked for the bytes from {begin} on, the server sent {told!r}; "
                "a proxy between may be at fault",
                permanent=True,
            )
        stamp = (int(answered[3]), tag)
        if opening:
            self.num_bytes, self.stamp = stamp[0], stamp
        elif stamp != self.stamp:
            return replaced(self._location, f"{self.stamp} is now {stamp}")
        return None


class ObjectFile:
    """A file of an object store, read through the store's fsspec package.

    S3 refuses a read once the object has been replaced; for the other stores this is seen on opening.
    """

    def __init__(self, location: Location, timeout_seconds: float) -> None:
        self._location = location
        self._lock = threading.Lock()
        with explained(location):
            files = object_store(location.scheme, timeout_seconds, os.getpid())
            files.invalidate_cache()
            self._file = files.open(location.url, "rb", cache_type="none")
            details = self._file.details
        if details["type"] != "file" or details["size"] is None:
            raise StorageError(f"{location}: is a folder, not a file", permanent=True)
        self.num_bytes = int(details["size"])
        tags = ("ETag", "etag", "blob_id", "generation", "LastModified", "updated")
        self.stamp: object = (
            self.num_bytes,
            next((str(details[tag]) for tag in tags if details.get(tag)), ""),
        )

    def reader(self, begin: int, end: int) -> Callable[[], bytes]:
        return lambda: self._get(begin, end)

    def close(self) -> None:
        """Nothing is held; a read that another thread is in may finish."""

    def _get(self, begin: int, end: int) -> bytes:
        with self._lock, explained(self._location):
            self._file.seek(begin)
            data: bytes = self._file.read(end - begin)
            return data


def load_package(location: Location) -> None:
    """Load what speaks to the store: takes a second the first time, which no deadline should count."""
    with explained(location):
        package, _ = SCHEMES[location.scheme]
        importlib.import_module("fsspec.implementations.http" if package == "aiohttp" else package)


def open_remote(location: Location, timeout_seconds: float) -> HttpFile | ObjectFile:
    if location.scheme in ("http", "https"):
        return HttpFile(location, timeout_seconds)
    return ObjectFile(location, timeout_seconds)


def list_remote(location: Location, timeout_seconds: float) -> list[str]:
    """Names of the files directly in a folder of an object store."""
    with explained(location):
        files = object_store(location.scheme, timeout_seconds, os.getpid())
        files.invalidate_cache()
        entries = files.ls(location.url, detail=True)
        return [entry["name"].rpartition("/")[2] for entry in entries if entry["type"] == "file"]


@contextmanager
def explained(location: Location, timeout_seconds: float | None = None) -> Iterator[None]:
    """Turn whatever a storage package raises into a StorageError; these packages share no error type.

    timeout_seconds: after which the package gives up by itself, and says no more than that it has.
    """
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        names = {kind.__name__ for kind in type(error).__mro__}
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, TimeoutError) and timeout_seconds is not None:
            reason = f"no answer within {timeout_seconds:g} seconds"
        if names & _REPLACED:
            raise replaced(location, "it is another object now") from error
        missing = isinstance(error, FileNotFoundError)
        denied = isinstance(error, PermissionError) or "NoCredentialsError" in names
        if missing:
            reason = "there is no such file"
        elif denied:
            reason = f"access denied ({reason}); check the credentials in the environment"
        lasting = missing or denied or isinstance(error, (IsADirectoryError, NotADirectoryError, ValueError))
        raise StorageError(
            f"{location}: {reason}", permanent=lasting or bool(names & _PERMANENT), missing=missing
        ) from error


def _status_problem(location: Location, status: int, retry_after: str) -> StorageError:
    if status in (404, 410):
        return StorageError(f"{location}: there is no such file", permanent=True, missing=True)
    if status in (401, 403):
        return StorageError(
            f"{location}: access denied (status {status}); check the credentials in ~/.netrc", permanent=True
        )
    seconds = float(retry_after) if retry_after.isascii() and retry_after.isdigit() else 0.0
    return StorageError(
        f"{location}: the server answers with status {status}",
        permanent=status not in TRANSIENT_STATUS and status < 500,
        retry_after_seconds=min(seconds, MAX_RETRY_AFTER_SECONDS),
    )


def _length(headers: Any, status: int) -> int | None:
    """Bytes of the whole file, as an answer that is not partial tells it."""
    if status == 200:
        told = headers.get("Content-Length", "")
        return int(told) if told.isdigit() else None
    answered = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", ""))
    return int(answered[3]) if answered is not None and answered[3] != "*" else None


@lru_cache
def _http_client(timeout_seconds: float, pid: int) -> Any:
    """fsspec's http client; it runs in a thread of its own, which a forked process does not have."""
    import aiohttp
    from fsspec.implementations.http import HTTPFileSystem

    return HTTPFileSystem(
        skip_instance_cache=True,
        client_kwargs={
            "timeout": aiohttp.ClientTimeout(total=timeout_seconds),
            "headers": {"Accept-Encoding": "identity"},
            "auto_decompress": False,  # some servers call a .tar.gz an encoding of a .tar
            "trust_env": bool(getproxies()) or _netrc().exists(),  # costs a millisecond for each request
        },
    )


def _netrc() -> Path:
    return Path(os.environ.get("NETRC") or Path(os.environ.get("HOME", "/"), ".netrc"))


@lru_cache
def object_store(scheme: str, timeout_seconds: float, pid: int) -> Any:
    """The fsspec package of a store."""
    if scheme == "s3":
        from s3fs import S3FileSystem

        limits = {"connect_timeout": timeout_seconds, "read_timeout": timeout_seconds}
        files = S3FileSystem(
            skip_instance_cache=True,
            use_listings_cache=False,
            config_kwargs={**limits, "retries": {"total_max_attempts": NUM_SDK_TRIES}},
        )
        files.retries = NUM_SDK_TRIES
        return files
    if scheme == "gs":
        from gcsfs import GCSFileSystem

        return GCSFileSystem(skip_instance_cache=True, use_listings_cache=False)
    from huggingface_hub import HfFileSystem

    return HfFileSystem(skip_instance_cache=True)
