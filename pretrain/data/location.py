"""Where data lies: a local path or an address in one of a few schemes. Plain text; nothing is opened here."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import quote, urlsplit, urlunsplit

from pretrain.errors import ConfigError

# scheme -> the package that speaks it, and what to install for it
SCHEMES = {
    "http": ("aiohttp", "aiohttp"),
    "https": ("aiohttp", "aiohttp"),
    "s3": ("s3fs", "pretrain[s3]"),
    "gs": ("gcsfs", "pretrain[gs]"),
    "hf": ("huggingface_hub", "huggingface_hub"),
}
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_HOST_IN_BRACKETS = re.compile(
    r"//\[[0-9A-Fa-f:.]*\]"
)  # of an IPv6 host: the only place where `::` may stand


class StorageError(Exception):
    """What is wrong with one location; `permanent` where asking again is pointless."""

    def __init__(
        self,
        message: str,
        *,
        permanent: bool = False,
        missing: bool = False,
        retry_after_seconds: float = 0.0,
    ) -> None:
        super().__init__(message)
        self.permanent = permanent
        self.missing = missing  # there is nothing of that name
        self.retry_after_seconds = retry_after_seconds  # the store asked for at least this pause

    def __reduce__(self) -> tuple[type[StorageError], tuple[str], dict[str, object]]:
        return type(self), (str(self),), self.__dict__


@dataclass(frozen=True)
class Location:
    """A folder or a file, local or remote."""

    url: str  # a local path, or scheme://...

    @property
    def scheme(self) -> str:
        """'' for a local path."""
        return "" if self.is_local else urlsplit(self.url).scheme.lower()

    @property
    def is_local(self) -> bool:
        return _ADDRESS.match(self.url) is None

    @property
    def path(self) -> Path:
        assert self.is_local, "a remote location has no path"
        return Path(self.url)

    @property
    def name(self) -> str:
        """The last part of the path."""
        return PurePosixPath(self.url if self.is_local else urlsplit(self.url).path).name

    def join(self, name: str) -> Location:
        """A file in this folder, or in a folder below it."""
        parts = name.split("/")
        if _CONTROL.search(name) or "://" in name or {"", ".", ".."}.intersection(parts):
            raise ConfigError(f"{self}: {name!r} is not the name of a file below this folder; rename it")
        if self.is_local:
            return Location(str(self.path / name))
        if self.scheme not in ("http", "https"):
            return Location(f"{self.url.rstrip('/')}/{name}")
        address = urlsplit(self.url)
        return Location(urlunsplit(address._replace(path=f"{address.path.rstrip('/')}/{quote(name)}")))

    def __str__(self) -> str:
        """For messages: without a password, and without the query, which may hold a signature."""
        if self.scheme not in ("http", "https"):
            return self.url
        address = urlsplit(self.url)
        host = address.netloc.rpartition("@")[2]
        return urlunsplit(
            (address.scheme, host, address.path, "...", "")
            if address.query
            else (address.scheme, host, address.path, "", "")
        )


def replaced(location: Location, how: str) -> StorageError:
    return StorageError(
        f"{location}: was replaced while it was read ({how}); restore it, or index the shards again",
        permanent=True,
    )


def parse_location(text: str | Path, where: str = "") -> Location:
    """The location that a user wrote, or a ConfigError that names the setting `where`."""
    prefix = f"{where}: " if where else ""
    if isinstance(text, Path):
        text = str(text)
        if (found := _SCHEME.match(text)) and found[1].lower() in SCHEMES:
            raise ConfigError(f"{prefix}{text!r} is an address where a path is meant; give it as text")
        if _CONTROL.search(text):
            raise ConfigError(f"{prefix}{text!r} holds a control character; rename the folder")
        return Location(text)
    if not text.strip():
        raise ConfigError(f"{prefix}no place is given; name a folder of shards or its address")
    if _CONTROL.search(text):
        raise ConfigError(f"{prefix}{text!r} holds a control character; remove it")
    if "::" in _HOST_IN_BRACKETS.sub("//host", text):
        raise ConfigError(
            f"{prefix}{text!r} chains places with '::', which is refused; give the plain address"
        )
    found = _SCHEME.match(text)
    if found is None:
        return Location(text)
    scheme = found[1].lower()
    if scheme == "file":
        raise ConfigError(f"{prefix}'file:' is refused; give the path itself")
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise ConfigError(
            f"{prefix}'{scheme}:' is refused; use a local path (./{scheme}:... where the name has a colon) "
            f"or one of {known}"
        )
    return Location(_checked(text, scheme, prefix))


def _checked(text: str, scheme: str, prefix: str) -> str:
    """The address, if it has a host or bucket, no secrets, and the package for its scheme is installed."""
    try:
        address = urlsplit(text)
        _ = address.port
    except ValueError as error:
        raise ConfigError(f"{prefix}not a valid {scheme}:// address ({error}); correct it") from error
    if "@" in address.netloc:
        raise ConfigError(
            f"{prefix}a user or password in an address ends up in logs and is refused; "
            "give it through the environment (for http: in ~/.netrc)"
        )
    if not text.lower().startswith(f"{scheme}://") or not address.netloc:
        raise ConfigError(f"{prefix}{text!r} names no host or bucket; write {scheme}://NAME/FOLDER")
    package, install = SCHEMES[scheme]
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"{prefix}{scheme}:// needs {package}, which is not installed; run `pip install '{install}'`"
        )
    return f"{scheme}{text[len(scheme) :]}"
