"""A real training, watched by a real Prometheus with the config that is deployed; only ports, paths and
intervals of it are replaced."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import yaml
from fault_runs import die_with_parent

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
PROGRAMS = ("prometheus", "promtool", "amtool", "prometheus-alertmanager", "prometheus-node-exporter")
PACKAGES = "prometheus, prometheus-alertmanager and prometheus-node-exporter"
SECONDS = "1s"

# all that publishes something of its own: a teacher, k-NN, a cache, a mirror, gradients of tasks
CONFIG = """\
seed: 0
model: {name: vit_tiny_patch16_224, img_px: 32, patch_px: 8, args: {depth: 2, embed_dim: 48, num_heads: 2}}
data: {lanes: 8, decode_threads: 1, max_bad_ratio: 0.01}
views:
  one: &view {size_px: 32, scale: [0.3, 1.0], turn: true}
  two: *view
tasks:
  contrastive: {hidden_dim: 48, out_dim: 32}
  dino: {hidden_dim: 48, bottleneck_dim: 24, out_dim: 48, freeze_last_layer_epochs: 0.0}
  rotation: {}
balance: {kind: uncertainty}
teacher: {momentum: 0.99}
optim: {base_lr: 1e-3, weight_decay: 0.05, clip_norm: 3.0}
schedule: {steps: 100000, warmup_steps: 20}
batch: {global_size: 16}
engine: {kind: deepspeed, precision: fp32}
checkpoint: {every_steps: 25, keep_last: 2}
online_knn: {every_steps: 10, num_train: 60, num_test: 30, k: 5}
log: {every_steps: 5, health_every_steps: 5, gradients: {every_steps: 20}}
export: {at_end: false}
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def missing_programs() -> list[str]:
    return [name for name in PROGRAMS if shutil.which(name) is None]


@dataclass
class Prometheus:
    """Asks through the HTTP API."""

    port: int

    def ask(self, what: str, **arguments: str | float) -> Any:
        """`data` of the answer; raises RuntimeError with Prometheus' own words where it refuses."""
        body = urllib.parse.urlencode(arguments).encode()
        address = f"http://127.0.0.1:{self.port}/api/v1/{what}"
        request = urllib.request.Request(address, data=body if what.startswith("query") else None)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                found = json.load(answer)
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{arguments.get('query', what)}: {error.read().decode()}") from None
        assert not found.get("warnings"), found["warnings"]
        return found["data"]

    def now(self, query: str) -> list[dict[str, Any]]:
        """Series with a `value` each."""
        found = self.ask("query", query=query)
        assert found["resultType"] == "vector", query
        return list(found["result"])

    def over(self, query: str, seconds: float, step: float) -> list[dict[str, Any]]:
        """Series with `values` of the last seconds each."""
        end = time.time()
        found = self.ask("query_range", query=query, start=end - seconds, end=end, step=step)
        return list(found["result"])

    def number(self, query: str) -> float | None:
        found = self.now(query)
        return float(found[0]["value"][1]) if found else None


@dataclass
class Monitored:
    """A run under way and all that watches it."""

    prometheus: Prometheus
    training: subprocess.Popen[bytes]
    run_dir: Path
    log: Path
    inbox: list[dict[str, Any]] = field(default_factory=list)  # what Alertmanager sent

    def wait_for(self, query: str, seconds: float = 150.0) -> float:
        """Until a query gives something; the seconds it took."""
        started = time.monotonic()
        while not self.prometheus.now(query):
            assert self.training.poll() is None, f"the run ended:\n{self.log.read_text()[-3000:]}"
            waited = time.monotonic() - started
            assert waited < seconds, f"no {query} in {waited:.0f} s:\n{self.log.read_text()[-3000:]}"
            time.sleep(0.5)
        return time.monotonic() - started

    def settle(self, queries: Sequence[str], seconds: float) -> None:
        """Until all of them give something, or the time is up: what is missing is for the tests to say."""
        deadline = time.monotonic() + seconds
        while not all(map(self.prometheus.now, queries)) and time.monotonic() < deadline:
            time.sleep(0.5)


def substituted(query: str, run: str, rate: str = "15s", whole: str = "1m") -> str:
    """As Grafana would fill in a panel's variables."""
    values = {"$__rate_interval": rate, "$__range": whole, "$run": run, "$rank": ".*", "$node": ".*"}
    for name, value in values.items():
        query = query.replace(name, value)
    left = re.findall(r"\$\w+", query)
    assert not left, f"{left} in {query}"
    return query


