"""Answers HTTP beside a training: /metrics for Prometheus, /healthz for whoever restarts what hangs."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

App = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class Health:
    """Whether this rank gets on: it is healthy while something was done within the last `limit_seconds`."""

    def __init__(self, limit_seconds: float) -> None:
        self.limit_seconds = limit_seconds
        self.step = 0
        self._last = time.monotonic()

    def progressed(self, step: int) -> None:
        self.step, self._last = step, time.monotonic()

    def state(self) -> dict[str, object]:
        """What /healthz says."""
        idle = time.monotonic() - self._last
        return {
            "healthy": idle <= self.limit_seconds,
            "step": self.step,
            "seconds_since_progress": round(idle, 1),
            "limit_seconds": self.limit_seconds,
        }


def with_health(metrics: App, health: Health) -> App:
    """An application that answers /healthz with 200 or 503 and JSON, and leaves the rest to `metrics`."""

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ.get("PATH_INFO") != "/healthz":
            return metrics(environ, start_response)
        state = health.state()
        status = "200 OK" if state["healthy"] else "503 Service Unavailable"
        start_response(status, [("Content-Type", "application/json")])
        return [json.dumps(state).encode() + b"\n"]

    return answer


class _Server(ThreadingMixIn, WSGIServer):
    """A thread for each client: one that stands still keeps no other from being answered."""

    daemon_threads = True
    request_queue_size = 32

    def server_bind(self) -> None:
        # as WSGIServer, but it asks no name server what this address is called, which may take seconds
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is not worth a traceback in the log of a training."""


class _Silent(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Scrapes are not logged."""


class Serving:
    """A server that answers in threads of its own until it is closed."""

    def __init__(self, app: App, address: str, port: int) -> None:
        """OSError where the address is not ours or the port is taken. port 0: any free one."""
        family, _, _, _, where = socket.getaddrinfo(address or None, port, type=socket.SOCK_STREAM)[0]
        kind = type("_Server", (_Server,), {"address_family": family})
        self._server = kind((where[0], port), _Silent)
        self._server.set_app(app)
        self.port = int(self._server.server_port)
        host = f"[{address}]" if ":" in address else address
        self.url = f"http://{host}:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Give the port back; safe to call twice."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
