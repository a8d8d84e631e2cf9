"""A web server for tests that answers range requests, and misbehaves when it is told to."""

from __future__ import annotations

import base64
import email.utils
import re
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from urllib.parse import unquote, urlsplit


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one answer."""

    status: int = 0  # answered instead of the file
    retry_after: str = ""
    ignore_range: bool = False
    wrong_range: bool = False  # one byte further than asked
    corrupt: bool = False  # the first byte of the answer
    cut_after_bytes: int = -1  # then the connection breaks
    stall_after_bytes: int = -1  # then nothing comes until the server ends
    bytes_per_second: int = 0


HEALTHY = Fault()


class RangeServer:
    """Serves a folder on a loopback port, from threads of this process."""

    def __init__(self, folder: Path, password: str = "") -> None:
        self.folder = folder
        self.authorization = (
            "Basic " + base64.b64encode(f"user:{password}".encode()).decode() if password else ""
        )
        self.faults: deque[Fault] = deque()  # one for each of the next answers
        self.always = HEALTHY  # once there are no more
        self.ranges: list[tuple[str, str]] = []  # (path, Range header) of each request
        self.num_connections = 0
        self.num_sent: Counter[str] = Counter()  # path -> bytes sent
        self.ended = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> RangeServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ended.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _handler(owner: RangeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def setup(self) -> None:
            super().setup()
            owner.num_connections += 1

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            asked = self.headers.get("Range", "")
            name = unquote(urlsplit(self.path).path).lstrip("/")
            owner.ranges.append((name, asked))
            try:
                fault = owner.faults.popleft()
            except IndexError:
                fault = owner.always
            file = owner.folder / name
            if owner.authorization and self.headers.get("Authorization") != owner.authorization:
                self._refuse(401, "")
            elif fault.status:
                self._refuse(fault.status, fault.retry_after)
            elif not file.is_file():
                self._refuse(404, "")
            else:
                self._send(name, file, asked, fault)

        def _refuse(self, status: int, retry_after: str) -> None:
            self.send_response(status)
            if retry_after:
                self.send_header("Retry-After", retry_after)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _send(self, name: str, file: Path, asked: str, fault: Fault) -> None:
            content, changed = file.read_bytes(), file.stat().st_mtime_ns
            bounds = re.fullmatch(r"bytes=(\d+)-(\d*)", asked)
            headers = {
                "ETag": f'"{changed:x}"',
                "Last-Modified": email.utils.formatdate(changed / 1e9, usegmt=True),
            }
            if bounds is None or fault.ignore_range:
                self.send_response(200)
                body = content
            else:
                begin = int(bounds[1]) + fault.wrong_range
                end = min(int(bounds[2] or len(content)) + 1, len(content))
                if begin >= len(content):
                    self.send_response(416)
                    headers["Content-Range"] = f"bytes */{len(content)}"
                    body = b""
                else:
                    self.send_response(206)
                    headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(content)}"
                    body = content[begin:end]
            if fault.corrupt:
                body = bytes([body[0] ^ 1]) + body[1:]
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            self._send_body(name, body, fault)

        def _send_body(self, name: str, body: bytes, fault: Fault) -> None:
            last = max(fault.cut_after_bytes, fault.stall_after_bytes)
            part = body if last < 0 else body[:last]
            step = max(1, fault.bytes_per_second // 20) if fault.bytes_per_second else max(1, len(part))
            try:
                for start in range(0, len(part), step):
                    # before it is sent: who has read it all finds it counted
                    owner.num_sent[name] += len(part[start : start + step])
                    self.wfile.write(part[start : start + step])
                    if fault.bytes_per_second and owner.ended.wait(step / fault.bytes_per_second):
                        return
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True
            if last >= 0:
                self.close_connection = True
                if fault.stall_after_bytes >= 0:
                    self.wfile.flush()
                    owner.ended.wait()

    return Handler


def wait_until(condition: object, seconds: float = 20.0) -> None:
    """Poll a condition (a callable), and fail if it does not come true."""
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)