def write_prometheus_config(folder: Path, ports: dict[str, int], interval: str = SECONDS) -> Path:
    """A copy of deploy/prometheus in `folder`, with ports and intervals of our own."""
    shutil.copytree(DEPLOY / "prometheus", folder, ignore=shutil.ignore_patterns("*.json"))
    path = folder / "prometheus.yml"
    config = yaml.safe_load(path.read_text())
    config["global"] = {
        "scrape_interval": interval, "scrape_timeout": interval, "evaluation_interval": interval,
    }  # fmt: skip
    for job in config["scrape_configs"]:
        for found in job.get("file_sd_configs", []):
            found["refresh_interval"] = SECONDS
        for rule in job.get("relabel_configs", []):
            for usual, name in (("9100", "node"), ("9400", "dcgm")):
                if rule.get("replacement") == f"$1:{usual}":
                    rule["replacement"] = f"$1:{ports[name]}"
        for static in job.get("static_configs", []):
            static["targets"] = [f"127.0.0.1:{ports['prometheus']}"]
    config["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"] = [
        f"127.0.0.1:{ports['alertmanager']}"
    ]
    path.write_text(yaml.safe_dump(config))
    return path


def write_alertmanager_config(path: Path, inbox_port: int) -> Path:
    """deploy/alertmanager, with its receiver `on-call` at work and in no hurry to wait."""
    config = yaml.safe_load((DEPLOY / "alertmanager" / "alertmanager.yml").read_text())
    config["route"] |= {"receiver": "on-call", "group_wait": SECONDS}
    for receiver in config["receivers"]:
        for hook in receiver.get("webhook_configs", []):
            hook["url"] = f"http://127.0.0.1:{inbox_port}/alerts"
    path.write_text(yaml.safe_dump(config))
    return path


@contextmanager
def process(arguments: Sequence[str], log: Path, cwd: Path = ROOT) -> Iterator[subprocess.Popen[bytes]]:
    """Runs beside us, in a process group of its own that ends with us."""
    with log.open("ab") as file:
        started = subprocess.Popen(
            arguments,
            cwd=cwd,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
    try:
        yield started
    finally:
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGTERM)
        try:
            started.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGKILL)
            started.wait()


@contextmanager
def inbox() -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """A webhook: its port, and what it was sent."""
    received: list[dict[str, Any]] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Hook)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_port, received
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def monitored(
    folder: Path, config: Path, overrides: Sequence[str], run: str, interval: str = SECONDS
) -> Iterator[Monitored]:
    """Start a training on two ranks, and all that watches it."""
    ports = {name: free_port() for name in ("prometheus", "alertmanager", "node", "dcgm", "metrics")}
    config_path = write_prometheus_config(folder / "prometheus", ports, interval)
    runs, targets = folder / "runs", config_path.parent / "targets" / "runs"
    runs.mkdir()
    log = folder / "train.out"
    train = [
        *(sys.executable, "-m", "pretrain", "train", str(config), *overrides),
        *(f"checkpoint.mirror={folder / 'mirror'}", f"log.prometheus.port={ports['metrics']}"),
        *("--nproc", "2", "--output-dir", str(runs / run)),
    ]
    (folder / "mirror").mkdir()
    local = "127.0.0.1"
    with ExitStack() as stack:
        hook_port, received = stack.enter_context(inbox())
        alertmanager = write_alertmanager_config(folder / "alertmanager.yml", hook_port)
        training = stack.enter_context(process(train, log))
        gather = ["sh", str(DEPLOY / "prometheus" / "gather_targets.sh"), str(runs), str(targets), "1"]
        for name, arguments in {
            "gather": gather,
            "node": [
                "prometheus-node-exporter",
                f"--web.listen-address={local}:{ports['node']}",
                f"--collector.textfile.directory={folder}",
            ],
            "alertmanager": [
                "prometheus-alertmanager",
                f"--config.file={alertmanager}",
                f"--storage.path={folder / 'alertmanager'}",
                f"--web.listen-address={local}:{ports['alertmanager']}",
                "--cluster.listen-address=",
            ],
            "prometheus": [
                "prometheus",
                f"--config.file={config_path}",
                f"--storage.tsdb.path={folder / 'tsdb'}",
                f"--web.listen-address={local}:{ports['prometheus']}",
            ],
        }.items():
            stack.enter_context(process(arguments, folder / f"{name}.out"))
        prometheus = Prometheus(ports["prometheus"])
        _wait_until_ready(ports["prometheus"], folder / "prometheus.out")
        yield Monitored(prometheus, training, runs / run, log, received)


def _wait_until_ready(port: int, log: Path) -> None:
    for _ in range(120):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/-/ready", timeout=5):
                return
        except OSError:
            time.sleep(0.25)
    raise AssertionError(f"Prometheus did not start:\n{log.read_text()[-2000:]}")
